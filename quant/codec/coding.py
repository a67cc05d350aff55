"""Lossless entropy coding of codes: by themselves, or as differences from known codes.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences hold the same in fewer
bits. Codes and differences are taken modulo ``2**bits``, as words of so many bits
(`quant.codec.packing`), and coded by Huffman's method over whole bytes: a byte holds as many words
of 2 or 4 bits as fit, or one of up to 8. Of longer ones it holds the high 8 bits, rounded: they are
all alike where all words are small. The low bits, otherwise as good as noise, lie behind in a plane
of their own. This is a Zstandard frame (RFC 8878), which is read several times faster than
DEFLATE.
"""

from collections.abc import Iterator

import numpy as np
import zstandard

from quant.codec.packing import (
    PackingError,
    block_places,
    offset_of,
    pack_words,
    unpack_words,
    word_type,
    words_size,
)
from quant.grid import largest_code

_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS
# A table of Huffman's is made for so many bytes, as a block is no longer than the window.
_WINDOW = {"window_log": 17}
# As little search for repetitions as can be asked for: codes have none.
_SEARCH = {"hash_log": 6, "chain_log": 6, "search_log": 1, "min_match": 7}
_UNWEIGHED = {"strategy": zstandard.STRATEGY_FAST}
# Differences repeat runs of zeros. Which of them are worth a reference is weighed, as one that
# saves little is also slow to read.
_WEIGHED = {"strategy": zstandard.STRATEGY_BTOPT, "target_length": 32}

# Of a frame's descriptor: a dictionary, a checksum, or a bit without a meaning.
_MORE_THAN_CODES = 0b11111


def compress_codes(codes: np.ndarray, bits: int, start: np.ndarray | None = None) -> bytes:
    """Code codes, or their differences from `start`.

    Parameters
    ----------
    codes, start : ndarray
        Integers ``[count]`` on the grid of `bits`.
    bits : int
        Bit-width, 2 to 16.

    Returns
    -------
    bytes
        What `decompress` reads.
    """
    weighing = _UNWEIGHED if start is None else _WEIGHED
    parameters = zstandard.ZstdCompressionParameters(
        format=_FORMAT, **_WINDOW, **_SEARCH, **weighing
    )
    coder = zstandard.ZstdCompressor(compression_params=parameters)
    stream = coder.compressobj(_size(codes.size, bits))
    high, *low = _planes(codes, bits, start)
    parts = [stream.compress(high)]
    for plane in low:
        # With tables of its own.
        parts += stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK), stream.compress(plane)
    return b"".join([*parts, stream.flush()])


def decompress(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """Undo the entropy coding of `compress_codes`, of no more bytes than `count` codes take.

    Parameters
    ----------
    data : bytes or memoryview
        What was coded.
    bits : int
        Bit-width, 2 to 16.
    count : int
        Number of codes.

    Returns
    -------
    ndarray
        What `read_codes` reads, uint8.

    Raises
    ------
    PackingError
        If the data is not one frame, of the size of `count` codes and with nothing beside them.
    """
    try:
        frame = zstandard.get_frame_parameters(data, format=_FORMAT)
        if frame.content_size != _size(count, bits) or data[0] & _MORE_THAN_CODES:
            raise PackingError(f"the coded codes are not those of {count} weights")
        whole = zstandard.ZstdDecompressor(format=_FORMAT).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PackingError(f"the coded codes cannot be read: {error}") from None
    return np.frombuffer(whole, np.uint8)


def read_codes(
    data: np.ndarray, bits: int, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Read the codes of what `decompress` returned, or their differences from `start`.

    Parameters
    ----------
    data : ndarray
        uint8, contiguous.
    bits : int
        Bit-width, 2 to 16.
    count : int
        Number of codes.
    start : ndarray, optional
        Codes ``[count]`` that differences were taken from.

    Returns
    -------
    ndarray
        Codes ``[count]``; int8 up to 8 bits, int16 above.

    Raises
    ------
    PackingError
        If they are not so many, or not on the grid of `bits`.
    """
    if bits == 8:
        return _read_bytes(data, count, start)
    codes = np.empty(count, np.int8 if bits < 8 else np.int16)
    narrow, limit = word_type(bits), largest_code(bits)
    mask = narrow((1 << bits) - 1)
    has_room = sum(_cut(bits)) > bits
    for place, words in _joined(data, bits, count):
        block = codes[place]
        off_grid = has_room and words.max() > mask
        if start is not None:
            known = start[place].astype(codes.dtype, copy=False).view(narrow)
            words = np.add(words, known, out=block.view(narrow))
            if bits < 16:
                words &= mask
        np.subtract(words, offset_of(bits), out=block.view(narrow))
        if off_grid or block.min() < -limit:
            raise PackingError(f"a code lies off the grid of width {bits}")
    return codes


def _read_bytes(data: np.ndarray, count: int, start: np.ndarray | None) -> np.ndarray:
    """Read codes of 8 bits, which are their own words."""
    codes = data.view(np.int8)
    if codes.size != count:
        raise PackingError(f"{count} codes of 8 bits take {count} bytes; got {codes.size}")
    codes = codes.copy() if start is None else np.add(codes, start, dtype=np.int8, casting="unsafe")
    if count and codes.min() < -largest_code(8):
        raise PackingError("a code lies off the grid of width 8")
    return codes


def _planes(codes: np.ndarray, bits: int, start: np.ndarray | None) -> Iterator[memoryview]:
    """Yield the planes of the words, high bits first."""
    high, low = _cut(bits)
    yield pack_words((w >> low if low else w for w in _words(codes, bits, start)), high, codes.size)
    if low:
        mask = (1 << low) - 1
        yield pack_words((w & mask for w in _words(codes, bits, start)), low, codes.size)


def _words(codes: np.ndarray, bits: int, start: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the words of each block, larger by what rounds them when they are cut."""
    narrow, (_, low) = word_type(bits), _cut(bits)
    offset, mask = offset_of(bits) + narrow(_half(low)), narrow((1 << bits) - 1)
    for place in block_places(codes.size):
        words = codes[place].astype(narrow)
        words += offset
        if start is not None:
            words -= start[place].astype(narrow)
        words &= mask
        yield words


def _joined(data: np.ndarray, bits: int, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Undo `_planes`, as `unpack_words` does."""
    high, low = _cut(bits)
    if not low:
        yield from unpack_words(data, high, count)
        return
    half, mask = np.uint16(_half(low)), np.uint16((1 << bits) - 1)
    planes = unpack_words(data[:count], high, count), unpack_words(data[count:], low, count)
    for (place, above), (_, below) in zip(*planes, strict=True):
        # A shift of integers this short takes NumPy longer.
        words = np.multiply(above, 1 << low, dtype=np.uint16)
        words |= below
        words -= half
        words &= mask
        yield place, words


def _cut(bits: int) -> tuple[int, int]:
    """Return at which width words, or their high bits, do not straddle bytes; and the low bits."""
    return next((width for width in (2, 4) if width >= bits), 8), max(0, bits - 8)


def _half(low: int) -> int:
    return (1 << low) >> 1


def _size(count: int, bits: int) -> int:
    return sum(words_size(count, width) for width in _cut(bits))
