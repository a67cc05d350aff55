"""Decoding: whatever a payload holds is validated here, on receipt, and nowhere else.

First all that needs no look at the values, then no more is decompressed than the model has codes,
then every value is validated. To undo the entropy coding takes from a third as long as all
the rest to longer. The library that does it lets other threads run, so `decode_all` decompresses
the next updates meanwhile; all else is many short calls, for which two threads would wait for each
other.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
import xxhash

from core.arguments import check_kind
from core.bits import FLOAT_BITS, check_width
from quant.codec.coding import decompress, read_codes
from quant.codec.encode import (
    CHECKSUM_OFFSET,
    CODED,
    CODED_FROM_START,
    CONTENTS,
    MAGIC,
    PACKED,
    VERSION,
    codes_on,
    payload_size,
)
from quant.codec.layout import HEADER, FlatCodes, FlatFloats, FlatUpdate, Layout, layout_of
from quant.codec.packing import PackingError, unpack
from quant.update import Content, Update, UpdateSpec, is_statistic

# No network that works holds a larger value; sums over clients stay far from overflow.
LARGEST_VALUE = 1e8
# Updates at a time; at most twice as many decompressed ones are in memory.
_AT_ONCE = 4


class UpdateError(ValueError):
    """A payload that is not the update it should be; the message says what is wrong."""


@dataclass(frozen=True)
class Expected:
    """What a receiver knows of an update before it comes, and validates it against.

    Attributes
    ----------
    spec : UpdateSpec
        Tensors of the model that the receiver sent.
    bits : int
        Bit-width that the update was asked for at; 0 if none was.
    content : {"weights", "difference"}
        What the receiver asked for.
    start : Update, optional
        The model as it was sent to the sender, where it was sent one.
    stamp : int
        What the update has to have been sent for, as the round.
    dither : int
        Seed of the dither that its weights were rounded with; 0: to nearest.

    Examples
    --------
    >>> Expected(UpdateSpec({"w": (2, 3)}, {"w"}), bits=4, stamp=3).most_bytes
    44
    """

    spec: UpdateSpec
    bits: int
    content: Content = "weights"
    start: Update | None = field(default=None, repr=False)
    stamp: int = 0
    dither: int = 0

    @cached_property
    def most_bytes(self) -> int:
        """Bytes that a payload of it takes at most."""
        return payload_size(self.spec, self.bits) if self.bits else 0


def decode(
    data: bytes,
    spec: UpdateSpec,
    bits: int,
    content: Content = "weights",
    start: Update | None = None,
    stamp: int = 0,
    dither: int = 0,
) -> Update:
    """Read and validate an update.

    Parameters
    ----------
    data : bytes
        The payload.
    spec, bits, content, start, stamp, dither
        As of `Expected`.

    Raises
    ------
    UpdateError
        If the payload is anything but a whole, unaltered, finite update of this model, width,
        content and stamp.
    ValueError
        If `bits` is no bit-width.

    Examples
    --------
    >>> update = quantize_state({"w": torch.ones(2)}, 32)
    >>> decode(encode(update), update.spec, bits=32).dequantize()
    {'w': tensor([1., 1.])}
    """
    check_kind("spec", spec, UpdateSpec)
    check_width("bits", bits)
    return _Payload(data, Expected(spec, bits, content, start, stamp, dither)).read()


def decode_all(payloads: Sequence[tuple[bytes, Expected]]) -> Iterator[Update | UpdateError]:
    """Decode payloads in the order given, the next ones decompressed by another thread meanwhile.

    Yields
    ------
    Update or UpdateError
        Of each payload; where no update was asked for, one of no tensors.

    Examples
    --------
    >>> update = quantize_state({"w": torch.ones(2)}, 32)
    >>> payloads = [(encode(update), Expected(update.spec, 32)), (b"", Expected(update.spec, 32))]
    >>> [type(result).__name__ for result in decode_all(payloads)]
    ['FlatUpdate', 'UpdateError']
    """
    batches = (_Batch(payloads[i : i + _AT_ONCE]) for i in range(0, len(payloads), _AT_ONCE))
    with ThreadPoolExecutor(1) as helper:
        due = next(batches, None)
        while due is not None:
            following = next(batches, None)
            if following is not None:
                following.begin(helper)
            yield from due.decode()
            due = following


def squares_at_most(data: bytes, expected: Expected) -> tuple[float, float]:
    """Bound the sums of squares of a payload's values, without a look at its codes.

    What `decode` would reject may have any bound, but is not rejected here.

    Returns
    -------
    tuple of float
        That of the parameters, where all codes count as if they were the largest, and that of
        BatchNorm's statistics.

    Examples
    --------
    >>> update = quantize_state({"b": torch.tensor([3.0, 4.0])}, 32)
    >>> squares_at_most(encode(update), Expected(update.spec, 32))
    (25.0, 0.0)
    """
    if not expected.bits:
        return 0.0, 0.0
    layout = layout_of(expected.spec, expected.bits)
    if len(data) < layout.fixed_bytes:
        return 0.0, 0.0
    scales, floats, _ = _parts_of(data, layout)
    codes_per_scale, starts, of_statistics = _weights_of_squares(expected.spec, expected.bits)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(scales, dtype=np.float64) @ codes_per_scale
        parameters = squares * layout.largest_code**2
        statistics = 0.0
        if starts.size:
            sums = np.add.reduceat(np.square(floats), starts, dtype=np.float64)
            statistics = sums[of_statistics].sum()
            parameters += sums[~of_statistics].sum()
    return float(parameters), float(statistics)


@lru_cache(maxsize=64)
def _weights_of_squares(spec: UpdateSpec, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each scale counts, and where parameters and statistics take turns among the floats.

    Returns
    -------
    tuple of ndarray
        Codes in the channel of each scale; where each stretch of one kind of float begins, and
        whether it is one of statistics.
    """
    layout = layout_of(spec, bits)
    lengths = np.array([length for length, _ in layout.channels], np.float64)
    codes_per_scale = np.repeat(lengths, [count for _, count in layout.channels])
    kinds = np.array([is_statistic(name) for name in layout.floats], bool)
    kinds = np.repeat(kinds, layout.float_counts)
    starts = np.flatnonzero(np.diff(kinds, prepend=~kinds[:1]))
    return codes_per_scale, starts, kinds[starts]


class _Payload:
    """A payload of this model, width, content and stamp; its values are not validated yet."""

    def __init__(self, data: bytes, expected: Expected) -> None:
        self.layout, self.expected = layout_of(expected.spec, expected.bits), expected
        self.coding = _check_header(data, self.layout, expected.content, expected.stamp)
        self.scales, self.floats, self.codes = _parts_of(data, self.layout)
        self._decompressed: np.ndarray | None = None

    def decompress(self) -> np.ndarray:
        """Undo the entropy coding, in any thread; `read` does it if it was not done before."""
        if self._decompressed is None:
            layout = self.layout
            self._decompressed = decompress(self.codes, layout.bits, layout.num_codes)
        return self._decompressed

    def read(self) -> FlatUpdate:
        """Validate the values; to be called once."""
        layout, content = self.layout, self.expected.content
        if layout.quantized:
            _check_scales(self.scales, LARGEST_VALUE / layout.largest_code)
        _check_floats(self.floats)
        codes = torch.from_numpy(self._read_codes())
        values = FlatFloats(layout, torch.from_numpy(self.floats.astype(np.float32)))
        steps = torch.from_numpy(self.scales.astype(np.float32))
        _check_variances(values, content, self.expected.start)
        return FlatUpdate(layout.bits, content, FlatCodes(layout, codes, steps), values)

    def _read_codes(self) -> np.ndarray:
        bits, count = self.layout.bits, self.layout.num_codes
        if not count:
            return np.empty(0, np.int8)
        try:
            if self.coding == PACKED:
                return unpack(self.codes, bits, count)
            known = self._known() if self.coding == CODED_FROM_START else None
            decompressed = self.decompress()
            # Not held any longer.
            self._decompressed = None
            return read_codes(decompressed, bits, count, known)
        except PackingError as error:
            raise UpdateError(str(error)) from None

    def _known(self) -> np.ndarray:
        """Return the codes that the model which the sender was sent has on the sender's scales."""
        start, layout = self.expected.start, self.layout
        if self.expected.content != "weights" or start is None:
            raise UpdateError("payload refers to codes that were not sent")
        steps = torch.from_numpy(self.scales.astype(np.float32))
        try:
            return codes_on(FlatCodes(layout, torch.empty(0), steps), start, self.expected.dither)
        except ValueError as error:
            raise UpdateError(f"its codes cannot be read: {error}") from None


class _Batch:
    """A few payloads in a row, which two threads can decompress together."""

    def __init__(self, payloads: Iterable[tuple[bytes, Expected]]) -> None:
        self._due: list[_Payload | Update | UpdateError] = []
        for data, expected in payloads:
            try:
                self._due.append(_Payload(data, expected) if expected.bits else _NOTHING)
            except UpdateError as error:
                self._due.append(error)
        coded = (i for i in self._due if isinstance(i, _Payload) and i.coding != PACKED)
        self._coded = deque(coded)
        self._job: Future[None] | None = None

    def begin(self, helper: Executor) -> None:
        """Let the other thread decompress."""
        if self._coded:
            self._job = helper.submit(self._decompress)

    def decode(self) -> Iterator[Update | UpdateError]:
        """Decompress what the other thread has not come to, and read everything."""
        self._decompress()
        if self._job is not None:
            self._job.result()
        while self._due:
            # Out of the list, so that it is not held any longer.
            item = self._due.pop(0)
            if isinstance(item, _Payload):
                try:
                    item = item.read()
                except UpdateError as error:
                    item = error
            yield item
            del item

    def _decompress(self) -> None:
        while self._coded:
            try:
                payload = self._coded.popleft()
            except IndexError:  # The other thread took the last one.
                return
            try:
                payload.decompress()
            except PackingError:
                # `read` raises the same error, in its turn.
                continue


_NOTHING = Update(FLOAT_BITS, "weights", {}, {})


def _parts_of(data: bytes, layout: Layout) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """Return scales, floats and bytes of the codes, as they lie in a payload of enough bytes."""
    position, rest = HEADER.size + len(layout.table), layout.fixed_bytes
    scales = np.frombuffer(data, "<f4", layout.num_scales, position)
    floats = np.frombuffer(data, "<f4", layout.num_floats, rest - 4 * layout.num_floats)
    return scales, floats, memoryview(data)[rest:]


def _check_variances(values: FlatFloats, content: Content, start: Update | None) -> None:
    """Reject what training cannot give: a variance that is, or becomes, negative."""
    for name in values.layout.variances:
        if content == "weights":
            if (values[name] < 0).any():
                raise UpdateError(f"{name} is a variance and has a negative entry")
        elif start is not None and (start.floats[name] + values[name] < 0).any():
            raise UpdateError(f"{name} is a variance and would become negative")


def _check_header(data: bytes, layout: Layout, content: Content, stamp: int) -> int:
    """Check everything that needs no look at the values; return the coding."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UpdateError(f"data: a {type(data).__name__} is not allowed: it should be bytes")
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
    fixed, bits = layout.fixed_bytes, layout.bits
    most = fixed + layout.packed_bytes
    if coding == PACKED:
        if length != most:
            raise UpdateError(f"payload has {length} bytes; this model at {bits} bits takes {most}")
        return
    if coding not in (CODED, CODED_FROM_START) or not layout.quantized:
        raise UpdateError(f"payload has coding {coding}, which this width does not have")
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
