"""Lossless entropy coding of codes: by themselves, or as steps from codes that both sides know.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences say the same in fewer
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
# Kinds of a block: one byte, repeated, and one without a meaning.
_REPEATED, _RESERVED = 1, 3
# An honest frame has a few blocks, and at most one for two thousand bytes that unfold. One for 256
# is allowed, so that nobody makes a receiver walk for long.
_FEW_BLOCKS, _SMALL_BLOCK = 4, 256


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
        What `unfold_codes` reads.
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


def unfold_codes(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """Undo the entropy coding of `compress_codes`; no more than the size of `count` codes unfolds.

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
        What `read_codes` reads, uint8, in memory of its own.

    Raises
    ------
    PackingError
        If the data is not one frame, of the size of `count` codes and with nothing beside them.
    """
    size = _size(count, bits)
    try:
        claimed = zstandard.get_frame_parameters(data, format=_FORMAT).content_size
        if claimed != size or not _is_one_frame(data, size):
            raise PackingError(f"the coded codes are not those of {count} weights")
        stream = zstandard.ZstdDecompressor(format=_FORMAT).stream_reader(data)
        # Not to bytes, which cannot be written to: codes of 8 bits stay where they are unfolded.
        unfolded = np.empty(size, np.uint8)
        if stream.readinto(unfolded) != size or stream.read(1):
            raise PackingError(f"the coded codes do not unfold to those of {count} weights")
    except zstandard.ZstdError as error:
        raise PackingError(f"the coded codes cannot be read: {error}") from None
    return unfolded


def _is_one_frame(data: bytes | memoryview, size: int) -> bool:
    """Return whether this is a frame and nothing else, by its header and those of its blocks.

    A stream, unlike `ZstdDecompressor.decompress`, would stop before what it need not read.
    """
    descriptor = data[0]
    if descriptor & _MORE_THAN_CODES:
        return False
    has_window = not descriptor >> 5 & 1
    place = 1 + has_window + (not has_window, 2, 4, 8)[descriptor >> 6]
    for _ in range(_FEW_BLOCKS + size // _SMALL_BLOCK):
        header = int.from_bytes(data[place : place + 3], "little")
        is_last, kind, length = header & 1, header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            return False
        place += 3 + (1 if kind == _REPEATED else length)
        if is_last or place >= len(data):
            return bool(is_last) and place == len(data)
    return False


def read_codes(
    unfolded: np.ndarray, bits: int, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Read the codes that `unfold_codes` unfolded, or their differences from `start`.

    Parameters
    ----------
    unfolded : ndarray
        uint8, contiguous and writable. Codes of 8 bits are left in it.
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
        return _read_bytes(unfolded, count, start)
    codes = np.empty(count, np.int8 if bits < 8 else np.int16)
    narrow, limit = word_type(bits), largest_code(bits)
    mask = narrow((1 << bits) - 1)
    has_room = sum(_cut(bits)) > bits
    for place, words in _joined(unfolded, bits, count):
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


def _read_bytes(unfolded: np.ndarray, count: int, start: np.ndarray | None) -> np.ndarray:
    """Read codes of 8 bits where they lie, as they are their own words."""
    codes = unfolded.view(np.int8)
    if codes.size != count:
        raise PackingError(f"{count} codes of 8 bits take {count} bytes; got {codes.size}")
    if start is not None:
        codes += start.astype(np.int8, copy=False)
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


def _joined(unfolded: np.ndarray, bits: int, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Undo `_planes`, as `unpack_words` does."""
    high, low = _cut(bits)
    if not low:
        yield from unpack_words(unfolded, high, count)
        return
    half, mask = np.uint16(_half(low)), np.uint16((1 << bits) - 1)
    planes = unpack_words(unfolded[:count], high, count), unpack_words(unfolded[count:], low, count)
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
