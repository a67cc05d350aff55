"""An update as it came, in one run of values: cut into tensors when asked for, summed as one.

A network has many tensors, and most are small: a call for each takes as long to start as to run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from core.bits import FLOAT_BITS
from quant.codec.layout import Layout, layout_of
from quant.update import QuantizedTensor, Update, UpdateSpec

# Values at a time: what is computed from them stays in the cache.
_BLOCK = 1 << 19


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

    def __getitem__(self, name: str) -> QuantizedTensor:
        codes, scales = self.layout.code_places[name]
        shape = self.layout.quantized[name]
        return QuantizedTensor(self.codes[codes].view(shape), self.scales[scales])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.quantized)

    def __len__(self) -> int:
        return len(self.layout.quantized)


class FlatFloats(Mapping[str, Tensor]):
    """The float32 tensors of an update in one run.

    Parameters
    ----------
    layout : Layout
        Which tensors they are of.
    flat : Tensor
        float32 ``[layout.num_floats]``.
    """

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        self.layout, self.flat = layout, flat

    def __getitem__(self, name: str) -> Tensor:
        return self.flat[self.layout.float_places[name]].view(self.layout.floats[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.floats)

    def __len__(self) -> int:
        return len(self.layout.floats)


@dataclass(frozen=True)
class FlatUpdate(Update):
    """An update in this form."""

    quantized: FlatCodes
    floats: FlatFloats

    @classmethod
    def of(cls, update: Update) -> "FlatUpdate":
        """Return an update in this form, on the CPU; as it is if that is what it is already."""
        joined = cls.joined(update)
        codes, floats = joined.quantized, joined.floats
        if codes.codes.is_cpu and codes.scales.is_cpu and floats.flat.is_cpu:
            return joined
        quantized = FlatCodes(codes.layout, codes.codes.cpu(), codes.scales.cpu())
        values = FlatFloats(floats.layout, floats.flat.cpu())
        return replace(joined, quantized=quantized, floats=values)

    @classmethod
    def joined(cls, update: Update) -> "FlatUpdate":
        """Return an update in this form, on the device that holds all of it."""
        if isinstance(update, cls):
            return update
        layout = layout_of(update.spec, update.bits)
        parts = [update.quantized[name] for name in layout.quantized]
        codes = _joined([part.codes for part in parts], torch.empty(0, dtype=torch.int8))
        scales = _joined([part.scale.float() for part in parts], torch.empty(0))
        floats = _joined([update.floats[name].float() for name in layout.floats], torch.empty(0))
        tensors = FlatCodes(layout, codes, scales), FlatFloats(layout, floats)
        return cls(update.bits, update.content, *tensors)


def _joined(tensors: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]) if tensors else nothing


class _Matrix(NamedTuple):
    """Tensors that lie one after the other and have channels of one length: one matrix."""

    codes: slice
    scales: slice
    length: int
    # Channels of a block, and by block what is added to and where codes become float32.
    height: int
    totals: tuple[Tensor, ...]
    lifted: tuple[Tensor, ...]


class UpdateSum:
    """Weighted sum of updates of any widths of one model, in float32.

    Parameters
    ----------
    spec : UpdateSpec
        The model's tensors.
    """

    def __init__(self, spec: UpdateSpec) -> None:
        self._sums = layout_of(spec, FLOAT_BITS)
        self._total = torch.zeros(self._sums.num_floats)
        # Which tensors are codes is the same at all widths below 32 bits.
        self._matrices: list[_Matrix] = []
        self._runs: dict[bool, list[tuple[slice, slice]]] = {}

    def add(self, update: Update, weight: float) -> None:
        """Add ``weight`` times the values of an update, which are never in memory at once."""
        flat = FlatUpdate.of(update)
        if flat.quantized:
            self._add_codes(flat.quantized, weight)
        has_codes = bool(flat.quantized)
        if has_codes not in self._runs:
            places = flat.floats.layout.float_places
            self._runs[has_codes] = _runs(
                [(p, self._sums.float_places[n]) for n, p in places.items()]
            )
        for source, target in self._runs[has_codes]:
            self._total[target].add_(flat.floats.flat[source], alpha=weight)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the sum by tensor, in the memory that is added to."""
        return FlatFloats(self._sums, self._total)

    def _add_codes(self, flat: FlatCodes, weight: float) -> None:
        self._matrices = self._matrices or list(self._cut(flat.layout))
        scales = flat.scales * weight
        for part in self._matrices:
            blocks = zip(
                flat.codes[part.codes].view(-1, part.length).split(part.height),
                scales[part.scales, None].split(part.height),
                part.totals,
                part.lifted,
                strict=True,
            )
            for codes, steps, total, lifted in blocks:
                total.addcmul_(lifted.copy_(codes), steps)

    def _cut(self, layout: Layout) -> Iterator[_Matrix]:
        """Cut the codes into matrices whose sums lie one after the other as they do."""
        scratch = torch.empty(max([_BLOCK, *(length for length, _ in layout.channels)]))
        lengths = {n: c[0] for n, c in zip(layout.quantized, layout.channels, strict=True)}
        for length, names in groupby(layout.quantized, key=lambda name: lengths[name]):
            named = list(names)
            places = [(layout.code_places[n][0], self._sums.float_places[n]) for n in named]
            scale = layout.code_places[named[0]][1].start
            for codes, target in _runs(places) if length else ():
                count = (codes.stop - codes.start) // length
                height = max(1, _BLOCK // length)
                totals = self._total[target].view(count, length).split(height)
                lifted = tuple(scratch[: t.numel()].view(t.shape) for t in totals)
                scales = slice(scale, scale + count)
                scale = scales.stop
                yield _Matrix(codes, scales, length, height, totals, lifted)


def _runs(places: list[tuple[slice, slice]]) -> list[tuple[slice, slice]]:
    """Join pairs of places that follow one another on both sides."""
    runs: list[tuple[slice, slice]] = []
    for source, target in places:
        if runs and (runs[-1][0].stop, runs[-1][1].stop) == (source.start, target.start):
            last = runs.pop()
            source, target = slice(last[0].start, source.stop), slice(last[1].start, target.stop)
        runs.append((source, target))
    return runs
