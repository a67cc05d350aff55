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

import math
import struct
from typing import get_args

import numpy as np
import torch
import xxhash
from torch import Tensor

from quant.coding import compress_codes, decompress_codes
from quant.flat import FlatCodes, FlatFloats, FlatUpdate
from quant.grid import MAX_BITS, MIN_BITS, is_width, largest_code
from quant.layout import Layout, layout_of
from quant.packing import PackingError, pack, unpack
from quant.update import Content, Update, UpdateSpec

STYPE = "prowd.update/5"

_MAGIC = b"PRWD"
_VERSION = 5
_HEADER = struct.Struct("<4sBBBBIQ")
_CHECKSUM_OFFSET = _HEADER.size - 8
_CONTENTS: tuple[str, ...] = get_args(Content)
_PACKED, _CODED, _CODED_FROM_START = 0, 1, 2
# Of two bits, the narrowest.
_MOST_CODES_A_BYTE = 4
_MOST_DIMENSIONS = 8
# No network that works holds a larger value; sums over clients stay far from overflow.
_LARGEST_VALUE = 1e8


class UpdateError(ValueError):
    """A payload that is not the update it should be; the message says what is wrong."""


def payload_size(spec: UpdateSpec, bits: int) -> int:
    """Return the bytes of an update of width `bits`: exact if packed, the most if coded."""
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
        Whether the codes are entropy-coded (`quant.coding`), where that makes them shorter.
    start : Update, optional
        Model of the same width whose codes the receiver has sent; coded codes may refer to them.
    stamp : int
        What it is sent for, as the round: 0 to 2**64 - 1, known to the receiver.

    Raises
    ------
    ValueError
        If a code lies off the grid of `update.bits`, a value is not finite, or a tensor that the
        width quantizes is not.
    """
    layout = layout_of(_spec_of(update), update.bits)
    table, flat = layout.table, FlatUpdate.of(update)
    coding, codes = _shortest(flat.quantized, coded, start)
    body = [_bytes_of(flat.quantized.scales), _bytes_of(flat.floats.flat), codes]
    content = _CONTENTS.index(update.content)
    head = _HEADER.pack(_MAGIC, _VERSION, update.bits, content, coding, len(table), 0)
    head = head[:_CHECKSUM_OFFSET]
    checksum = xxhash.xxh3_64(head, seed=stamp)
    for part in (table, *body):
        checksum.update(part)
    return b"".join([head, struct.pack("<Q", checksum.intdigest()), table, *body])


def read_spec(data: bytes) -> tuple[int, UpdateSpec]:
    """Read which tensors a packed update says that it holds, for a reader that knows no model.

    Nothing of it is certain until `decode_update` has compared it with all the rest.

    Parameters
    ----------
    data : bytes
        The payload.

    Returns
    -------
    tuple of int and UpdateSpec
        Bit-width, and names and shapes.

    Raises
    ------
    UpdateError
        If there is no table that can be read, or a tensor is larger than the payload can hold; or
        if the codes are not packed, as only the model tells how many coded ones there are.
    """
    bits, _, coding, table_size, _ = _read_header(data)
    if coding != _PACKED:
        raise UpdateError(f"payload has coding {coding}; who has no model reads packed codes only")
    table = data[_HEADER.size : _HEADER.size + table_size]
    shapes: dict[str, tuple[int, ...]] = {}
    position = 0
    try:
        while position < len(table):
            (length,) = struct.unpack_from("<H", table, position)
            position += 2 + length
            name = table[position - length : position].decode()
            dimensions = table[position + 1]
            shapes[name] = struct.unpack_from(f"<{dimensions}I", table, position + 2)
            position += 2 + 4 * dimensions
            most = _MOST_CODES_A_BYTE * len(data)
            if dimensions > _MOST_DIMENSIONS or math.prod(max(1, n) for n in shapes[name]) > most:
                raise UpdateError(f"{len(data)} bytes hold no tensor of the shape of {name!r}")
    except (struct.error, IndexError, UnicodeDecodeError):
        raise UpdateError("the table of tensors cannot be read") from None
    return bits, UpdateSpec(shapes)


def decode_update(
    data: bytes,
    spec: UpdateSpec,
    bits: int,
    content: Content = "weights",
    start: Update | None = None,
    stamp: int = 0,
) -> FlatUpdate:
    """Read and check an update.

    Parameters
    ----------
    data : bytes
        The payload.
    spec : UpdateSpec
        Tensors of the model that the receiver sent.
    bits : int
        Width that the sender declared.
    content : {"weights", "difference"}
        What the receiver asked for.
    start : Update, optional
        Model whose codes the receiver had sent to the sender.
    stamp : int
        What it has to have been sent for.

    Raises
    ------
    UpdateError
        If the payload is anything but a whole, unaltered, finite update of this model, width,
        content and stamp.
    """
    if not is_width(bits):
        raise UpdateError(f"payload has {bits} bits; allowed are {MIN_BITS} to {MAX_BITS} and 32")
    layout = layout_of(spec, bits)
    coding = _check_header(data, layout, content, stamp)
    scales, floats, rest = parts_of(data, layout)
    _check_finite(scales, "a scale")
    if not (scales > 0).all():
        raise UpdateError("a scale is not positive")
    if layout.quantized and (scales > _LARGEST_VALUE / largest_code(bits)).any():
        raise UpdateError(f"a scale is so large that its grid exceeds {_LARGEST_VALUE:g}")
    _check_finite(floats, "a float tensor")
    if floats.size and np.abs(floats).max() > _LARGEST_VALUE:
        raise UpdateError(f"a value exceeds {_LARGEST_VALUE:g}")
    codes = _read_codes(rest, layout, coding, start)
    values = FlatFloats(layout, torch.from_numpy(floats.astype(np.float32)))
    for name in layout.variances if content == "weights" else ():
        if (values[name] < 0).any():
            raise UpdateError(f"{name} is a variance and has a negative entry")
    steps = torch.from_numpy(scales.astype(np.float32))
    return FlatUpdate(bits, content, FlatCodes(layout, torch.from_numpy(codes), steps), values)


def _shortest(flat: FlatCodes, coded: bool, start: Update | None) -> tuple[int, bytes | memoryview]:
    """Return the shortest of the allowed forms of the codes, and which it is."""
    codes, bits = flat.codes.numpy(), flat.layout.bits
    if not codes.size:
        return _PACKED, b""
    forms: list[tuple[int, bytes | memoryview]] = [(_PACKED, pack(codes, bits))]
    if coded:
        forms.append((_CODED, compress_codes(codes, bits)))
        if start is not None:
            known = FlatUpdate.of(start).quantized.codes.numpy()
            forms.append((_CODED_FROM_START, compress_codes(codes, bits, known)))
    return min(forms, key=lambda form: len(form[1]))


def _read_codes(data: memoryview, layout: Layout, coding: int, start: Update | None) -> np.ndarray:
    bits, count = layout.bits, layout.num_codes
    if not count:
        return np.empty(0, np.int8)
    known = None
    if coding == _CODED_FROM_START:
        if start is None or start.bits != bits:
            raise UpdateError("payload refers to codes that were not sent")
        known = FlatUpdate.of(start).quantized.codes.numpy()
    try:
        if coding == _PACKED:
            return unpack(data, bits, count)
        return decompress_codes(data, bits, count, known)
    except PackingError as error:
        raise UpdateError(str(error)) from None


def parts_of(data: bytes, layout: Layout) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """Return scales, floats and bytes of the codes, as they lie in a payload of enough bytes."""
    position, rest = _HEADER.size + len(layout.table), fixed_size(layout)
    scales = np.frombuffer(data, "<f4", layout.num_scales, position)
    floats = np.frombuffer(data, "<f4", layout.num_floats, rest - 4 * layout.num_floats)
    return scales, floats, memoryview(data)[rest:]


def fixed_size(layout: Layout) -> int:
    """Bytes of everything but the codes."""
    return _HEADER.size + len(layout.table) + 4 * (layout.num_scales + layout.num_floats)


def _check_header(data: bytes, layout: Layout, content: Content, stamp: int) -> int:
    """Check everything that needs no look at the values; return the coding."""
    got_bits, got_content, coding, table_size, claimed = _read_header(data)
    if got_bits != layout.bits:
        raise UpdateError(f"payload has {got_bits} bits; the client declared {layout.bits}")
    if got_content >= len(_CONTENTS) or _CONTENTS[got_content] != content:
        raise UpdateError(f"payload holds content {got_content}; asked for {content}")
    _check_length(len(data), layout, coding)
    table, start = layout.table, _HEADER.size
    if table_size != len(table) or data[start : start + len(table)] != table:
        raise UpdateError("the table of tensors is not that of the model that was sent")
    checksum = xxhash.xxh3_64(data[:_CHECKSUM_OFFSET], seed=stamp)
    checksum.update(memoryview(data)[start:])
    if checksum.intdigest() != claimed:
        raise UpdateError(
            "checksum does not match: the payload was altered, or is of another round"
        )
    return coding


def _read_header(data: bytes) -> tuple[int, int, int, int, int]:
    """Return width, content, coding, bytes of the table, and checksum."""
    if len(data) < _HEADER.size:
        raise UpdateError(f"payload of {len(data)} bytes is shorter than the header")
    magic, version, *rest = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise UpdateError(f"payload begins with {magic!r}, not {_MAGIC!r}")
    if version != _VERSION:
        raise UpdateError(f"payload has version {version}; understood is {_VERSION}")
    return tuple(rest)


def _check_length(length: int, layout: Layout, coding: int) -> None:
    fixed, bits = fixed_size(layout), layout.bits
    most = fixed + layout.packed_bytes
    if coding == _PACKED:
        if length != most:
            raise UpdateError(f"payload has {length} bytes; this model at {bits} bits takes {most}")
        return
    if coding not in (_CODED, _CODED_FROM_START) or not layout.quantized:
        raise UpdateError(f"payload has coding {coding}, which is none of this width")
    if not fixed < length < most:
        raise UpdateError(
            f"payload has {length} bytes; this model at {bits} bits, coded, takes less than {most}"
        )


def _check_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise UpdateError(f"{what} is not finite")


def _spec_of(update: Update) -> UpdateSpec:
    if not is_width(update.bits):
        raise ValueError(f"bits is {update.bits}; allowed are {MIN_BITS} to {MAX_BITS} and 32")
    spec = update.spec
    quantized = spec.quantized(update.bits)
    if set(quantized) != set(update.quantized):
        raise ValueError(f"an update of {update.bits} bits quantizes {quantized}")
    return spec


def _bytes_of(values: Tensor) -> bytes:
    array = values.numpy().astype("<f4", copy=False)
    if not np.isfinite(array).all():
        raise ValueError("an update must be finite; training diverged")
    return array.tobytes()
