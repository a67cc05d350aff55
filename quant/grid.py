"""The symmetric, zero-point-free grid of a bit-width: rounding to it and its inverse.

A tensor of bit-width ``k`` is stored as codes in ``[-(2**(k-1) - 1), 2**(k-1) - 1]`` and one
float32 scale per channel, an index of dimension 0: an output channel, of a transposed convolution
an input channel, of an embedding a row. Only this file defines it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import isfinite

import torch
from torch import Tensor

from core.arguments import check_kind
from core.bits import check_bits

# Values at a time: what is computed from them stays in the cache.
BLOCK = 1 << 18


class NonFiniteError(ValueError):
    """A NaN or an infinity where only numbers can be rounded; the message says where."""


class ScaleError(ValueError):
    """A scale that no grid can have; the message says where."""


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    >>> is_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    # A sum is one pass without memory of its own; of finite values it may overflow.
    return isfinite(values.sum()) or bool(values.isfinite().all())


def check_finite(values: Tensor, what: str) -> None:
    """Refuse values that rounding would turn into ordinary codes.

    Parameters
    ----------
    values : Tensor
        Float tensor of any shape.
    what : str
        Its name, for the error.

    Raises
    ------
    NonFiniteError
        If a value is NaN or infinite.
    """
    if not is_finite(values):
        bad = ~values.isfinite()
        count, first = int(bad.sum()), float(values[bad][0])
        raise NonFiniteError(f"{what} is not finite: {count} of {bad.numel()} values, as {first}")


@contextmanager
def naming(tensor: str) -> Iterator[None]:
    """Put a tensor's name before the message of an error about its values."""
    try:
        yield
    except (NonFiniteError, ScaleError) as error:
        raise type(error)(f"{tensor}: {error}") from None


@cache
def largest_code(bits: int) -> int:
    """Return the largest code of the grid, ``2**(bits - 1) - 1``.

    >>> largest_code(4)
    7
    """
    return (1 << (check_bits(bits) - 1)) - 1


def code_type(bits: int) -> torch.dtype:
    """Return the narrowest integer type that holds the codes of a width."""
    return torch.int8 if bits <= 8 else torch.int16


def per_channel(scale: Tensor, ndim: int) -> Tensor:
    """Shape a scale ``[channels]`` so that it broadcasts over a tensor of `ndim` dimensions."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def quantize_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to the nearest code, ties to even.

    Parameters
    ----------
    weight : Tensor
        Float tensor ``[channels, ...]``.
    scale : Tensor
        Float32 scales ``[channels]``.
    bits : int
        Bit-width, 2 to 16.

    Returns
    -------
    Tensor
        Codes, int8 up to 8 bits and int16 above, shape of `weight`.

    Raises
    ------
    NonFiniteError
        If a weight or a scale is NaN or infinite, or a scale too small to divide by.
    ScaleError
        If a scale is not positive.

    Examples
    --------
    >>> quantize_nearest(torch.tensor([[0.9, -5.0]]), torch.tensor([0.5]), bits=4)
    tensor([[ 2, -7]], dtype=torch.int8)
    """
    _check_operands(weight, scale)
    if weight.numel() <= BLOCK or weight.device.type != "cpu":
        return nearest(weight.detach(), scale, bits).to(code_type(bits))
    codes = torch.empty(weight.shape, dtype=code_type(bits))
    limit, scratch = largest_code(bits), torch.empty(BLOCK)
    matrices = (_matrix(weight.detach()), scale.reciprocal()[:, None], _matrix(codes))
    for values, inverse, out in _blocks(*matrices):
        part = scratch[: values.numel()].view(values.shape)
        out.copy_(torch.mul(values, inverse, out=part).round_().clamp_(-limit, limit))
    return codes


def quantize_stochastic(
    weight: Tensor, scale: Tensor, bits: int, generator: torch.Generator
) -> Tensor:
    """Round up or down at random so that the expected code is ``weight / scale``, clipping apart.

    Parameters
    ----------
    weight, scale, bits
        As in `quantize_nearest`.
    generator : torch.Generator
        Seeded source of the rounding noise.

    Returns
    -------
    Tensor
        Codes as of `quantize_nearest`.

    Raises
    ------
    NonFiniteError
        If a weight or a scale is NaN or infinite, or a scale too small to divide by.
    ScaleError
        If a scale is not positive.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> codes = quantize_stochastic(torch.full((1, 1000), 0.3), torch.ones(1), 4, generator)
    >>> codes.unique().tolist(), round(float(codes.float().mean()), 1)
    ([0, 1], 0.3)
    """
    _check_operands(weight, scale)
    limit = largest_code(bits)
    noise = torch.rand(weight.shape, generator=generator, device=weight.device)
    quotient = weight.detach() / per_channel(scale, weight.ndim)
    codes = quotient.floor()
    codes += noise < quotient.sub_(codes)
    return codes.clamp_(-limit, limit).to(code_type(bits))


def dequantize(codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the float32 values ``codes * scale`` that the codes stand for.

    Parameters
    ----------
    codes : Tensor
        Codes ``[channels, ...]``.
    scale : Tensor
        Float32 scales ``[channels]``.
    out : Tensor, optional
        Float32, contiguous, of the shape of `codes`: where the values go, as new memory takes
        longer to get than to fill.

    Examples
    --------
    >>> dequantize(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5]))
    tensor([[ 1., -2.]])
    """
    check_kind("codes", codes, Tensor)
    check_kind("scale", scale, Tensor)
    if codes.numel() <= BLOCK or codes.device.type != "cpu":
        values = codes.to(torch.float32) if out is None else out.copy_(codes)
        return values.mul_(per_channel(scale, codes.ndim))
    values = torch.empty(codes.shape) if out is None else out
    for source, step, target in _blocks(_matrix(codes), scale[:, None], _matrix(values)):
        target.copy_(source).mul_(step)
    return values


def fake_quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Put weights on the grid but keep them float32, with a straight-through gradient.

    The result equals ``dequantize(quantize_nearest(weight, scale, bits), scale)`` bit for bit. The
    gradient passes unchanged where the weight is not clipped and is zero where it is. If a weight
    is NaN or infinite, all of the result is NaN, where torch's kernel alone would give levels.

    >>> weight = torch.tensor([[0.9, -5.0]], requires_grad=True)
    >>> fake_quantize(weight, torch.tensor([0.5]), bits=4).sum().backward()
    >>> weight.grad
    tensor([[1., 0.]])
    """
    check_kind("weight", weight, Tensor)
    check_kind("scale", scale, Tensor)
    limit = largest_code(bits)
    zero_point = torch.zeros(scale.numel(), dtype=torch.int32, device=scale.device)
    on_grid = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -limit, limit)
    return on_grid * nan_unless_finite(weight).add(1)


def nan_unless_finite(values: Tensor) -> Tensor:
    """Return 0 as a tensor, or NaN if a value is NaN or infinite; without waiting for a GPU."""
    # In float32: of float16 a sum of ordinary values may overflow.
    return values.detach().sum(dtype=torch.float32) * 0


def check_weight(weight: Tensor) -> None:
    """Refuse what has no channels."""
    check_kind("weight", weight, Tensor)
    if not weight.ndim:
        raise ValueError("weight: it is one number; allowed: a tensor [channels, ...]")


def _check_operands(weight: Tensor, scale: Tensor) -> None:
    check_weight(weight)
    check_kind("scale", scale, Tensor)
    check_finite(weight.detach(), "the weight")
    check_scale(scale)


def check_scale(scale: Tensor) -> None:
    """Refuse a scale by which every weight would end up on the edge of the grid, or nowhere.

    Raises
    ------
    NonFiniteError
        If one is NaN or infinite, or so small that its inverse is.
    ScaleError
        If one is not positive.
    """
    check_finite(scale, "the scale")
    if scale.numel() and not (least := float(scale.min())) > 0:
        raise ScaleError(f"a scale is {least:g}; allowed are positive numbers")
    check_finite(scale.reciprocal(), "the inverse of the scale")


def _matrix(tensor: Tensor) -> Tensor:
    """View a tensor ``[channels, ...]`` as a matrix, one row a channel."""
    return tensor.reshape(tensor.shape[0], -1)


def _blocks(values: Tensor, scale: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut matrices, and a scale a row, into blocks of whole rows, or of parts of a long one."""
    columns = values.shape[1]
    height = max(1, BLOCK // columns)
    rows = (values.split(height), scale.split(height), out.split(height))
    for part, step, target in zip(*rows, strict=True):
        if columns <= BLOCK:
            yield part, step, target
            continue
        for left, into in zip(part.split(BLOCK, 1), target.split(BLOCK, 1), strict=True):
            yield left, step, into


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest codes as floats; as of `quantize_nearest`, unchecked."""
    # Multiplies by the inverse, as torch's fake-quantize kernels do: the same codes to the bit.
    limit = largest_code(bits)
    return (weight * per_channel(scale.reciprocal(), weight.ndim)).round_().clamp_(-limit, limit)
