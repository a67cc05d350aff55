"""The wire: an update as one strict, self-describing payload.

Layout (little-endian)::

    magic "PRWD" | version u8 | bits u8 | content u8 | coding u8 | table bytes u32 | checksum u64
    table     per tensor: name length u16, name (UTF-8), encoding u8, dimensions u8, sizes u32 each
    scales    float32, one per output channel of every quantized tensor, in table order
    floats    float32, the other tensors, in table order
    codes     all quantized tensors as one flat run: packed (coding 0), entropy-coded (1), or
              entropy-coded differences from the codes that the receiver had sent (2)

The checksum, XXH3 of 64 bits, covers everything else in the payload, so that no altered byte goes
unnoticed. Its seed is a number that both sides know, the stamp, so that what was sent in one round
is refused in another. Nothing is pickled. The receiver knows every name and shape beforehand
(`UpdateSpec`) and therefore the length of everything but coded codes, which are never longer than
packed ones: it is compared before anything is allocated, and no more is unfolded than there are
codes.
"""

import struct
from typing import get_args

import numpy as np
import xxhash
from torch import Tensor

from core.arguments import check_kind
from core.bits import ALLOWED_WIDTHS, FLOAT_BITS, is_width
from quant.codec.coding import compress_codes
from quant.codec.device_packing import pack_tensor
from quant.codec.flat import FlatCodes, FlatUpdate
from quant.codec.layout import Layout, layout_of
from quant.update import Content, Update, UpdateSpec

STYPE = "prowd.update/8"

MAGIC = b"PRWD"
VERSION = 8
HEADER = struct.Struct("<4sBBBBIQ")
CHECKSUM_OFFSET = HEADER.size - 8
CONTENTS: tuple[str, ...] = get_args(Content)
PACKED, CODED, CODED_FROM_START = 0, 1, 2


def payload_size(spec: UpdateSpec, bits: int) -> int:
    """Return the bytes of an update of width `bits`: exact if packed, the most if coded."""
    check_kind("spec", spec, UpdateSpec)
    layout = layout_of(spec, bits)
    return fixed_size(layout) + layout.packed_bytes


def encode_update(
    update: Update, *, coded: bool = False, start: Update | None = None, stamp: int = 0
) -> bytes:
    """Serialize an update.

    Parameters
    ----------
    update : Update
        What is sent.
    coded : bool
        Whether the codes are entropy-coded (`quant.codec.coding`), where that makes them shorter.
    start : Update, optional
        Model of the same width whose codes the receiver has sent; coded codes may refer to them.
    stamp : int
        What it is sent for, as the round: 0 to 2**64 - 1, known to the receiver.

    Raises
    ------
    ValueError
        If a code lies off the grid of `update.bits`, or a value is not finite.
    """
    check_kind("update", update, Update)
    if start is not None:
        check_kind("start", start, Update)
    layout = layout_of(_spec_of(update), update.bits)
    table, flat = layout.table, FlatUpdate.joined(update)
    coding, codes = _shortest(flat.quantized, coded, start)
    body = [_bytes_of(flat.quantized.scales), _bytes_of(flat.floats.flat), codes]
    content = CONTENTS.index(update.content)
    head = HEADER.pack(MAGIC, VERSION, update.bits, content, coding, len(table), 0)
    head = head[:CHECKSUM_OFFSET]
    checksum = xxhash.xxh3_64(head, seed=stamp)
    for part in (table, *body):
        checksum.update(part)
    return b"".join([head, struct.pack("<Q", checksum.intdigest()), table, *body])


def _shortest(flat: FlatCodes, coded: bool, start: Update | None) -> tuple[int, bytes | memoryview]:
    """Return the shortest of the allowed forms of the codes, and which it is."""
    bits = flat.layout.bits
    if not flat.layout.num_codes:
        return PACKED, b""
    forms: list[tuple[int, bytes | memoryview]] = [(PACKED, pack_tensor(flat.codes, bits))]
    if coded:
        codes = flat.codes.cpu().numpy()
        forms.append((CODED, compress_codes(codes, bits)))
        if start is not None:
            known = FlatUpdate.of(start).quantized.codes.numpy()
            forms.append((CODED_FROM_START, compress_codes(codes, bits, known)))
    return min(forms, key=lambda form: len(form[1]))


def parts_of(data: bytes, layout: Layout) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """Return scales, floats and bytes of the codes, as they lie in a payload of enough bytes."""
    position, rest = HEADER.size + len(layout.table), fixed_size(layout)
    scales = np.frombuffer(data, "<f4", layout.num_scales, position)
    floats = np.frombuffer(data, "<f4", layout.num_floats, rest - 4 * layout.num_floats)
    return scales, floats, memoryview(data)[rest:]


def fixed_size(layout: Layout) -> int:
    """Bytes of everything but the codes."""
    return HEADER.size + len(layout.table) + 4 * (layout.num_scales + layout.num_floats)


def _spec_of(update: Update) -> UpdateSpec:
    if not is_width(update.bits):
        raise ValueError(f"bits is {update.bits}; allowed are {ALLOWED_WIDTHS}")
    if update.bits == FLOAT_BITS and update.quantized:
        raise ValueError(f"an update of 32 bits quantizes {sorted(update.quantized)}")
    return update.spec


def _bytes_of(values: Tensor) -> bytes:
    array = values.cpu().numpy().astype("<f4", copy=False)
    if not np.isfinite(array).all():
        raise ValueError("an update must be finite; training diverged")
    return array.tobytes()
