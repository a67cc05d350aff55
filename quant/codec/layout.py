"""Where everything stands in the payload of a model at a bit-width: known before it comes."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from quant.codec.packing import packed_size
from quant.update import UpdateSpec, is_statistic, is_variance

# Encodings of a tensor in the table.
FLOAT, CODES = 0, 1


@dataclass(frozen=True)
class Layout:
    """Parts of a payload, in its order (`quant.codec.wire`).

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
    def codes_per_scale(self) -> np.ndarray:
        """Codes in the channel of each scale, float64 ``[num_scales]``."""
        lengths = np.array([length for length, _ in self.channels], np.float64)
        return np.repeat(lengths, [count for _, count in self.channels])

    @cached_property
    def kinds_of_floats(self) -> tuple[np.ndarray, np.ndarray]:
        """Where parameters and BatchNorm's statistics take turns among the floats.

        Returns
        -------
        tuple of ndarray
            Where each stretch of one kind begins, and whether it is one of statistics.
        """
        kinds = np.array([is_statistic(name) for name in self.floats], bool)
        kinds = np.repeat(kinds, self.float_counts)
        starts = np.flatnonzero(np.diff(kinds, prepend=~kinds[:1]))
        return starts, kinds[starts]

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of the codes, packed."""
        return packed_size(self.num_codes, self.bits) if self.num_codes else 0

    @cached_property
    def table(self) -> bytes:
        """The payload's table of tensors."""
        return _entries(self.quantized, CODES) + _entries(self.floats, FLOAT)


@lru_cache(maxsize=64)
def layout_of(spec: UpdateSpec, bits: int) -> Layout:
    """Return the layout of a model's payloads of width `bits`."""
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
