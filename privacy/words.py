"""Integers modulo ``2**m`` as unsigned words, and their bits as bytes without a wasted one.

The words of a part are taken 8 at a time as far as they go: the low bytes of all of them are one
plane each, as they are, and the bits that remain go through `quant.codec.packing`. The last few
words, up to 7, follow as one little-endian integer. So `count` words take ``ceil(count * m / 8)``
bytes for every m.
"""

from collections.abc import Iterator

import numpy as np

from privacy.errors import MessageError
from quant.codec.packing import PackingError, block_places, pack_words, unpack_words, words_size

MOST_BITS = 62


def check_width(bits: int) -> int:
    """Return a number of bits that words may have, 1 to 62.

    Raises
    ------
    ValueError
        If it is another.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"words of {bits} bits; allowed are 1 to {MOST_BITS}")
    return int(bits)


def word_type(bits: int) -> np.dtype[np.unsignedinteger]:
    """Return the words that integers modulo ``2**bits`` are computed with, little-endian."""
    size = next(size for size in (1, 2, 4, 8) if 8 * size >= check_width(bits))
    return np.dtype(f"<u{size}")


def largest_word(bits: int) -> np.unsignedinteger:
    """Return ``2**bits - 1`` as a word."""
    return word_type(bits).type((1 << bits) - 1)


def to_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Return signed integers modulo ``2**bits``, in memory of their own.

    Raises
    ------
    ValueError
        If these are not integers in ``[-2**(bits-1), 2**(bits-1))``.

    Examples
    --------
    >>> to_words(np.array([3, -1]), bits=4)
    array([ 3, 15], dtype=uint8)
    """
    flat, half = np.asarray(values).reshape(-1), 1 << (check_width(bits) - 1)
    if flat.dtype.kind not in "iu":
        raise ValueError(f"values have dtype {flat.dtype}; allowed are integers")
    if flat.size and not (-half <= int(flat.min()) and int(flat.max()) < half):
        raise ValueError(f"a value lies outside of {bits} bits; allowed are [{-half}, {half - 1}]")
    words = flat.astype(word_type(bits))
    words &= largest_word(bits)
    return words


def to_signed(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the signed integers that words stand for; bits above the lowest `bits` are ignored.

    Examples
    --------
    >>> to_signed(np.array([3, 15], np.uint8), bits=4)
    array([ 3, -1])
    """
    values = words.astype(np.int64)
    values <<= 64 - bits
    values >>= 64 - bits
    return values


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` words of `bits` bits take.

    Examples
    --------
    >>> packed_size(1001, bits=9)
    1127
    """
    return -(-count * bits // 8)


def pack(words: np.ndarray, bits: int) -> bytes:
    """Pack the lowest `bits` bits of each word.

    Parameters
    ----------
    words : ndarray
        Of `word_type`.
    bits : int
        1 to 62.

    Returns
    -------
    bytes
        ``packed_size(words.size, bits)`` of them.
    """
    even = words.size - words.size % 8
    planes, rest = divmod(bits, 8)
    pieces = [plane.tobytes() for plane in _bytes_of(words[:even])[:planes]]
    if rest:
        mask = np.uint8((1 << rest) - 1)
        high = _bytes_of(words[:even])[planes]
        blocks = (high[place] & mask for place in block_places(even))
        pieces.append(bytes(pack_words(blocks, rest, even)))
    last = sum(
        (int(word) & ((1 << bits) - 1)) << (bits * place) for place, word in enumerate(words[even:])
    )
    pieces.append(last.to_bytes(packed_size(words.size - even, bits), "little"))
    return b"".join(pieces)


def unpack(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """Unpack what `pack` wrote.

    Raises
    ------
    MessageError
        If the length is wrong or the bits after the last word are not zero.

    Examples
    --------
    >>> unpack(pack(np.array([3, 511], np.uint16), bits=9), bits=9, count=2)
    array([  3, 511], dtype=uint16)
    """
    size = packed_size(count, bits)
    if len(data) != size:
        raise MessageError(f"{count} words of {bits} bits have {len(data)} bytes; allowed: {size}")
    view, even = memoryview(data), count - count % 8
    planes, rest = divmod(bits, 8)
    words = np.zeros(count, word_type(bits))
    of_words = _bytes_of(words[:even])
    for index in range(planes):
        of_words[index][:] = np.frombuffer(view[index * even : (index + 1) * even], np.uint8)
    place = planes * even
    if rest:
        end = place + words_size(even, rest)
        for block, high in _unpacked(view[place:end], rest, even):
            of_words[planes][block] = high
        place = end
    last = int.from_bytes(view[place:], "little")
    if last >> (bits * (count - even)):
        raise MessageError(f"the bits after {count} words of {bits} bits are not zero")
    for index in range(even, count):
        words[index] = last & ((1 << bits) - 1)
        last >>= bits
    return words


def _bytes_of(words: np.ndarray) -> np.ndarray:
    """Return the bytes of words, the lowest of all words first: a view, one row a byte."""
    return words.view(np.uint8).reshape(-1, words.itemsize).T


def _unpacked(data: memoryview, bits: int, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    try:
        yield from unpack_words(data, bits, count)
    except PackingError as error:  # Never, as a multiple of 8 words has no padding.
        raise MessageError(str(error)) from None
