import re
from decimal import Decimal
from itertools import pairwise
from math import isclose

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare

from privacy import noise
from privacy.noise import device_sigma, discrete_gaussian, with_gaussian_noise

SAMPLES = 50_000


def masses(sigma, most):
    """The distribution by its definition, over -most .. most."""
    weights = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def fit(samples, expected):
    """The p-value of samples; rare values are counted together, at each end."""
    most = len(expected) // 2
    counts = np.bincount(np.clip(samples, -most, most) + most, minlength=len(expected))
    often = np.flatnonzero(expected * len(samples) >= 10)
    cuts = [0, *often[1:], len(expected)]
    observed = [counts[a:b].sum() for a, b in pairwise(cuts)]
    wanted = [expected[a:b].sum() * len(samples) for a, b in pairwise(cuts)]
    return chisquare(observed, wanted).pvalue


@pytest.mark.parametrize("sigma", [0.3, 1, 2.5, 5, 40])
def test_the_distribution_is_the_discrete_gaussians(sigma):
    expected = masses(sigma, int(12 * sigma) + 3)
    for seed in range(3):
        samples = discrete_gaussian(sigma, SAMPLES, np.random.default_rng(seed))
        assert samples.dtype == np.int64
        assert fit(samples, expected) > 1e-3


@pytest.mark.parametrize("sigma", [0.3, 1])
def test_a_rounded_gaussian_is_another_distribution(sigma):
    # What the test above can tell apart.
    samples = np.rint(np.random.default_rng(0).normal(0, sigma, SAMPLES)).astype(np.int64)
    assert fit(samples, masses(sigma, 20)) < 1e-9


def test_each_coordinate_has_its_own_sigma_and_no_other_coordinates_noise():
    sigmas = np.tile([0.0, 0.5, 3.0, 1e6, 2.0**33], 20_000)
    drawn = discrete_gaussian(sigmas, sigmas.size, np.random.default_rng(1)).reshape(-1, 5)
    assert not drawn[:, 0].any()
    assert fit(drawn[:, 1], masses(0.5, 9)) > 1e-3
    assert fit(drawn[:, 2], masses(3.0, 40)) > 1e-3
    scaled = drawn[:, 3:] / [1e6, 2.0**33]
    # Moments of a normal: 20,000 samples miss them by 4 standard errors once in 15,000 times.
    assert np.abs(scaled.mean(0)).max() < 4 / 20_000**0.5
    assert np.abs((scaled**2).mean(0) - 1).max() < 4 * (2 / 20_000) ** 0.5
    assert np.abs((scaled**4).mean(0) - 3).max() < 4 * (96 / 20_000) ** 0.5
    correlations = np.corrcoef(drawn[:, 1:].T.astype(float)) - np.eye(4)
    assert np.abs(correlations).max() < 4 / 20_000**0.5


def test_a_sum_of_shares_has_the_variance_and_the_tail_of_one_gaussian():
    shares = discrete_gaussian(2.0, (9, 50_000), np.random.default_rng(2)).sum(0)
    low, high = chi2.ppf([1e-4, 1 - 1e-4], 50_000) / 50_000
    assert low < shares.var() / 36 < high
    # 9 independent ones of sigma 2 sum to one of sigma 6, but for 1e-15.
    assert fit(shares, masses(6.0, 80)) > 1e-3
    # 21 is 3.5 standard deviations; P(X > 20.5) of a normal one is 3.17e-4, of 50,000 16 times.
    assert 4 < (shares >= 21).sum() < 32


@pytest.mark.parametrize("sigma", [0.3, 1.7, 1e-5, 3e5])
def test_where_float64_would_not_do_coins_are_decided_exactly(sigma, monkeypatch):
    """The exact decision of every coin gives the same integers as float64's of clear ones."""
    fast = discrete_gaussian(sigma, 200, np.random.default_rng(3))
    monkeypatch.setattr(noise, "DOUBT", 2.0)
    exact = discrete_gaussian(sigma, 200, np.random.default_rng(3))
    assert np.array_equal(fast, exact)


def test_a_coin_on_the_edge_takes_more_bits():
    # exp(-1) lies between this number of 53 bits and the next.
    edge = int(Decimal(-1).exp() * 2**53)
    words = iter([0, 2**64 - 1])
    one = noise.Fraction(1)
    decided = [noise._is_below(edge, one, lambda _: [next(words)]) for _ in range(2)]
    assert decided == [True, False]
    assert next(words, None) is None
    # Clear ones take none.
    assert noise._is_below(edge - 1, one, None)
    assert not noise._is_below(edge + 1, one, None)
    assert noise._is_below(2**53 - 1, noise.Fraction(0), None)
    # Far in the tail: 2**-53 is more than exp(-40).
    assert not noise._is_below(1, noise.Fraction(40), None)


def test_a_generator_repeats_and_secure_noise_does_not():
    def drawn(generator):
        return discrete_gaussian(50.0, (4, 25), generator).tolist()

    assert drawn(np.random.default_rng(7)) == drawn(np.random.default_rng(7))
    assert drawn(np.random.default_rng(7)) != drawn(np.random.default_rng(8))
    assert drawn(None) != drawn(None)


def test_secure_noise_has_the_distribution_too():
    # Of random keys: by chance it fails once in a million times.
    assert fit(discrete_gaussian(2.5, SAMPLES), masses(2.5, 40)) > 1e-6


@pytest.mark.parametrize("size", [0, (0, 3), (2, 0)])
def test_nothing_is_drawn_for_no_coordinates(size):
    assert discrete_gaussian(1.0, size).size == 0


@pytest.mark.parametrize(
    ("sigma", "size", "words"),
    [
        (-1.0, 3, "sigma: -1.0 is not allowed: it should be from 0 to 2**40"),
        (float("nan"), 3, "sigma: nan is not allowed: it should be from 0 to 2**40"),
        ([1.0, 2.0**41], 2, "sigma: 2199023255552.0 is not allowed"),
        ([1.0, 1.0], 3, "sigma: shape (2,) does not fit size (3,)"),
    ],
)
def test_wrong_sigmas_are_named(sigma, size, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        discrete_gaussian(sigma, size)


def test_a_seed_is_no_generator():
    with pytest.raises(ValueError, match=r"^generator: a int is not allowed"):
        discrete_gaussian(1.0, 3, 5)


def test_a_models_noise_is_gaussian_around_its_values():
    values = torch.full((300, 100), 0.1)
    noisy = with_gaussian_noise(values, 0.02, np.random.default_rng(0))
    assert noisy.dtype == torch.float32
    assert noisy.shape == values.shape
    apart = (noisy.double() - 0.1) / 0.02
    assert abs(float(apart.mean())) < 4 / 30_000**0.5
    assert abs(float(apart.var()) - 1) < 4 * (2 / 30_000) ** 0.5


def test_a_models_noisy_values_lie_on_a_grid():
    """Multiples of 2**-34 for a sigma of 0.3; float32 has finer ones, around zero."""
    values = torch.linspace(-0.1, 0.1, 100_000)
    noisy = with_gaussian_noise(values, 0.3, np.random.default_rng(0)).double()
    assert (noisy * 2.0**34 % 1 == 0).all()
    # As many of a continuous Gaussian do not.
    off_grid = np.random.default_rng(0).normal(values, 0.3).astype(np.float32).astype(np.float64)
    assert (off_grid * 2.0**34 % 1 != 0).sum() > 10


def test_a_value_too_far_from_its_noise_is_named():
    words = "values: inf is not allowed: at a sigma of 0.5 it should be a number below 5.36871e+08"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        with_gaussian_noise(torch.tensor([1.0, float("inf")]), 0.5)


def test_the_shares_of_a_groups_devices_add_up():
    share = device_sigma(1.5, 0.2, devices=7)
    assert isclose(7 * share**2, (1.5 * 0.2) ** 2)
