"""Uploads: in which form a low-bit client sends the weights that it trained.

A client of k bits computes with rounded weights, and holds finer ones: latent float32 weights in
qat training, weights on the grid of k bits behind the ternary ones in integer training. It may send

``forward``
    the weights that it computes with, rounded to nearest, as the paper has it. What moved less
    than half a level is not seen, and the mean of many clients keeps that bias.
``dithered``
    the same grid, rounded stochastically with noise from a seed that the receiver knows: right on
    average for every weight within the grid, and the receiver can round the start with the same
    noise. What lies beyond the outermost level is clipped, as to nearest: of a normal layer on its
    fitted grid 22 % at 2 bits, 5 % at 3 and 1 % at 4.
``stored``
    the weights that it holds: float32 in qat training, k bits in integer training.

In strict training they lie on the grid that it computes with, and the three are one.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from core.arguments import check_kind
from core.bits import FLOAT_BITS, check_width
from core.settings import LowBitTraining, Upload
from quant.lowbit.integer import stored
from quant.update import Update, quantize_state

# Of the levels -0.5, 0 and 0.5, as codes -1, 0 and 1.
_TERNARY_BITS, _TERNARY_SCALE = 2, 0.5


def upload_bits(bits: int, low_bit_training: LowBitTraining, upload: Upload) -> int:
    """Return the width of what a client of a width sends.

    Parameters
    ----------
    bits : int
        The client's width, 2 to 16, or 32.
    low_bit_training : {"qat", "strict", "integer"}
        How low-bit clients train.
    upload : {"forward", "dithered", "stored"}
        The form.

    Examples
    --------
    >>> upload_bits(8, "integer", "forward"), upload_bits(8, "integer", "stored")
    (2, 8)
    >>> upload_bits(3, "qat", "stored")
    32
    """
    if check_width("bits", bits) == FLOAT_BITS or low_bit_training == "strict":
        return bits
    if upload == "stored":
        return FLOAT_BITS if low_bit_training == "qat" else bits
    return _TERNARY_BITS if low_bit_training == "integer" else bits


def stored_bits_of(bits: int, low_bit_training: LowBitTraining) -> int:
    """Return the width of the weights that a client of integer training stores; 0 in any other.

    >>> stored_bits_of(8, "integer"), stored_bits_of(8, "strict"), stored_bits_of(32, "integer")
    (8, 0, 0)
    """
    return bits if low_bit_training == "integer" and bits != FLOAT_BITS else 0


def ternary_scales(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the scales of the codes -1, 0 and 1 that ternary weights are sent as.

    >>> ternary_scales({"w": torch.zeros(2, 3)}, ["w"])
    {'w': tensor([0.5000, 0.5000])}
    """
    return {name: torch.full(state[name].shape[:1], _TERNARY_SCALE) for name in names}


def start_of(
    update: Update, start: Mapping[str, Tensor], dither: int = 0, stored_bits: int = 0
) -> Update:
    """Bring the model that a client started from to the grid of what it sent, with its dither.

    Parameters
    ----------
    update : Update
        What it sent.
    start : mapping of str to Tensor
        Float32 model that it was sent.
    dither : int
        Seed of its dither; 0: rounded to nearest.
    stored_bits : int
        `stored_bits_of` the client: it first brings the model to the weights that it stores.

    Returns
    -------
    Update
        Of the width and on the scales of `update`.

    Examples
    --------
    >>> sent = quantize_state({"w": torch.tensor([[1.0]])}, 4, {"w": torch.tensor([0.5])})
    >>> start_of(sent, {"w": torch.tensor([[0.6]])}).quantized["w"].codes
    tensor([[1]], dtype=torch.int8)
    """
    check_kind("update", update, Update)
    held = dict(start)
    if stored_bits:
        held |= {name: stored(start[name], stored_bits) for name in update.quantized}
    return quantize_state(held, update.bits, update.scales, dither=dither)


def moved_by(
    update: Update, received: Mapping[str, Tensor], dither: int = 0, stored_bits: int = 0
) -> dict[str, Tensor]:
    """Return how far a client went from its start as it held it, float64.

    Of weights on a grid that start is `start_of`: its rounding, which all do alike, is no movement.

    Parameters
    ----------
    update : Update
        What it sent, or would send in the clear.
    received : mapping of str to Tensor
        Float32 model that it was sent.
    dither, stored_bits : int
        As of `start_of`.

    Examples
    --------
    >>> update = Update(32, "weights", {}, {"b": torch.tensor([3.0])})
    >>> moved_by(update, {"b": torch.tensor([1.0])})
    {'b': tensor([2.], dtype=torch.float64)}
    """
    values, held = update.dequantize(), dict(received)
    if update.content == "difference":
        return {name: tensor.double() for name, tensor in values.items()}
    if update.quantized:
        held = start_of(update, received, dither, stored_bits).dequantize()
    # In float64: float32 numbers of opposite signs can be further apart than float32 goes.
    return {name: tensor.double() - held[name] for name, tensor in values.items()}
