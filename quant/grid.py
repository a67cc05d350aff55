"""The symmetric, zero-point-free grid of a bit-width: scales, rounding and their inverse.

A tensor of bit-width ``k`` is stored as codes in ``[-(2**(k-1) - 1), 2**(k-1) - 1]`` and one
float32 scale per channel, an index of dimension 0: an output channel, of a transposed convolution
an input channel, of an embedding a row. Only this file defines it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from core.arguments import check_kind
from core.bits import MIN_BITS, check_bits

# Up to this width the few levels are worth more near zero than at the extremes.
_CLIPPED_BITS = 4
# Clipping points that are tried, in largest magnitudes of a channel: 1.1, and on in steps of 2 %.
_LARGEST_CLIP, _CLIP_RATIO, _CLIPS = 1.1, 0.98, 165
# Bins that a channel's magnitudes are counted in.
_BINS = 256
# Keeps 1 / scale finite in float32 even for an all-zero channel.
_SMALLEST_SCALE = 2.0**-100
# Values at a time: what is computed from them stays in the cache.
_BLOCK = 1 << 18
# On a GPU, where calls cost more than memory does: only what bounds that.
_BLOCK_ON_GPU = 1 << 25


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


def absmax_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale that places every channel's largest magnitude on the largest code.

    Parameters
    ----------
    weight : Tensor
        Float tensor ``[channels, ...]``.
    bits : int
        Bit-width, 2 to 16.

    Returns
    -------
    Tensor
        Float32 scales ``[channels]``, positive.

    Examples
    --------
    >>> absmax_scale(torch.tensor([[0.5, -3.5]]), 4)
    tensor([0.5000])
    """
    _check_weight(weight)
    rows = weight.detach().flatten(1)
    # Twice over the weights, and eight times as fast as their magnitudes in memory of their own.
    absmax = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).float()
    return (absmax / largest_code(bits)).clamp_(min=_SMALLEST_SCALE)


def mse_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale whose grid, clipping included, is nearest to the weights in mean squared error.

    Each channel takes the best of many clipping points, by a histogram of its magnitudes: the
    errors at all points are one product with what a weight in each bin costs at each. From there,
    and from the largest magnitude, the scale is the closed form ``<w, q> / <q, q>`` for the codes
    ``q`` at hand, by which the error only falls; the better of the two is taken.

    Parameters
    ----------
    weight : Tensor
        Float tensor ``[channels, ...]``.
    bits : int
        Bit-width, 2 to 4: the steps of finer grids are too short for the bins.

    Returns
    -------
    Tensor
        Float32 scales ``[channels]``, positive.

    Raises
    ------
    ValueError
        If `bits` is not 2 to 4.

    Examples
    --------
    >>> mse_scale(torch.tensor([[1.0, 1.0, 4.0]]), 2)
    tensor([4.])
    """
    if check_bits(bits) > _CLIPPED_BITS:
        raise ValueError(f"bits is {bits}; clipping is fitted at {MIN_BITS} to {_CLIPPED_BITS}")
    _check_weight(weight)
    rows = weight.detach().flatten(1).float()
    # All passes over some channels while they are in the cache: several times as fast.
    block = _BLOCK if rows.device.type == "cpu" else _BLOCK_ON_GPU
    height = max(1, block // max(_BINS, rows.shape[1]))
    return torch.cat([_mse_scale(part, bits) for part in rows.split(height)])


def _mse_scale(rows: Tensor, bits: int) -> Tensor:
    clips, costs = (torch.from_numpy(table).to(rows.device) for table in _clips(bits))
    absmax = absmax_scale(rows, bits)
    best = (_histogram(rows, absmax * largest_code(bits)) @ costs).argmin(dim=1)
    clipped, gain = _refined(rows, absmax * clips[best], bits)
    plain, least = _refined(rows, absmax, bits)
    return torch.where(gain >= least, clipped, plain).clamp_(min=_SMALLEST_SCALE)


def _histogram(rows: Tensor, largest: Tensor) -> Tensor:
    """Count each row's magnitudes in equal bins up to its largest, float32 ``[rows, bins]``."""
    # In place: with more temporaries malloc gives memory back, and faults it in with every block.
    positions = rows.abs().mul_((_BINS / largest)[:, None])
    # Clamped: the largest itself, and what a diverged model holds.
    bins = positions.long().clamp_(0, _BINS - 1)
    counts = torch.zeros(len(rows), _BINS, device=rows.device)
    return counts.scatter_add_(1, bins, counts.new_ones(()).expand_as(bins))


@lru_cache
def _clips(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the clipping points, and what the middle of each bin costs at each of them."""
    clips = _LARGEST_CLIP * _CLIP_RATIO ** np.arange(_CLIPS)
    middles = ((np.arange(_BINS) + 0.5) / _BINS)[:, None]
    limit = largest_code(bits)
    steps = clips / limit
    costs = (middles - np.rint(middles / steps).clip(max=limit) * steps) ** 2
    return clips.astype(np.float32), costs.astype(np.float32)


def _refined(rows: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the best scale for the codes at a scale, and what it takes from the squared error."""
    codes = _nearest(rows, scale, bits)
    # Rounded, as it is an integer.
    norm = torch.linalg.vector_norm(codes, dim=1).square().round_()
    product = codes.mul_(rows).sum(dim=1)
    fitted = product / norm.clamp(min=1)
    return torch.where(norm > 0, fitted, scale), fitted * product


def fit_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale that clients and server use: MSE-optimal up to 4 bits, absmax above.

    Raises
    ------
    NonFiniteError
        If a weight is NaN or infinite.

    Examples
    --------
    >>> fit_scale(torch.tensor([[0.5, -12.7]]), 8)
    tensor([0.1000])
    """
    clipped = check_bits(bits) <= _CLIPPED_BITS
    scale = mse_scale(weight, bits) if clipped else absmax_scale(weight, bits)
    if not isfinite(scale.sum()):
        check_finite(weight.detach(), "the weight")
    return scale


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
    if weight.numel() <= _BLOCK or weight.device.type != "cpu":
        return _nearest(weight.detach(), scale, bits).to(code_type(bits))
    codes = torch.empty(weight.shape, dtype=code_type(bits))
    limit, scratch = largest_code(bits), torch.empty(_BLOCK)
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
    if codes.numel() <= _BLOCK or codes.device.type != "cpu":
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


def _check_weight(weight: Tensor) -> None:
    check_kind("weight", weight, Tensor)
    if not weight.ndim:
        raise ValueError("weight: it is one number; allowed: a tensor [channels, ...]")


def _check_operands(weight: Tensor, scale: Tensor) -> None:
    _check_weight(weight)
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
    height = max(1, _BLOCK // columns)
    rows = (values.split(height), scale.split(height), out.split(height))
    for part, step, target in zip(*rows, strict=True):
        if columns <= _BLOCK:
            yield part, step, target
            continue
        for left, into in zip(part.split(_BLOCK, 1), target.split(_BLOCK, 1), strict=True):
            yield left, step, into


def _nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    # Multiplies by the inverse, as torch's fake-quantize kernels do: the same codes to the bit.
    limit = largest_code(bits)
    return (weight * per_channel(scale.reciprocal(), weight.ndim)).round_().clamp_(-limit, limit)
