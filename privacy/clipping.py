"""Clipping what a device adds: in float, and through the rounding to integers.

The guarantee rests on one number, the most by which a device can move the sum. A movement that is
clipped in float and rounded to a grid afterwards may be longer than its clip; here it may not.
"""

from collections.abc import Mapping
from math import exp, hypot, inf, isfinite, log, sqrt

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from core.arguments import check_kind, check_number, check_tensors

# Roundings that are tried; of those of `rounded_clip`, at least one fits but once in 3,000 times.
DRAWS = 16
# By how much float32 arithmetic may have missed the clip; and what float64 may miss of a norm.
SLACK, FLOAT = 1e-5, 1e-12


def norm_of(movement: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all tensors together, in float64.

    >>> norm_of({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])})
    5.0

    Raises
    ------
    ValueError
        If a tensor is not finite.
    """
    check_tensors("movement", movement)
    norms = []
    for name, tensor in movement.items():
        norm = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
        if not isfinite(norm):
            raise ValueError(f"movement: {name} has norm {norm}; allowed: finite tensors")
        norms.append(norm)
    return hypot(*norms)


def clip_factor(norm: float, clip: float) -> float:
    """Return what to multiply a movement of a norm with for a norm of at most `clip`.

    >>> clip_factor(4.0, 1.0), clip_factor(0.5, 1.0)
    (0.25, 1.0)

    Raises
    ------
    ValueError
        If the norm is negative or not finite, or the clip is not > 0.
    """
    check_number("norm", norm, least=0)
    check_number("clip", clip, above=0)
    return min(1.0, clip / norm) if norm else 1.0


def round_within(
    movement_in_codes: ArrayLike, steps: ArrayLike, clip: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Round to integers at random, so that the norm of ``integers * steps`` is at most `clip`.

    Each coordinate is rounded up with the probability of its fraction, so that the mean is kept; if
    the whole is too long, anew (conditional rounding, Kairouz et al., ICML 2021, arXiv:2102.06387).
    If no draw of `DRAWS` fits, all are rounded toward zero, which always does. With the clip of
    `rounded_clip` that is rare. With a clip that leaves rounding no room it is the rule: on a
    coarse grid a movement smaller than its steps then becomes zero.

    Parameters
    ----------
    movement_in_codes : array_like of float
        The clipped movement, in units of its steps.
    steps : array_like of float
        Size of one code in units of the movement, > 0; broadcast to the movement's shape.
    clip : float
        Largest norm of the result in units of the movement.
    generator : numpy.random.Generator
        Draws the roundings. It need not be secret: no draw exceeds the clip.

    Returns
    -------
    numpy.ndarray of int64

    Raises
    ------
    ValueError
        If the movement itself is longer than `clip` or not finite, or an argument is not allowed.

    Examples
    --------
    >>> round_within([2.5, -0.25], [0.1, 0.4], 0.5, np.random.default_rng(0)).tolist()
    [2, 0]
    """
    check_number("clip", clip, above=0)
    check_kind("generator", generator, np.random.Generator)
    codes = np.asarray(movement_in_codes, np.float64)
    sizes = _checked_steps(steps, codes.shape)
    norm = _norm(codes, sizes)
    if not norm <= clip * (1 + SLACK) or not (np.abs(codes) < 2.0**62).all():
        raise ValueError(
            f"movement_in_codes: norm {norm:g} is not allowed: it should be at most clip, {clip:g}"
        )
    # So that truncation fits in spite of float64, too.
    if norm > clip * (1 - FLOAT):
        codes = codes * (clip * (1 - FLOAT) / norm)
    below = np.floor(codes)
    fraction = codes - below
    for _ in range(DRAWS):
        rounded = below + (generator.random(codes.shape) < fraction)
        if _norm(rounded, sizes) <= clip:
            return rounded.astype(np.int64)
    return np.trunc(codes).astype(np.int64)


def _checked_steps(steps: ArrayLike, shape: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    given = np.asarray(steps, np.float64)
    wrong = ~((given > 0) & (given < inf))
    if wrong.any():
        raise ValueError(f"steps: {given[wrong][0]} is not allowed: it should be a number > 0")
    try:
        return given if shape is None else np.broadcast_to(given, shape)
    except ValueError:
        raise ValueError(f"steps: shape {given.shape} does not fit codes of {shape}") from None


def _norm(codes: NDArray[np.float64], steps: NDArray[np.float64]) -> float:
    values = codes * steps
    largest = float(np.abs(values).max(initial=0.0))
    # Scaled, so that the squares of tiny numbers do not vanish.
    return largest * sqrt(float(np.sum(np.square(values / largest)))) if largest else 0.0


def rounded_clip(clip: float, steps: ArrayLike, miss: float = exp(-0.5)) -> float:
    """Return the norm that random rounding of a movement clipped to `clip` keeps but for `miss`.

    Noise must be scaled to it, not to `clip`. After Kairouz et al., for a step of its own per
    coordinate. With steps ``s``: the mean of the squared norm is at most
    ``clip**2 + min(|s|**2 / 4, clip * |s|)``, as a fraction's variance is at most 1/4 and at most
    itself. By Hoeffding, it exceeds its mean by more than
    ``sqrt(2 log(1/miss)) * max(s) * (clip + |s| / 2)`` with a probability of at most `miss`. It
    never exceeds ``(clip + |s|)**2``.

    Parameters
    ----------
    clip : float
        Norm of the movement before rounding, > 0.
    steps : array_like of float
        One size of a code per coordinate.
    miss : float
        Probability that one draw is longer, > 0 and < 1.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If an argument is not allowed.

    Examples
    --------
    >>> round(rounded_clip(1.0, np.full(10_000, 1e-3)), 4)
    1.0018
    """
    check_number("clip", clip, above=0)
    check_number("miss", miss, above=0, below=1)
    sizes = _checked_steps(steps)
    together = _norm(np.ones(sizes.shape), sizes)
    mean = clip**2 + min(together**2 / 4, clip * together)
    beyond = sqrt(-2 * log(miss)) * float(sizes.max(initial=0.0)) * (clip + together / 2)
    return min(clip + together, sqrt(mean + beyond))


def next_clip(clip: float, share_below: float, quantile: float, rate: float) -> float:
    """Return the next round's clip, which moves to a quantile of the devices' norms.

    The geometric update of Andrew et al. (NeurIPS 2021, arXiv:1905.03871):
    ``clip * exp(-rate * (share_below - quantile))``.

    Parameters
    ----------
    clip : float
        This round's, > 0.
    share_below : float
        Share of devices whose movement was not longer than `clip`. With noise it may be below 0
        or above 1.
    quantile : float
        Where to go, from 0 to 1; 0.5 is the median norm.
    rate : float
        Step of the logarithm, > 0; the paper's is 0.2.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If an argument is not allowed.

    Examples
    --------
    >>> round(next_clip(1.0, share_below=1.0, quantile=0.5, rate=0.2), 4)
    0.9048
    """
    check_number("clip", clip, above=0)
    check_number("share_below", share_below)
    check_number("quantile", quantile, least=0)
    if quantile > 1:
        raise ValueError(f"quantile: {quantile!r} is not allowed: it should be from 0 to 1")
    check_number("rate", rate, above=0)
    changed = clip * exp(min(700.0, -rate * (share_below - quantile)))
    check_number("next clip", changed, above=0)
    return changed


def noise_beside_count(noise_multiplier: float, count_sigma: float) -> float:
    """Return the movements' noise multiplier where devices also count who was clipped.

    A device adds +1/2 or -1/2 to the count, whose noise has standard deviation `count_sigma`: a
    noise multiplier of ``2 * count_sigma``. Both together cost what `noise_multiplier` alone would:
    ``(noise_multiplier**-2 - (2 * count_sigma)**-2) ** -0.5`` (Andrew et al., Theorem 1).

    >>> round(noise_beside_count(1.0, 5.0), 4)
    1.005

    Raises
    ------
    ValueError
        If the count's noise alone would cost more.
    """
    check_number("noise_multiplier", noise_multiplier, above=0)
    check_number("count_sigma", count_sigma, above=noise_multiplier / 2)
    return float((noise_multiplier**-2 - (2 * count_sigma) ** -2) ** -0.5)
