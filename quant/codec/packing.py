"""Bit-packing: signed codes of any width to bytes and back, without a wasted bit.

The codes are taken in blocks. A block of ``n`` codes is cut into ``g = 8 / gcd(8, k)`` contiguous
slices; the ``i``-th codes of all slices make one word of ``g * k`` bits, whose bytes go to
``g * k / 8`` contiguous planes. Every access runs over contiguous memory, which is what makes
packing in NumPy nearly as fast as copying. Widths above 8 keep their low bytes as one raw plane
and pack the remaining ``k - 8`` bits the same way.

Codes of 8 and 16 bits are stored as the integers that they are, others with an offset of
``2**(k-1)``, which is taken away in one pass where extending a sign would take two. The pattern of
``-2**(k-1)``, a code below the symmetric grid, never occurs, and `unpack` rejects it, as it rejects
padding that is not zero.
"""

from collections.abc import Iterable, Iterator
from math import gcd

import numpy as np

from core.bits import check_bits
from quant.grid import largest_code

BLOCK = 1 << 19  # codes at a time: the working set stays in the cache


class PackingError(ValueError):
    """Packed bytes that `pack` cannot have written."""


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes of width `bits`, 2 to 16, take.

    This is ``count * bits / 8`` plus at most `bits` bytes of padding.

    Raises
    ------
    ValueError
        If `bits` is not 2 to 16.

    Examples
    --------
    >>> packed_size(1000, bits=4)
    500
    """
    return words_size(count, check_bits(bits))


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

    Examples
    --------
    >>> bytes(pack(np.array([3, -1, 0, 1]), bits=4))
    b'\x8b\x97'
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes have dtype {codes.dtype}; allowed are integers")
    flat, limit = np.ascontiguousarray(codes).reshape(-1), largest_code(bits)
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    narrow, offset = word_type(bits), offset_of(bits)

    def words() -> Iterator[np.ndarray]:
        for place in block_places(flat.size):
            block = flat[place]
            if block.min() < -limit or block.max() > limit:
                raise off_grid(bits)
            same_size = block.itemsize == narrow().itemsize
            own = block.view(narrow) if same_size else block.astype(narrow)
            yield own + offset if offset else own

    return pack_words(words(), bits, flat.size)


def unpack(data: bytes | memoryview | np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack what `pack` wrote.

    Parameters
    ----------
    data : bytes, memoryview, or ndarray of uint8
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

    Examples
    --------
    >>> unpack(pack(np.array([3, -1, 0, 1]), bits=4), bits=4, count=4)
    array([ 3, -1,  0,  1], dtype=int8)
    """
    codes, limit = np.empty(count, np.int8 if bits <= 8 else np.int16), largest_code(bits)
    for place, words in unpack_words(data, bits, count):
        block = codes[place]
        np.subtract(words, offset_of(bits), out=block.view(words.dtype))
        if block.min() < -limit:
            raise PackingError(f"a code lies below the symmetric grid of width {bits}")
    return codes


def off_grid(bits: int) -> ValueError:
    """Return the error of codes that a width does not have."""
    limit = largest_code(bits)
    return ValueError(f"codes of width {bits} must lie in [{-limit}, {limit}]")


def word_type(bits: int) -> type[np.unsignedinteger]:
    """Return the unsigned integers that words of a width are computed with."""
    return np.uint8 if bits <= 8 else np.uint16


def offset_of(bits: int) -> np.unsignedinteger:
    """Return what is added to a code to make a word of it, modulo the type of the words."""
    return word_type(bits)(0 if bits % 8 == 0 else 1 << (bits - 1))


def block_places(count: int) -> Iterator[slice]:
    """Yield where the blocks are that so many words are packed in, one after the other."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def slices_of(bits: int) -> int:
    """Return how many slices a block of words of up to 8 bits is cut into."""
    return 8 // gcd(8, bits)


def words_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` words of `bits` bits, 0 to 16, take."""
    full, rest = divmod(count, BLOCK)
    return full * BLOCK * bits // 8 + _block_size(rest, bits)


def pack_words(blocks: Iterable[np.ndarray], bits: int, count: int) -> memoryview:
    """Pack words of any pattern.

    Parameters
    ----------
    blocks : iterable of ndarray
        Unsigned integers of `word_type` or wider, below ``2**bits``, those of each of
        `block_places`.
    bits : int
        Bits of a word, 1 to 16.
    count : int
        Number of words in all.

    Returns
    -------
    memoryview
        As of `pack`.
    """
    out = np.empty(words_size(count, bits), np.uint8)
    position = 0
    for words in blocks:
        size = _block_size(words.size, bits)
        _pack_block(words, bits, out[position : position + size])
        position += size
    return out.data


def unpack_words(
    data: bytes | memoryview | np.ndarray, bits: int, count: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Unpack what `pack_words` wrote.

    Parameters
    ----------
    data : bytes, memoryview, or ndarray of uint8
        Exactly ``words_size(count, bits)`` bytes.
    bits : int
        Bits of a word, 1 to 16.
    count : int
        Number of words.

    Yields
    ------
    tuple of slice and ndarray
        Each of `block_places`, and the words there, to be read only.

    Raises
    ------
    PackingError
        If the length is wrong or padding is not zero.
    """
    size = words_size(count, bits)
    if len(data) != size:
        raise PackingError(f"{count} codes of {bits} bits take {size} bytes; got {len(data)}")
    source = np.frombuffer(data, np.uint8)
    position = 0
    for place in block_places(count):
        length = place.stop - place.start
        taken = _block_size(length, bits)
        yield place, _unpack_block(source[position : position + taken], bits, length)
        position += taken


def _block_size(count: int, bits: int) -> int:
    if bits > 8:
        return count + _block_size(count, bits - 8)
    slices = slices_of(bits)
    return -(-count // slices) * slices * bits // 8


def _pack_block(words: np.ndarray, bits: int, out: np.ndarray) -> None:
    if bits > 8:
        np.copyto(out[: words.size], words, casting="unsafe")
        _pack_block(words >> np.uint16(8), bits - 8, out[words.size :])
        return
    if bits == 8:
        np.copyto(out, words, casting="unsafe")
        return
    words = words.astype(np.uint8, copy=False)
    slices = slices_of(bits)
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
    slices = slices_of(bits)
    length = -(-count // slices)
    lanes = _lanes(length)
    if data.ctypes.data % 8:
        # Eight at a time are fast where they begin at a multiple of eight.
        data = data.copy()
    planes = data.reshape(-1, length).view(lanes)
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
