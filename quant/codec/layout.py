"""An update as one run of values: where each tensor lies in it, and weighted means of such runs.

A network has many tensors, and most are small: a call for each takes as long to start as to run.
So an update stays one run of codes, one of scales and one of floats, as it travels, and is cut into
tensors where they are asked for.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.bits import ALLOWED_WIDTHS, FLOAT_BITS, is_width
from quant.codec.packing import packed_size
from quant.grid import largest_code
from quant.update import QuantizedTensor, Update, UpdateSpec, is_variance

# Before the table: magic, version, width, content, coding, bytes of the table, checksum.
HEADER = struct.Struct("<4sBBBBIQ")
# Encodings of a tensor in the table.
_FLOAT, _CODES = 0, 1
# Values at a time: what is computed from them stays in the cache.
_BLOCK = 1 << 19


@dataclass(frozen=True)
class Layout:
    """Parts of a payload, in its order (`quant.codec.encode`).

    Attributes
    ----------
    bits : int
        Bit-width, 2 to 16 or 32.
    quantized, floats : mapping of str to tuple of int
        Shapes of the tensors that are codes and scales, and of the others.
    """

    bits: int
    quantized: Mapping[str, tuple[int, ...]]
    floats: Mapping[str, tuple[int, ...]]

    @cached_property
    def float_counts(self) -> list[int]:
        """Values of each other tensor."""
        return [math.prod(shape) for shape in self.floats.values()]

    @cached_property
    def num_scales(self) -> int:
        """Channels of all quantized tensors."""
        return sum(count for _, count in self.channels)

    @cached_property
    def num_codes(self) -> int:
        """Codes of all quantized tensors."""
        return sum(length * count for length, count in self.channels)

    @cached_property
    def num_floats(self) -> int:
        """Values of all other tensors."""
        return sum(self.float_counts)

    @cached_property
    def channels(self) -> list[tuple[int, int]]:
        """Codes in a channel of each quantized tensor, and how many channels it has."""
        return [(math.prod(shape[1:]), shape[0]) for shape in self.quantized.values()]

    @cached_property
    def codes_per_scale(self) -> Tensor:
        """How many codes each scale is of, int64."""
        lengths = [length for length, count in self.channels for _ in range(count)]
        return torch.tensor(lengths, dtype=torch.int64)

    @cached_property
    def code_places(self) -> dict[str, tuple[slice, slice]]:
        """Where each quantized tensor's codes and scales are among all codes and all scales."""
        places, code, scale = {}, 0, 0
        for name, (length, count) in zip(self.quantized, self.channels, strict=True):
            codes = slice(code, code + length * count)
            places[name] = codes, slice(scale, scale + count)
            code, scale = codes.stop, scale + count
        return places

    @cached_property
    def float_places(self) -> dict[str, slice]:
        """Where each other tensor's values are among all of them."""
        ends = np.cumsum([0, *self.float_counts]).tolist()
        return {n: slice(*ends[i : i + 2]) for i, n in enumerate(self.floats)}

    @cached_property
    def variances(self) -> list[str]:
        """Which of those hold variances."""
        return [name for name in self.floats if is_variance(name)]

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of the codes, packed."""
        return packed_size(self.num_codes, self.bits) if self.num_codes else 0

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of everything but the codes."""
        return HEADER.size + len(self.table) + 4 * (self.num_scales + self.num_floats)

    @cached_property
    def largest_code(self) -> int:
        """Of the width; 0 for float32."""
        return largest_code(self.bits) if self.bits != FLOAT_BITS else 0

    @cached_property
    def table(self) -> bytes:
        """The payload's table of tensors."""
        return _entries(self.quantized, _CODES) + _entries(self.floats, _FLOAT)


@lru_cache(maxsize=64)
def layout_of(spec: UpdateSpec, bits: int) -> Layout:
    """Return the layout of a model's payloads of width `bits`.

    Raises
    ------
    ValueError
        If that is no bit-width.
    """
    if not is_width(bits):
        raise ValueError(f"bits is {bits}; allowed are {ALLOWED_WIDTHS}")
    return Layout(
        bits,
        {name: spec.shapes[name] for name in spec.quantized(bits)},
        {name: spec.shapes[name] for name in spec.floats(bits)},
    )


def _entries(shapes: Mapping[str, tuple[int, ...]], encoding: int) -> bytes:
    parts = []
    for name, shape in shapes.items():
        encoded = name.encode()
        parts.append(struct.pack("<H", len(encoded)) + encoded)
        parts.append(bytes([encoding, len(shape)]))
        parts.append(struct.pack(f"<{len(shape)}I", *shape))
    return b"".join(parts)


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
    """An update in this form.

    >>> update = quantize_state({"w": torch.tensor([[1.0]]), "b": torch.zeros(2)}, 32)
    >>> FlatUpdate.of(update).floats.flat
    tensor([1., 0., 0.])
    """

    quantized: FlatCodes
    floats: FlatFloats

    @classmethod
    def of(cls, update: Update) -> "FlatUpdate":
        """Return an update in this form, on the CPU; as it is if that is what it is already."""
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
    return torch.cat([t.detach().flatten() for t in tensors]).cpu() if tensors else nothing


class _Matrix(NamedTuple):
    """Tensors that lie one after the other and have channels of one length: one matrix."""

    codes: slice
    scales: slice
    length: int
    # Channels of a block, and by block what is added to and where codes become float32.
    height: int
    totals: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class WeightedMean:
    """Weighted mean of models in float32, summed one at a time in one model's memory.

    The same order of calls gives the same bits.

    Examples
    --------
    >>> mean = WeightedMean()
    >>> mean.add({"bias": torch.tensor([1.0])}, weight=1)
    >>> mean.add({"bias": torch.tensor([4.0])}, weight=2)
    >>> mean.mean()
    {'bias': tensor([3.])}
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        # Of updates, and of what codes their sums were cut for.
        self._layout: Layout | None = None
        self._total = torch.empty(0)
        # Which tensors are codes is the same at all widths below 32 bits.
        self._matrices: list[_Matrix] = []
        self._runs: dict[bool, list[tuple[slice, slice]]] = {}

    def add(self, model: Mapping[str, Tensor], weight: float) -> None:
        """Add a client's float32 tensors."""
        for name, tensor in model.items():
            if name in self._sums:
                self._sums[name].add_(tensor, alpha=weight)
            else:
                self._sums[name] = torch.mul(tensor, weight)
        self._count(weight)

    def add_update(self, update: Update, weight: float) -> None:
        """Add the values of an update of any width, which are never in memory at once."""
        flat = FlatUpdate.of(update)
        sums = self._layout or self._begin(update.spec)
        if has_codes := bool(flat.quantized):
            self._matrices = self._matrices or list(_cut(flat.quantized.layout, sums, self._total))
            self._add_codes(flat.quantized, weight)
        if has_codes not in self._runs:
            places = flat.floats.layout.float_places
            self._runs[has_codes] = _runs([(p, sums.float_places[n]) for n, p in places.items()])
        for source, target in self._runs[has_codes]:
            self._total[target].add_(flat.floats.flat[source], alpha=weight)
        self._count(weight)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean; empty if nothing was added."""
        return {name: tensor / self.weight for name, tensor in self._sums.items()}

    def _count(self, weight: float) -> None:
        self.weight += weight
        self.count += 1

    def _begin(self, spec: UpdateSpec) -> Layout:
        """Make room for the sums of updates, in one run, beside what was summed before."""
        self._layout = layout_of(spec, FLOAT_BITS)
        self._total = torch.zeros(self._layout.num_floats)
        for name, total in FlatFloats(self._layout, self._total).items():
            if name in self._sums:
                total.copy_(self._sums[name])
            self._sums[name] = total
        return self._layout

    def _add_codes(self, flat: FlatCodes, weight: float) -> None:
        scales = flat.scales * weight
        for part in self._matrices:
            blocks = zip(
                flat.codes[part.codes].view(-1, part.length).split(part.height),
                scales[part.scales, None].split(part.height),
                part.totals,
                part.values,
                strict=True,
            )
            for codes, steps, total, values in blocks:
                total.addcmul_(values.copy_(codes), steps)


def _cut(layout: Layout, sums: Layout, total: Tensor) -> Iterator[_Matrix]:
    """Cut the codes into matrices whose sums lie one after the other as they do."""
    scratch = torch.empty(max([_BLOCK, *(length for length, _ in layout.channels)]))
    lengths = {n: c[0] for n, c in zip(layout.quantized, layout.channels, strict=True)}
    for length, names in groupby(layout.quantized, key=lambda name: lengths[name]):
        named = list(names)
        places = [(layout.code_places[n][0], sums.float_places[n]) for n in named]
        scale = layout.code_places[named[0]][1].start
        for codes, target in _runs(places) if length else ():
            count = (codes.stop - codes.start) // length
            height = max(1, _BLOCK // length)
            totals = total[target].view(count, length).split(height)
            values = tuple(scratch[: t.numel()].view(t.shape) for t in totals)
            scales = slice(scale, scale + count)
            scale = scales.stop
            yield _Matrix(codes, scales, length, height, totals, values)


def _runs(places: list[tuple[slice, slice]]) -> list[tuple[slice, slice]]:
    """Join pairs of places that follow one another on both sides."""
    runs: list[tuple[slice, slice]] = []
    for source, target in places:
        if runs and (runs[-1][0].stop, runs[-1][1].stop) == (source.start, target.start):
            last = runs.pop()
            source, target = slice(last[0].start, source.stop), slice(last[1].start, target.stop)
        runs.append((source, target))
    return runs
