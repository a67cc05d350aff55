"""Bit-packing: signed codes of any width to bytes and back, without a wasted bit.

The codes are taken in blocks. A block of ``n`` codes is cut into ``g = 8 / gcd(8, k)`` contiguous
slices; the ``i``-th codes of all slices make one word of ``g * k`` bits, whose bytes go to
``g * k / 8`` contiguous planes. Every access runs over contiguous memory, which is what makes
packing in NumPy nearly as fast as copying. Widths above 8 keep their low bytes as one raw plane
and pack the remaining ``k - 8`` bits the same way.

Codes are stored with an offset of ``2**(k-1)``. The pattern 0, which would stand for a code below
the symmetric grid, never occurs, and `unpack` refuses it, as it refuses padding that is not zero.
"""

from math import gcd

import numpy as np

from quant.grid import check_bits, largest_code

_BLOCK = 1 << 18  # codes at a time: the working set stays in the cache


class PackingError(ValueError):
    """Packed bytes that `pack` cannot have written."""


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes of width `bits` take.

    This is ``count * bits / 8`` plus at most `bits` bytes of padding.
    """
    full, rest = divmod(count, _BLOCK)
    return full * _BLOCK * check_bits(bits) // 8 + _block_size(rest, bits)


def pack(codes: np.ndarray, bits: int) -> memoryview:
    """Pack signed codes into bytes.

    Parameters
    ----------
    codes : ndarray
        Integer array of any shape, taken in C order; entries within the grid of `bits`.
    bits : int
        Bit-width, 2 to 16.

    Returns
    -------
    memoryview
        `packed_size(codes.size, bits)` bytes, of their own; ``bytes(...)`` copies them.

    Raises
    ------
    ValueError
        If a code lies off the grid, the array does not hold integers, or `bits` is not 2 to 16.
    """
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes have dtype {codes.dtype}; allowed are integers")
    flat, limit = np.ascontiguousarray(codes).reshape(-1), largest_code(bits)
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    off_grid = f"codes of width {bits} must lie in [{-limit}, {limit}]"
    if flat.dtype.kind == "u" and flat.size and flat.max() > limit:
        raise ValueError(off_grid)
    if flat.itemsize == 1 and bits > 8:
        flat = flat.astype(np.int16)
    flat = flat.view(f"u{flat.itemsize}")
    out = np.empty(packed_size(flat.size, bits), np.uint8)
    position = 0
    for start in range(0, flat.size, _BLOCK):
        # Wrap-around is wanted: what lies far below the grid becomes too large.
        words = flat[start : start + _BLOCK] + flat.dtype.type(limit + 1)
        if words.min() == 0 or words.max() > 2 * limit + 1:
            raise ValueError(off_grid)
        size = _block_size(words.size, bits)
        narrow = words.astype(np.uint8 if bits <= 8 else np.uint16, copy=False)
        _pack_block(narrow, bits, out[position : position + size])
        position += size
    return out.data


def unpack(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """Unpack what `pack` wrote.

    Parameters
    ----------
    data : bytes or memoryview
        Exactly ``packed_size(count, bits)`` bytes.
    bits : int
        Bit-width, 2 to 16.
    count : int
        Number of codes.

    Returns
    -------
    ndarray
        Codes ``[count]``; int8 up to 8 bits, int16 above.

    Raises
    ------
    PackingError
        If the length is wrong, a code lies off the symmetric grid or padding is not zero.
    """
    size = packed_size(count, bits)
    if len(data) != size:
        raise PackingError(f"{count} codes of {bits} bits take {size} bytes; got {len(data)}")
    source = np.frombuffer(data, np.uint8)
    codes = np.empty(count, np.int8 if bits <= 8 else np.int16)
    position = 0
    for start in range(0, count, _BLOCK):
        block = codes[start : start + _BLOCK]
        taken = _block_size(block.size, bits)
        words = _unpack_block(source[position : position + taken], bits, block.size)
        if block.size and words.min() == 0:
            raise PackingError(f"a code lies below the symmetric grid of width {bits}")
        offset = words.dtype.type(1 << (bits - 1))
        np.subtract(words, offset, out=block.view(words.dtype))
        position += taken
    return codes


def _slices(bits: int) -> int:
    return 8 // gcd(8, bits)


def _block_size(count: int, bits: int) -> int:
    if bits > 8:
        return count + (_block_size(count, bits - 8))
    slices = _slices(bits)
    return -(-count // slices) * slices * bits // 8


def _pack_block(words: np.ndarray, bits: int, out: np.ndarray) -> None:
    if bits > 8:
        np.copyto(out[: words.size], words, casting="unsafe")
        words >>= np.uint16(8)
        _pack_block(words, bits - 8, out[words.size :])
        return
    if bits == 8:
        np.copyto(out, words, casting="unsafe")
        return
    words = words.astype(np.uint8, copy=False)
    slices = _slices(bits)
    length = -(-words.size // slices)
    if words.size != slices * length:
        words = np.concatenate([words, np.zeros(slices * length - words.size, np.uint8)])
    lanes = _lanes(length)
    parts, planes = words.reshape(slices, length).view(lanes), out.reshape(-1, length).view(lanes)
    spare = np.empty_like(parts[0])
    for index, part in enumerate(parts):
        plane, shift = divmod(index * bits, 8)
        stay = min(bits, 8 - shift)
        if shift == 0:
            planes[plane] = part
        else:
            mask = _in_all_bytes(stay, lanes)
            low = np.bitwise_and(part, mask, out=spare) if stay < bits else part
            planes[plane] |= np.left_shift(low, lanes(shift), out=spare)
        if stay < bits:
            np.right_shift(part, lanes(stay), out=planes[plane + 1])
            planes[plane + 1] &= _in_all_bytes(bits - stay, lanes)


def _unpack_block(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    if bits > 8:
        wide = _unpack_block(data[count:], bits - 8, count).astype(np.uint16)
        wide <<= np.uint16(8)
        wide |= data[:count]
        return wide
    if bits == 8:
        return data
    slices = _slices(bits)
    length = -(-count // slices)
    lanes = _lanes(length)
    # A copy: a payload's bytes do not begin where eight at a time are fast.
    planes = data.copy().reshape(-1, length).view(lanes)
    parts = np.empty((slices, length), np.uint8).view(lanes)
    spare = np.empty_like(planes[0])
    for index, part in enumerate(parts):
        plane, shift = divmod(index * bits, 8)
        stay = min(bits, 8 - shift)
        low = np.right_shift(planes[plane], lanes(shift), out=part) if shift else planes[plane]
        np.bitwise_and(low, _in_all_bytes(stay, lanes), out=part)
        if stay < bits:
            np.bitwise_and(planes[plane + 1], _in_all_bytes(bits - stay, lanes), out=spare)
            part |= np.left_shift(spare, lanes(stay), out=spare)
    words = parts.view(np.uint8).reshape(-1)
    if words[count:].any():
        raise PackingError("padding after the last code is not zero")
    return words[:count]


def _lanes(length: int) -> type[np.unsignedinteger]:
    """Type to compute with: eight bytes at a time where the length allows it."""
    return np.uint64 if length % 8 == 0 else np.uint8


def _in_all_bytes(bits: int, lanes: type[np.unsignedinteger]) -> np.unsignedinteger:
    """Return a mask of the low `bits` bits of every byte."""
    mask = (1 << bits) - 1
    return lanes(mask * 0x0101010101010101) if lanes is np.uint64 else lanes(mask)
