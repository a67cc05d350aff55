"""Noise on integers: an exact discrete Gaussian, and Gaussian noise of a model on a fine grid.

Floating-point samplers leak: the low bits of ``value + noise`` tell which values are possible
(Mironov, CCS 2012). All noise here is an integer times a step, so that it has no such bits.

The sampler is Algorithm 3 of Canonne, Kamath and Steinke (NeurIPS 2020, arXiv:2004.00010): discrete
Laplace candidates from geometric variables, accepted with the ratio of the two mass functions. What
is exact: integers are uniform without bias, and a coin of probability ``exp(-x)`` is decided by
float64 only where its rounding cannot matter, otherwise in as many digits as it takes. So, given
independent uniform bits, the result has the discrete Gaussian's distribution for the very float64
that `sigma` is. What is not protected: the time that it takes depends on what is drawn.

Bits come from AES-256 in counter mode under a fresh key of the operating system. NumPy's PCG64 is
no faster, and its state follows from its output: who predicts the noise subtracts it, whatever the
accountant says. An explicit NumPy generator is for tests and simulations that must repeat.
"""

import os
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from math import frexp, prod, sqrt

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from core.arguments import check_kind, check_number

# Above it, candidates would no longer be exact in float64.
LARGEST_SIGMA = 2.0**40
# Standard deviation of a model's noise in steps of its grid, at least: rounding d values to it
# raises the clip by at most sqrt(d) * step, for a million values a four-millionth of sigma.
FINE = 32
# Standard deviations that the values may have: less than a factor of 4 below what int64 holds.
MOST_CLIPS = 2.0**28
# Bits before the point of a value on that grid: int64 holds the sum.
LARGEST_STEPS = 2.0**62
# Samples at a time: what is computed of them stays in the cache.
BLOCK = 1 << 16
# Bits of a uniform number that float64 holds exactly.
BITS = 53
# A float64 exp(-x) here is off by less than 2**-50, with the rounding of x.
DOUBT = 2.0**-48

Words = NDArray[np.uint64]
Draw = Callable[[int], Words]


def secure_words() -> Draw:
    """Return what draws unpredictable 64-bit words: AES-256-CTR under a key of `os.urandom`.

    >>> secure_words()(3).shape
    (3,)
    """
    # The counter starts at zero: a key serves for one stream only.
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    return lambda count: np.frombuffer(stream.update(bytes(8 * count)), np.uint64)


def _words_of(generator: np.random.Generator | None) -> Draw:
    if generator is None:
        return secure_words()
    check_kind("generator", generator, np.random.Generator)
    return lambda count: generator.integers(0, 1 << 64, count, np.uint64)


def discrete_gaussian(
    sigma: ArrayLike,
    size: int | tuple[int, ...],
    generator: np.random.Generator | None = None,
) -> NDArray[np.int64]:
    """Draw integers with probabilities proportional to ``exp(-x**2 / (2 * sigma**2))``.

    Parameters
    ----------
    sigma : array_like of float
        From 0 to 2**40; broadcast to `size`. Where it is 0, so is the result. The standard
        deviation is `sigma` from about 1 on, and smaller below.
    size : int or tuple of int
        Shape of the result.
    generator : numpy.random.Generator, optional
        Source of random bits; `secure_words` if not given.

    Returns
    -------
    numpy.ndarray of int64

    Raises
    ------
    ValueError
        If a sigma is not allowed or does not fit the shape.

    Examples
    --------
    >>> discrete_gaussian([0, 1, 1000], 3, np.random.default_rng(5)).tolist()
    [0, -1, 573]
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    flat = _checked_sigma(sigma, shape)
    result = np.zeros(flat.size, np.int64)
    noisy = np.flatnonzero(flat)
    draw = _words_of(generator)
    for start in range(0, noisy.size, BLOCK):
        left = noisy[start : start + BLOCK]
        while left.size:
            kept, values = _candidates(flat[left], draw)
            result[left[kept]] = values
            left = np.delete(left, kept)
    return result.reshape(shape)


def _checked_sigma(sigma: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    given = np.asarray(sigma, np.float64)
    wrong = ~((given >= 0) & (given <= LARGEST_SIGMA))
    if wrong.any():
        raise ValueError(f"sigma: {given[wrong][0]} is not allowed: it should be from 0 to 2**40")
    try:
        return np.broadcast_to(given, shape).reshape(prod(shape))
    except ValueError:
        raise ValueError(f"sigma: shape {given.shape} does not fit size {shape}") from None


def _candidates(
    sigma: NDArray[np.float64], draw: Draw
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Draw one candidate for each; return the places of those accepted, and their values."""
    # Discrete Laplace of an integer scale: remainder + scale * geometric, and a sign.
    scale = np.floor(sigma).astype(np.uint64) + np.uint64(1)
    words = draw(sigma.size)
    remainder = words % scale
    # The last, incomplete run of remainders below 2**64 would favour small ones.
    even = words - remainder <= ~scale + np.uint64(1)
    kept = np.flatnonzero(
        even
        & _coins(
            remainder / scale,
            draw,
            lambda i: Fraction(int(remainder[i]), int(scale[i])),
            sigma.size,
        )
    )
    sigma, scale, remainder = sigma[kept], scale[kept], remainder[kept]
    size = (remainder + scale * _geometric(kept.size, draw)).astype(np.int64)
    negative = (draw(kept.size) & np.uint64(1)).astype(bool)

    whole = scale.astype(np.float64)
    with np.errstate(over="ignore"):
        exponent = np.square((size - sigma * (sigma / whole)) / sigma) / 2

    def exactly(i: int) -> Fraction:
        square = Fraction(float(sigma[i])) ** 2
        return (int(size[i]) - square / int(scale[i])) ** 2 / (2 * square)

    accepted = _coins(exponent, draw, exactly, kept.size)
    # Zero has one sign.
    accepted &= ~(negative & (size == 0))
    return kept[accepted], np.where(negative, -size, size)[accepted]


def _geometric(count: int, draw: Draw) -> Words:
    """Return how many coins of probability 1/e fell before the first that did not."""
    result = np.zeros(count, np.uint64)
    running = np.arange(count)
    one = np.float64(1.0)
    while running.size:
        running = running[_coins(one, draw, lambda _: Fraction(1), running.size)]
        result[running] += np.uint64(1)
    return result


def _coins(
    exponent: NDArray[np.float64] | np.float64,
    draw: Draw,
    exactly: Callable[[int], Fraction],
    count: int,
) -> NDArray[np.bool_]:
    """Return for each whether a uniform number is below ``exp(-exponent)``."""
    uniform = draw(count) >> np.uint64(64 - BITS)
    margin = np.exp(-exponent) - uniform * 2.0**-BITS
    below: NDArray[np.bool_] = margin > 0
    for i in np.flatnonzero(np.abs(margin) < DOUBT):
        below[i] = _is_below(int(uniform[i]), exactly(int(i)), draw)
    return below


def _is_below(uniform: int, exponent: Fraction, draw: Draw) -> bool:
    """Decide one coin: `uniform` holds the first `BITS` bits; more are drawn until it is clear."""
    if exponent == 0:
        return True
    bits = BITS
    with localcontext() as context:
        while True:
            context.prec = 40 + bits // 3
            probability = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
            distance = probability * 2**bits - uniform
            # The number lies between `uniform` and `uniform + 1`.
            if not 0 < distance < 1:
                return bool(distance > 0)
            uniform = uniform << 64 | int(draw(1)[0])
            bits += 64


def device_sigma(noise_multiplier: float, clip: float, devices: int) -> float:
    """Return each device's share of noise, in units of the movement, for a sum over `devices`.

    Devices that drop out take their shares with them: let `devices` be the fewest whose sum is
    still released. Divide by a code's step for the sigma of `discrete_gaussian`.

    >>> device_sigma(1.5, 2.0, 9)
    1.0

    Raises
    ------
    ValueError
        If an argument is not allowed.
    """
    check_number("noise_multiplier", noise_multiplier, least=0)
    check_number("clip", clip, above=0)
    check_number("devices", devices, least=1, whole=True)
    return noise_multiplier * clip / sqrt(devices)


def with_gaussian_noise(
    values: Tensor, sigma: float, generator: np.random.Generator | None = None
) -> Tensor:
    """Return values with Gaussian noise, for a server that adds it to a sum.

    The values are rounded to the nearest multiple of a power of two so small that `sigma` is at
    least 2**32 of them, and a discrete Gaussian is added there. On such a grid it differs from the
    continuous one by less than float64 could show; the last rounding, to float32, is of what is
    already private.

    Parameters
    ----------
    values : Tensor
        Finite floating-point values below 2**30 times `sigma`.
    sigma : float
        Standard deviation, > 0.
    generator : numpy.random.Generator, optional
        As in `discrete_gaussian`.

    Returns
    -------
    Tensor
        Float32 of the same shape, on the CPU.

    Raises
    ------
    ValueError
        If an argument is not allowed.

    Examples
    --------
    >>> with_gaussian_noise(torch.zeros(2), 1.0, np.random.default_rng(0)).dtype
    torch.float32
    """
    check_kind("values", values, Tensor)
    check_number("sigma", sigma, above=1e-200)
    step = 2.0 ** (frexp(sigma)[1] - 1 - FINE)
    steps = values.detach().double().cpu().numpy() / step
    if not (np.abs(steps) < LARGEST_STEPS).all():
        worst = float(values.detach().abs().max())
        raise ValueError(
            f"values: {worst:g} is not allowed: at a sigma of {sigma:g} it should be a number"
            f" below {LARGEST_STEPS * step:g}"
        )
    noise = discrete_gaussian(sigma / step, steps.shape, generator)
    noisy = np.rint(steps).astype(np.int64) + noise
    return torch.from_numpy(np.asarray(noisy * step, np.float32))
