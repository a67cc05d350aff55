"""GroupedAvg-Asymmetric: precision flows down only, from the widest clients to the others."""

from collections.abc import Mapping

from exchange.states import State
from quant import WeightedMean
from strategies.grouped import GroupedAvg


class GroupedAvgAsymmetric(GroupedAvg):
    """The widest clients get their own mean, as in `GroupedAvg`; all others the mean of all.

    A baseline of the ProWD paper (Yoon et al., ICML 2022), as far as is known of it.

    Examples
    --------
    >>> GroupedAvgAsymmetric().state_for(4, {"bias": torch.zeros(1)})
    {'bias': tensor([0.])}
    """

    def _use(self, averages: Mapping[int, WeightedMean]) -> None:
        super()._use(averages)
        everybody = WeightedMean()
        for bits, average in averages.items():
            everybody.add(self._models[bits], average.weight)
        if everybody.count:
            mean = everybody.mean()
            self._models |= {b: mean for b in self._models if b != max(self._models)}

    def state_for(self, bits: int, state: State) -> State:
        """Return the model of a width; one that has not reported yet gets the others' mean."""
        known = bits if bits in self._models else min(self._models, default=bits)
        return super().state_for(known, state)
