"""Lossless entropy coding of codes: by themselves, or as steps from codes that both sides know.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences say the same in fewer
bits. Codes and differences are taken modulo ``2**bits``, as words of so many bits with an offset,
and coded by Huffman's method over whole bytes: a byte holds as many words of 2 or 4 bits as fit,
one of up to 8 bits, or half of a longer one. This is a Zstandard frame (RFC 8878), which is read
several times faster than DEFLATE, with as good as no search for repetitions, of which random codes
have none.
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
# Bytes that a table of Huffman's is made for: what Zstandard calls a block.
_LOG_BLOCK = 17
# As few repetitions as it can be told to find: each one that it takes costs more than it saves.
_LOG_REMEMBERED, _SHORTEST_REPETITION = 6, 7


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
    middle, mask = narrow(1 << (bits - 1)), narrow((1 << bits) - 1)

    def words() -> Iterator[np.ndarray]:
        for place in block_places(codes.size):
            block = codes[place].astype(narrow)
            block += middle
            if start is not None:
                block -= start[place].astype(narrow)
            block &= mask
            yield block

    parameters = zstandard.ZstdCompressionParameters(
        format=_FORMAT,
        window_log=_LOG_BLOCK,
        hash_log=_LOG_REMEMBERED,
        min_match=_SHORTEST_REPETITION,
        strategy=zstandard.STRATEGY_FAST,
    )
    coder = zstandard.ZstdCompressor(compression_params=parameters)
    return coder.compress(pack_words(words(), _container(bits), codes.size))


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
        if claimed != packed_size(count, _container(bits)):
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
    container = _container(bits)
    for place, words in unpack_words(unfolded, container, count):
        block = codes[place].view(narrow)
        off_grid = bits < container and words.max() > mask
        if start is not None:
            known = start[place].astype(codes.dtype, copy=False).view(narrow)
            words = np.add(words, known, out=block)
            words &= mask
        if off_grid or words.min() == 0:
            raise PackingError(f"a code lies off the grid of width {bits}")
        np.subtract(words, middle, out=block)
    return codes


def _container(bits: int) -> int:
    """Width at which codes do not straddle bytes."""
    return next(width for width in (2, 4, 8, 16) if width >= bits)
