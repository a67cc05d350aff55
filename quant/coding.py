"""Lossless entropy coding of codes: by themselves, or as steps from codes that both sides know.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences say the same in fewer
bits. They are taken modulo the grid's ``2**bits - 1`` levels, so that a difference is a code of the
same width. What is left is coded by Huffman's method over whole bytes: a byte holds as many codes
of 2 or 4 bits as fit, one of up to 8 bits, or half of a longer one. This is a Zstandard frame (RFC
8878), which is read several times faster than DEFLATE, with as good as no search for repetitions,
of which random codes have none.
"""

import numpy as np
import zstandard

from quant.grid import largest_code
from quant.packing import PackingError, pack, packed_size, unpack

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
    if start is not None:
        codes = _wrapped(codes, -start, bits)
    parameters = zstandard.ZstdCompressionParameters(
        format=_FORMAT,
        window_log=_LOG_BLOCK,
        hash_log=_LOG_REMEMBERED,
        min_match=_SHORTEST_REPETITION,
        strategy=zstandard.STRATEGY_FAST,
    )
    coder = zstandard.ZstdCompressor(compression_params=parameters)
    return coder.compress(pack(codes, _container(bits)))


def decompress_codes(
    data: bytes | memoryview, bits: int, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Undo `compress_codes`; nothing beyond the size of `count` codes is ever unfolded.

    Returns
    -------
    ndarray
        Codes ``[count]``; int8 up to 8 bits, int16 above.

    Raises
    ------
    PackingError
        If the data is not `count` codes on the grid of `bits`, or does not end with them.
    """
    size = packed_size(count, _container(bits))
    try:
        claimed = zstandard.get_frame_parameters(data, format=_FORMAT).content_size
        if claimed != size:
            raise PackingError(f"the coded codes are not those of {count} weights")
        packed = zstandard.ZstdDecompressor(format=_FORMAT).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PackingError(f"the coded codes cannot be read: {error}") from None
    codes = unpack(packed, _container(bits), count)
    limit = largest_code(bits)
    if count and max(codes.max(), -int(codes.min())) > limit:
        raise PackingError(f"a code lies off the grid of width {bits}")
    return codes if start is None else _wrapped(codes, start, bits)


def _container(bits: int) -> int:
    """Width at which codes do not straddle bytes."""
    return next(width for width in (2, 4, 8, 16) if width >= bits)


def _wrapped(codes: np.ndarray, moved: np.ndarray, bits: int) -> np.ndarray:
    """Add codes, and bring the sums back onto the grid, modulo its levels."""
    limit = largest_code(bits)
    levels = 2 * limit + 1
    # The narrowest integers that hold every sum: the narrower, the faster.
    wide = np.result_type(np.min_scalar_type(-2 * limit), np.int8)
    values = codes.astype(wide)
    values += moved.astype(wide, copy=False)
    values -= (values > limit) * wide.type(levels)
    values += (values < -limit) * wide.type(levels)
    return values.astype(codes.dtype, copy=False)
