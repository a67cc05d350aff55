"""How the weights of each group are distributed, before and after they are dequantized.

The picture that the paper argues with: low-bit weights follow another distribution than those of
the high-bit group, until they are dequantized.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BINS = 64
# The outermost bins also hold what lies beyond.
REACH = 4.0


class WeightDistributions:
    """Histograms of the groups' mean weights, layer by layer.

    All groups share the bins: 64 of one width between -4 and 4, in units of the standard deviation
    that the layer has in the high-bit group. A layer whose weights are all equal is left out.

    Parameters
    ----------
    before : mapping of int to mapping of str to Tensor
        By bit-width, rising, the mean weights of each group as they came.
    layers : iterable of str
        Names of the quantized tensors.
    """

    def __init__(self, before: Mapping[int, Mapping[str, Tensor]], layers: Iterable[str]) -> None:
        *self._low, self._high = before
        units = {name: float(before[self._high][name].std(correction=0)) for name in layers}
        self._units = {name: unit for name, unit in units.items() if 0 < unit < float("inf")}
        self._before = {str(bits): self._count(before[bits]) for bits in self._low}

    def to_record(self, after: Mapping[int, Mapping[str, Tensor]]) -> dict[str, object]:
        """Return what is written down.

        Parameters
        ----------
        after : mapping of int to mapping of str to Tensor
            The same groups, dequantized.

        Returns
        -------
        dict
            ``reach``; ``unit`` by layer; ``high``, the width of the high-bit group; and under
            ``counts`` the numbers of weights in each bin by layer, under ``high`` for that group,
            and by width under ``before`` and ``after`` for the others.
        """
        return {
            "reach": REACH,
            "unit": self._units,
            "high": self._high,
            "counts": {
                "high": self._count(after[self._high]),
                "before": self._before,
                "after": {str(bits): self._count(after[bits]) for bits in self._low},
            },
        }

    def _count(self, weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
        # Clamped just inside, as rounding could put a value at the border beyond it.
        most = REACH * (1 - 1e-6)
        return {
            name: torch.histc((weights[name] / unit).clamp(-most, most), BINS, -REACH, REACH)
            .long()
            .tolist()
            for name, unit in self._units.items()
        }
