"""An audit: what a membership game learns is within what the accountant grants, or it tells."""

from math import log

import numpy as np
import pytest
from scipy.stats import beta

from privacy.accounting import Mechanism, epsilon_after
from privacy.clipping import round_within
from privacy.noise import device_sigma, discrete_gaussian

TRIALS, DEVICES, SIZE, CLIP, DELTA = 2000, 8, 16, 1.0, 1e-5
# The canary is known to who plays: along this direction, and as long as the clip allows.
STEPS = np.linspace(0.01, 0.05, SIZE)
CANARY = np.full(SIZE, CLIP / SIZE**0.5)


def released(noise_multiplier, present, generator):
    """What a round releases in each trial: codes of eight devices, the canary's among them or 0."""
    others = generator.normal(size=(DEVICES - 1, SIZE))
    others *= CLIP / np.linalg.norm(others, axis=1, keepdims=True)
    whole = sum(round_within(other / STEPS, STEPS, CLIP, generator) for other in others)
    canary = round_within(CANARY / STEPS, STEPS, CLIP, generator)
    sigma = device_sigma(noise_multiplier, CLIP, DEVICES) / STEPS
    noise = discrete_gaussian(sigma, (TRIALS, DEVICES, SIZE), generator).sum(1)
    return whole, whole + present[:, None] * canary + noise


def least_epsilon(noise_multiplier, seed):
    """Return the epsilon that a game shows to be exceeded, with 95 % confidence."""
    generator = np.random.default_rng(seed)
    present = generator.random(TRIALS) < 0.5
    # The worst case that the guarantee is for: all else is known.
    known, sums = released(noise_multiplier, present, generator)
    score = ((sums - known) * STEPS) @ CANARY / CLIP
    # The threshold is chosen on one half, and judged on the other.
    half = TRIALS // 2
    chosen = max(np.linspace(-2, 3, 51), key=lambda at: bound(score[:half] > at, present[:half]))
    return bound(score[half:] > chosen, present[half:])


def bound(said, present):
    """Clopper and Pearson's bounds of the two rates, and the epsilon that they need."""
    right, wrong = said[present].sum(), said[~present].sum()
    least = beta.ppf(0.025, right, present.sum() - right + 1) if right else 0.0
    absent = (~present).sum()
    most = beta.ppf(0.975, wrong + 1, absent - wrong) if wrong < absent else 1.0
    return log((least - DELTA) / most) if least > DELTA else -np.inf


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0])
def test_with_noise_the_game_stays_within_the_account(noise_multiplier):
    granted = epsilon_after(Mechanism(noise_multiplier, discrete=True), 1, DELTA)
    shown = least_epsilon(noise_multiplier, seed=1)
    # It learns something, or it would find no fault.
    assert 0.1 < shown < granted


def test_without_noise_or_with_a_tenth_of_it_the_game_tells():
    granted = epsilon_after(Mechanism(2.0, discrete=True), 1, DELTA)
    assert granted < 2.5
    assert least_epsilon(0.0, seed=1) > 2 * granted
    assert least_epsilon(0.2, seed=1) > 2 * granted
