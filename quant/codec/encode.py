"""Encoding: an update as one strict, self-describing payload.

Layout (little-endian)::

    magic "PRWD" | version u8 | bits u8 | content u8 | coding u8 | table bytes u32 | checksum u64
    table     per tensor: name length u16, name (UTF-8), encoding u8, dimensions u8, sizes u32 each
    scales    float32, one per output channel of every quantized tensor, in table order
    floats    float32, the other tensors, in table order
    codes     all quantized tensors as one flat run: packed (coding 0), entropy-coded (1), or
              entropy-coded differences from the codes that the model which the sender was sent has
              on its scales, rounded as its own were (2)

The checksum, XXH3 of 64 bits, covers everything else in the payload, so that no altered byte goes
unnoticed. Its seed is a number known to both sides, the stamp, so that what was sent in one round
is rejected in another. Nothing is pickled. The receiver knows every name and shape beforehand
(`UpdateSpec`) and therefore the length of everything but coded codes, which are never longer than
packed ones: it is compared before anything is allocated, and no more is decompressed than there
are codes.
"""

import struct
from typing import get_args

import numpy as np
import torch
import xxhash
from torch import Tensor

from core.arguments import wrong_kind
from core.bits import FLOAT_BITS
from quant.codec.coding import compress_codes
from quant.codec.layout import HEADER, FlatCodes, FlatUpdate, Layout, layout_of
from quant.codec.packing import pack
from quant.update import Content, Update, UpdateSpec

STYPE = "prowd.update/9"

MAGIC = b"PRWD"
VERSION = 9
CHECKSUM_OFFSET = HEADER.size - 8
CONTENTS: tuple[str, ...] = get_args(Content)
PACKED, CODED, CODED_FROM_START = 0, 1, 2


def payload_size(spec: UpdateSpec, bits: int) -> int:
    """Return the bytes of an update of width `bits`: exact if packed, the most if coded.

    Examples
    --------
    >>> spec = UpdateSpec({"weight": (10, 64), "bias": (10,)}, frozenset({"weight"}))
    >>> payload_size(spec, 4), payload_size(spec, 32)
    (450, 2650)
    """
    if not isinstance(spec, UpdateSpec):
        raise wrong_kind("spec", spec, UpdateSpec)
    layout = layout_of(spec, bits)
    return layout.fixed_bytes + layout.packed_bytes


def encode(
    update: Update,
    *,
    coded: bool = False,
    start: Update | None = None,
    stamp: int = 0,
    dither: int = 0,
) -> bytes:
    """Serialize an update.

    Parameters
    ----------
    update : Update
        What is sent.
    coded : bool
        Whether the codes are entropy-coded (`quant.codec.coding`), where that makes them shorter.
    start : Update, optional
        The model as the receiver sent it, at any width. Coded codes of weights may be differences
        from the codes that this model has on the scales of `update`.
    stamp : int
        What it is sent for, as the round: 0 to 2**64 - 1, known to the receiver.
    dither : int
        Seed of the dither that the weights were rounded with, known to the receiver; 0: to nearest.

    Raises
    ------
    ValueError
        If a code lies off the grid of `update.bits`, or a value is not finite.

    Examples
    --------
    >>> update = quantize_state({"w": torch.tensor([[0.9, -2.0]])}, 4, {"w": torch.tensor([0.5])})
    >>> data = encode(update, stamp=3)
    >>> decode(data, update.spec, bits=4, stamp=3).dequantize()
    {'w': tensor([[ 1., -2.]])}
    """
    for name, given in (("update", update), ("start", update if start is None else start)):
        if not isinstance(given, Update):
            raise wrong_kind(name, given, Update)
    if update.bits == FLOAT_BITS and update.quantized:
        raise ValueError(f"an update of 32 bits quantizes {sorted(update.quantized)}")
    layout, flat = layout_of(update.spec, update.bits), FlatUpdate.of(update)
    from_start = start if coded and update.content == "weights" else None
    coding, codes = _shortest(flat.quantized, coded, from_start, dither)
    body = [_bytes_of(flat.quantized.scales), _bytes_of(flat.floats.flat), codes]
    content = CONTENTS.index(update.content)
    head = HEADER.pack(MAGIC, VERSION, update.bits, content, coding, len(layout.table), 0)
    head = head[:CHECKSUM_OFFSET]
    checksum = xxhash.xxh3_64(head, seed=stamp)
    for part in (layout.table, *body):
        checksum.update(part)
    return b"".join([head, struct.pack("<Q", checksum.intdigest()), layout.table, *body])


def codes_on(flat: FlatCodes, start: Update, dither: int) -> np.ndarray:
    """Return the codes that a model has on the scales of an update, rounded as its own were.

    Parameters
    ----------
    flat : FlatCodes
        Of the update; its codes are not looked at.
    start : Update
        The model, of the same tensors, at any width.
    dither : int
        As of `encode`.

    Raises
    ------
    ValueError
        If a scale is too small to divide by.
    """
    layout = flat.layout
    if start.bits == layout.bits and not dither:
        known = FlatUpdate.of(start).quantized
        if torch.equal(known.scales, flat.scales):
            return known.codes.numpy()
    inverse = flat.scales.reciprocal()
    if not inverse.isfinite().all():
        raise ValueError("a scale is too small to divide by")
    # All in one run. Both sides only need to come to the same codes, near those that are sent.
    steps = _values_on_grid(start, layout)
    steps *= torch.repeat_interleave(inverse, layout.codes_per_scale)
    if dither:
        noise = torch.rand(steps.shape, generator=torch.Generator().manual_seed(dither))
        whole = steps.floor()
        codes = whole.add_(noise < steps.sub_(whole))
    else:
        codes = steps.round_()
    most = layout.largest_code
    return codes.clamp_(-most, most).numpy().astype(np.int8 if layout.bits <= 8 else np.int16)


def _values_on_grid(model: Update, layout: Layout) -> Tensor:
    """Return the values of the tensors that a layout quantizes, of a model of any width."""
    if model.bits == FLOAT_BITS:
        return torch.cat([model.floats[name].flatten() for name in layout.quantized])
    known = FlatUpdate.of(model).quantized
    scales = torch.repeat_interleave(known.scales, known.layout.codes_per_scale)
    return known.codes * scales


def _shortest(
    flat: FlatCodes, coded: bool, start: Update | None, dither: int
) -> tuple[int, bytes | memoryview]:
    """Return the shortest of the allowed forms of the codes, and which it is."""
    bits, codes = flat.layout.bits, flat.codes.numpy()
    if not flat.layout.num_codes:
        return PACKED, b""
    forms: list[tuple[int, bytes | memoryview]] = [(PACKED, pack(codes, bits))]
    if coded:
        forms.append((CODED, compress_codes(codes, bits)))
        if start is not None:
            known = codes_on(flat, start, dither)
            forms.append((CODED_FROM_START, compress_codes(codes, bits, known)))
    return min(forms, key=lambda form: len(form[1]))


def _bytes_of(values: Tensor) -> bytes:
    array = values.numpy().astype("<f4", copy=False)
    if not np.isfinite(array).all():
        raise ValueError("an update must be finite; training diverged")
    return array.tobytes()
