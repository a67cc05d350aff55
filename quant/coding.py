"""Lossless entropy coding of codes: by themselves, or as steps from codes that both sides know.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences say the same in fewer
bits. Codes and differences are taken modulo ``2**bits``, as words of so many bits with an offset,
and coded by Huffman's method over whole bytes: a byte holds as many words of 2 or 4 bits as fit, or
one of up to 8. Of longer ones it holds the high 8 bits, where all is that can be gained; the low
ones, which are as good as noise, lie behind in a plane of their own. This is a Zstandard frame (RFC
8878), which is read several times faster than DEFLATE.
"""

from collections.abc import Iterator

import numpy as np
import zstandard

from quant.packing import (
    PackingError,
    block_places,
    pack_words,
    packed_size,
    unpack_words,
    word_type,
)

_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS
# Of the search for repetitions the least that can be asked for: codes have none.
_LEAST = {"window_log": 17, "hash_log": 6, "chain_log": 6, "search_log": 1, "min_match": 7}
_UNWEIGHED = {"strategy": zstandard.STRATEGY_FAST, "target_length": 0}
# Differences repeat runs of zeros. Which of them are worth a reference is weighed, as one that
# saves little is also slow to read.
_WEIGHED = {"strategy": zstandard.STRATEGY_BTOPT, "target_length": 32}


def compress_codes(codes: np.ndarray, bits: int, start: np.ndarray | None = None) -> bytes:
    """Code codes, or their differences from `start`.

    Parameters
    ----------
    codes, start : ndarray
        Integers ``[count]`` on the grid of `bits`.
    bits : int
        Bit-width, 2 to 16.
    """
    narrow = word_type(bits)
    words = codes.astype(narrow)
    words += narrow(1 << (bits - 1))
    if start is not None:
        words -= start.astype(narrow)
    words &= narrow((1 << bits) - 1)
    search = _UNWEIGHED if start is None else _WEIGHED
    parameters = zstandard.ZstdCompressionParameters(format=_FORMAT, **_LEAST, **search)
    coder = zstandard.ZstdCompressor(compression_params=parameters)
    stream = coder.compressobj(_size(codes.size, bits))
    parts: list[bytes] = []
    for plane in _planes(words, bits):
        # Each has tables of its own.
        parts += stream.compress(plane), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return b"".join([*parts, stream.flush()])


def unfold_codes(data: bytes | memoryview, bits: int, count: int) -> bytes:
    """Undo the entropy coding of `compress_codes`; no more than the size of `count` codes unfolds.

    Returns
    -------
    bytes
        What `read_codes` reads.

    Raises
    ------
    PackingError
        If the data is not the size of `count` codes, or does not end with them.
    """
    try:
        claimed = zstandard.get_frame_parameters(data, format=_FORMAT).content_size
        if claimed != _size(count, bits):
            raise PackingError(f"the coded codes are not those of {count} weights")
        return zstandard.ZstdDecompressor(format=_FORMAT).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PackingError(f"the coded codes cannot be read: {error}") from None


def read_codes(
    unfolded: bytes | memoryview, bits: int, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Read the codes that `unfold_codes` unfolded, or their differences from `start`.

    Returns
    -------
    ndarray
        Codes ``[count]``; int8 up to 8 bits, int16 above.

    Raises
    ------
    PackingError
        If they are not on the grid of `bits`.
    """
    codes = np.empty(count, np.int8 if bits <= 8 else np.int16)
    narrow = word_type(bits)
    middle, mask = narrow(1 << (bits - 1)), narrow((1 << bits) - 1)
    has_room = _high_width(bits) + _low_width(bits) > bits
    for place, words in _words(unfolded, bits, count):
        block = codes[place].view(narrow)
        off_grid = has_room and words.max() > mask
        if start is not None:
            known = start[place].astype(codes.dtype, copy=False).view(narrow)
            words = np.add(words, known, out=block)
            words &= mask
        if off_grid or words.min() == 0:
            raise PackingError(f"a code lies off the grid of width {bits}")
        np.subtract(words, middle, out=block)
    return codes


def _planes(words: np.ndarray, bits: int) -> Iterator[memoryview]:
    """Yield the planes of words ``[count]``, high bits first."""
    places, low = list(block_places(words.size)), _low_width(bits)
    yield pack_words((words[p] >> low for p in places), _high_width(bits), words.size)
    if low:
        mask = (1 << low) - 1
        yield pack_words((words[p] & mask for p in places), low, words.size)


def _words(
    unfolded: bytes | memoryview, bits: int, count: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Undo `_planes`, as `unpack_words` does."""
    low, view = _low_width(bits), memoryview(unfolded)
    size = packed_size(count, _high_width(bits))
    above = unpack_words(view[:size], _high_width(bits), count)
    if not low:
        yield from above
        return
    for (place, words), (_, rest) in zip(above, unpack_words(view[size:], low, count), strict=True):
        wide = words.astype(word_type(bits))
        # A shift of integers this short takes NumPy longer.
        wide *= wide.dtype.type(1 << low)
        wide |= rest
        yield place, wide


def _size(count: int, bits: int) -> int:
    return packed_size(count, _high_width(bits)) + packed_size(count, _low_width(bits))


def _high_width(bits: int) -> int:
    """Width at which words, or their high bits, do not straddle bytes."""
    return next(width for width in (2, 4, 8) if width >= bits or width == 8)


def _low_width(bits: int) -> int:
    return max(0, bits - 8)
