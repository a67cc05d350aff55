"""The codes of an update as they came, in one run: cut into tensors when asked for, summed as one.

A network has many tensors, and most are small: a call for each takes as long to start as to run.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from quant.layout import Layout, layout_of
from quant.update import QuantizedTensor, Update

# Values at a time: what is computed from them stays in the cache.
_BLOCK = 1 << 16


class FlatCodes(Mapping[str, QuantizedTensor]):
    """The quantized tensors of an update in one run of codes and one of scales.

    Parameters
    ----------
    layout : Layout
        Which tensors they are of.
    codes : Tensor
        int8 or int16 ``[layout.num_codes]``.
    scales : Tensor
        float32 ``[layout.num_scales]``.
    """

    def __init__(self, layout: Layout, codes: Tensor, scales: Tensor) -> None:
        self.layout, self.codes, self.scales = layout, codes, scales

    @classmethod
    def of(cls, update: Update) -> "FlatCodes":
        """Return an update's codes in this form; what has it already as it is."""
        if isinstance(update.quantized, cls):
            return update.quantized
        layout = layout_of(update.spec, update.bits)
        parts = [update.quantized[name] for name in layout.quantized]
        if not parts:
            return cls(layout, torch.empty(0, dtype=torch.int8), torch.empty(0))
        codes = torch.cat([part.codes.detach().cpu().flatten() for part in parts])
        return cls(layout, codes, torch.cat([part.scale.detach().cpu().float() for part in parts]))

    def __getitem__(self, name: str) -> QuantizedTensor:
        shape = self.layout.quantized[name]
        codes, scales = self.layout.place_of[name]
        return QuantizedTensor(self.codes[codes].view(shape), self.scales[scales])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.quantized)

    def __len__(self) -> int:
        return len(self.layout.quantized)


class _Run(NamedTuple):
    """Tensors that lie one after the other and have channels of one length: one matrix."""

    codes: slice
    scales: slice
    length: int
    # Channels of a block, and by block what is added to and where codes become float32.
    height: int
    totals: tuple[Tensor, ...]
    lifted: tuple[Tensor, ...]


class CodesSum:
    """Weighted sum of dequantized codes, in float32, of updates of one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._total = torch.zeros(layout.num_codes)
        self._runs = list(self._cut())

    def add(self, flat: FlatCodes, weight: float) -> None:
        """Add ``weight`` times what the codes stand for."""
        scales = flat.scales * weight
        for run in self._runs:
            blocks = zip(
                flat.codes[run.codes].view(-1, run.length).split(run.height),
                scales[run.scales, None].split(run.height),
                run.totals,
                run.lifted,
                strict=True,
            )
            for codes, steps, total, lifted in blocks:
                total.add_(lifted.copy_(codes).mul_(steps))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sum by tensor, in the memory that is added to."""
        shapes = self.layout.quantized
        return {n: self._total[self.layout.place_of[n][0]].view(s) for n, s in shapes.items()}

    def _cut(self) -> Iterator[_Run]:
        lengths = [length for length, count in self.layout.channels for _ in range(count)]
        scratch = torch.empty(max([_BLOCK, *lengths]))
        code = scale = 0
        for length, run in groupby(lengths):
            count = len(list(run))
            codes, scales = slice(code, code + length * count), slice(scale, scale + count)
            code, scale = codes.stop, scales.stop
            if length:
                height = max(1, _BLOCK // length)
                totals = self._total[codes].view(count, length).split(height)
                lifted = tuple(scratch[: t.numel()].view(t.shape) for t in totals)
                yield _Run(codes, scales, length, height, totals, lifted)
