"""Lossless entropy coding of codes: by themselves, or as steps from codes that both sides know.

Codes near zero are the most frequent, and after a round of training most codes are near those that
the client started from: where the server knows the start, the differences say the same in fewer
bits. They are taken modulo the grid's ``2**bits - 1`` levels, so that a difference is a code of the
same width. What is left is coded by Huffman's method over whole bytes: a byte holds as many codes
of 2 or 4 bits as fit, one of up to 8 bits, or half of a longer one. This is DEFLATE (RFC 1951)
without its search for repetitions, of which random codes have none.
"""

import zlib

import numpy as np

from quant.grid import largest_code
from quant.packing import PackingError, pack, packed_size, unpack

_RAW_DEFLATE = -15


def deflate_codes(codes: np.ndarray, bits: int, start: np.ndarray | None = None) -> bytes:
    """Code codes, or their differences from `start`.

    Parameters
    ----------
    codes, start : ndarray
        Integers ``[count]`` on the grid of `bits`.
    bits : int
        Bit-width, 2 to 16.
    """
    if start is not None:
        codes = _wrapped(codes.astype(np.int32) - start, bits)
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(pack(codes, _container(bits))) + coder.flush()


def inflate_codes(
    data: bytes | memoryview, bits: int, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Undo `deflate_codes`; nothing beyond the size of `count` codes is ever unfolded.

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
    # Huffman's method takes a bit or more for a byte: this bounds the memory where a file says the
    # count.
    if size > 8 * len(data):
        raise PackingError(f"{len(data)} bytes of coded codes are too few for {count} weights")
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        # One byte more would be one too many.
        packed = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise PackingError(f"the coded codes cannot be read: {error}") from None
    if len(packed) != size or not decoder.eof or decoder.unused_data:
        raise PackingError(f"the coded codes are not those of {count} weights")
    codes = unpack(packed, _container(bits), count)
    limit = largest_code(bits)
    if count and max(codes.max(), -int(codes.min())) > limit:
        raise PackingError(f"a code lies off the grid of width {bits}")
    if start is None:
        return codes
    return _wrapped(codes.astype(np.int32) + start, bits).astype(codes.dtype)


def _container(bits: int) -> int:
    """Width at which codes do not straddle bytes."""
    return next(width for width in (2, 4, 8, 16) if width >= bits)


def _wrapped(values: np.ndarray, bits: int) -> np.ndarray:
    """Bring a sum or difference of two codes back onto the grid, modulo its levels."""
    limit = largest_code(bits)
    levels = 2 * limit + 1
    values -= levels * (values > limit)
    values += levels * (values < -limit)
    return values
