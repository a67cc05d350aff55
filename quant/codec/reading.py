"""Reading an update from the wire: opened, unfolded and read, each step as strict as the next.

Opening looks at all but the values, unfolding undoes the entropy coding, and reading makes tensors
of what is left. Unfolding is one long call of a library that lets other threads run, so that a
receiver of many updates can unfold some while it reads another.
"""

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from core.arguments import check_kind
from core.bits import ALLOWED_WIDTHS, is_width
from quant.codec.coding import read_codes, unfold_codes
from quant.codec.flat import FlatCodes, FlatFloats, FlatUpdate
from quant.codec.layout import CODES, Layout, layout_of
from quant.codec.packing import PackingError, unpack
from quant.codec.wire import (
    CHECKSUM_OFFSET,
    CODED,
    CODED_FROM_START,
    CONTENTS,
    HEADER,
    MAGIC,
    PACKED,
    VERSION,
    fixed_size,
    parts_of,
)
from quant.grid import largest_code
from quant.update import Content, Update, UpdateSpec

# Of two bits, the narrowest.
_MOST_CODES_A_BYTE = 4
_MOST_DIMENSIONS = 8
# No network that works holds a larger value; sums over clients stay far from overflow.
LARGEST_VALUE = 1e8


class UpdateError(ValueError):
    """A payload that is not the update it should be; the message says what is wrong."""


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
    opened = open_update(data, spec, bits, content, stamp)
    return opened.read(opened.unfold(), start)


def open_update(
    data: bytes, spec: UpdateSpec, bits: int, content: Content = "weights", stamp: int = 0
) -> "OpenedUpdate":
    """Check everything of a payload that needs no look at its values.

    Parameters
    ----------
    data, spec, bits, content, stamp
        As of `decode_update`.

    Raises
    ------
    UpdateError
        If the payload is altered, or not an update of this model, width, content and stamp.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UpdateError(f"data: a {type(data).__name__} is not allowed: it should be bytes")
    check_kind("spec", spec, UpdateSpec)
    if not is_width(bits):
        raise UpdateError(f"payload has {bits} bits; allowed are {ALLOWED_WIDTHS}")
    layout = layout_of(spec, bits)
    coding = _check_header(data, layout, content, stamp)
    return OpenedUpdate(layout, content, coding, *parts_of(data, layout))


@dataclass(frozen=True)
class OpenedUpdate:
    """A payload that was sent as it is here: of this model, width, content, and stamp.

    Attributes
    ----------
    layout : Layout
        Its tensors.
    content : {"weights", "difference"}
        What its values are.
    coding : int
        Form of its codes (`quant.codec.wire`).
    scales, floats : ndarray
        Little-endian float32 ``[layout.num_scales]`` and ``[layout.num_floats]``, in the payload.
    codes : memoryview
        Bytes of the codes there.
    """

    layout: Layout
    content: Content
    coding: int
    scales: np.ndarray
    floats: np.ndarray
    codes: memoryview

    @property
    def is_folded(self) -> bool:
        """Whether `unfold` has something to do."""
        return self.coding != PACKED

    def unfold(self) -> np.ndarray:
        """Undo the entropy coding, if there is one; the time goes where other threads can run.

        Returns
        -------
        ndarray
            What `read` reads, uint8.

        Raises
        ------
        UpdateError
            If it does not unfold to as many codes as the model has, and nothing else.
        """
        if not self.is_folded:
            return np.frombuffer(self.codes, np.uint8)
        try:
            return unfold_codes(self.codes, self.layout.bits, self.layout.num_codes)
        except PackingError as error:
            raise UpdateError(str(error)) from None

    def read(self, unfolded: np.ndarray, start: Update | None = None) -> FlatUpdate:
        """Read and check the values.

        Parameters
        ----------
        unfolded : ndarray
            What `unfold` returned, for this call alone: the update may keep it.
        start : Update, optional
            Model whose codes the receiver had sent to the sender.

        Raises
        ------
        UpdateError
            If a value is none of a working model of this width.
        """
        bits = self.layout.bits
        if self.layout.quantized:
            _check_scales(self.scales, LARGEST_VALUE / largest_code(bits))
        _check_floats(self.floats)
        codes = torch.from_numpy(self._codes(unfolded, start))
        values = FlatFloats(self.layout, torch.from_numpy(self.floats.astype(np.float32)))
        for name in self.layout.variances if self.content == "weights" else ():
            if (values[name] < 0).any():
                raise UpdateError(f"{name} is a variance and has a negative entry")
        steps = torch.from_numpy(self.scales.astype(np.float32))
        return FlatUpdate(bits, self.content, FlatCodes(self.layout, codes, steps), values)

    def _codes(self, unfolded: np.ndarray, start: Update | None) -> np.ndarray:
        bits, count = self.layout.bits, self.layout.num_codes
        if not count:
            return np.empty(0, np.int8)
        known = None
        if self.coding == CODED_FROM_START:
            if start is None or start.bits != bits:
                raise UpdateError("payload refers to codes that were not sent")
            known = FlatUpdate.of(start).quantized.codes.numpy()
        try:
            if self.is_folded:
                return read_codes(unfolded, bits, count, known)
            return unpack(unfolded, bits, count)
        except PackingError as error:
            raise UpdateError(str(error)) from None


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
    if coding != PACKED:
        raise UpdateError(f"payload has coding {coding}; who has no model reads packed codes only")
    table = data[HEADER.size : HEADER.size + table_size]
    shapes: dict[str, tuple[int, ...]] = {}
    on_grid: set[str] = set()
    position = 0
    try:
        while position < len(table):
            (length,) = struct.unpack_from("<H", table, position)
            position += 2 + length
            name = table[position - length : position].decode()
            encoding, dimensions = table[position], table[position + 1]
            if encoding == CODES:
                on_grid.add(name)
            shapes[name] = struct.unpack_from(f"<{dimensions}I", table, position + 2)
            position += 2 + 4 * dimensions
            most = _MOST_CODES_A_BYTE * len(data)
            if encoding == CODES and not dimensions:
                raise UpdateError(f"{name!r} is one number, which has no codes")
            if dimensions > _MOST_DIMENSIONS or math.prod(max(1, n) for n in shapes[name]) > most:
                raise UpdateError(f"{len(data)} bytes hold no tensor of the shape of {name!r}")
    except (struct.error, IndexError, UnicodeDecodeError):
        raise UpdateError("the table of tensors cannot be read") from None
    return bits, UpdateSpec(shapes, frozenset(on_grid))


def _check_header(data: bytes, layout: Layout, content: Content, stamp: int) -> int:
    """Check everything that needs no look at the values; return the coding."""
    got_bits, got_content, coding, table_size, claimed = _read_header(data)
    if got_bits != layout.bits:
        raise UpdateError(f"payload has {got_bits} bits; the client declared {layout.bits}")
    if got_content >= len(CONTENTS) or CONTENTS[got_content] != content:
        raise UpdateError(f"payload holds content {got_content}; asked for {content}")
    _check_length(len(data), layout, coding)
    table, start = layout.table, HEADER.size
    if table_size != len(table) or data[start : start + len(table)] != table:
        raise UpdateError("the table of tensors is not that of the model that was sent")
    checksum = xxhash.xxh3_64(data[:CHECKSUM_OFFSET], seed=stamp)
    checksum.update(memoryview(data)[start:])
    if checksum.intdigest() != claimed:
        raise UpdateError(
            "checksum does not match: the payload was altered, or is of another round"
        )
    return coding


def _read_header(data: bytes) -> tuple[int, int, int, int, int]:
    """Return width, content, coding, bytes of the table, and checksum."""
    if len(data) < HEADER.size:
        raise UpdateError(f"payload of {len(data)} bytes is shorter than the header")
    magic, version, *rest = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise UpdateError(f"payload begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise UpdateError(f"payload has version {version}; understood is {VERSION}")
    return tuple(rest)


def _check_length(length: int, layout: Layout, coding: int) -> None:
    fixed, bits = fixed_size(layout), layout.bits
    most = fixed + layout.packed_bytes
    if coding == PACKED:
        if length != most:
            raise UpdateError(f"payload has {length} bytes; this model at {bits} bits takes {most}")
        return
    if coding not in (CODED, CODED_FROM_START) or not layout.quantized:
        raise UpdateError(f"payload has coding {coding}, which is none of this width")
    if not fixed < length < most:
        raise UpdateError(
            f"payload has {length} bytes; this model at {bits} bits, coded, takes less than {most}"
        )


def _check_scales(scales: np.ndarray, largest: float) -> None:
    if not scales.size or (scales.min() > 0 and scales.max() <= largest):
        return
    if not np.isfinite(scales).all():
        raise UpdateError("a scale is not finite")
    if not (scales > 0).all():
        raise UpdateError("a scale is not positive")
    raise UpdateError(f"a scale is so large that its grid exceeds {LARGEST_VALUE:g}")


def _check_floats(floats: np.ndarray) -> None:
    if not floats.size or (floats.min() >= -LARGEST_VALUE and floats.max() <= LARGEST_VALUE):
        return
    if not np.isfinite(floats).all():
        raise UpdateError("a float tensor is not finite")
    raise UpdateError(f"a value exceeds {LARGEST_VALUE:g}")
