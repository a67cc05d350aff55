"""Fitting the scale of each channel to its weights: by the largest, or by the squared error."""

from functools import lru_cache
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from core.bits import MIN_BITS, check_bits
from quant.grid import BLOCK, check_finite, check_weight, largest_code, nearest

# Up to this width the few levels are worth more near zero than at the extremes.
_CLIPPED_BITS = 4
# Clipping points that are tried, in largest magnitudes of a channel: 1.1, and on in steps of 2 %.
_LARGEST_CLIP, _CLIP_RATIO, _CLIPS = 1.1, 0.98, 165
# Bins that a channel's magnitudes are counted in.
_BINS = 256
# Keeps 1 / scale finite in float32 even for an all-zero channel.
_SMALLEST_SCALE = 2.0**-100
# On a GPU, where calls cost more than memory does: only what bounds that.
_BLOCK_ON_GPU = 1 << 25


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
    check_weight(weight)
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
    check_weight(weight)
    rows = weight.detach().flatten(1).float()
    # All passes over some channels while they are in the cache: several times as fast.
    block = BLOCK if rows.device.type == "cpu" else _BLOCK_ON_GPU
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
    codes = nearest(rows, scale, bits)
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
