import ast
import json
from math import erfc, exp, inf, sqrt
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from privacy.accounting import (
    Ledger,
    Mechanism,
    distributed_noise_multiplier,
    epsilon_after,
    noise_for,
    rounds_within,
)

PRIVACY = Path(__file__).parents[2] / "privacy"
DELTA = 1e-5


def gaussian_delta(epsilon, noise):
    """Balle and Wang (ICML 2018), Theorem 8, for a sensitivity of 1."""
    low, high = (epsilon * noise - 0.5 / noise), (epsilon * noise + 0.5 / noise)
    return erfc(low / sqrt(2)) / 2 - exp(epsilon) * erfc(high / sqrt(2)) / 2


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0, 10.0])
def test_one_round_is_the_closed_form(noise):
    epsilon = epsilon_after(Mechanism(noise), 1, DELTA)
    assert gaussian_delta(epsilon - 1e-6, noise) > DELTA
    assert gaussian_delta(epsilon + 1e-6, noise) < DELTA


def test_rounds_without_sampling_add_up_as_one_gaussian():
    # 9 rounds at noise 3 and 4 at 2 are 1 + 1 = 2 of noise 1, that is one of 2**-0.5.
    ledger = Ledger().add(Mechanism(3.0), 9).add(Mechanism(2.0), 4)
    assert ledger.epsilon(DELTA) == pytest.approx(epsilon_after(Mechanism(0.5**0.5), 1, DELTA))


@pytest.mark.parametrize(("noise", "sampling"), [(1.0, 0.1), (2.0, 0.5)])
def test_one_sampled_round_is_the_integral(noise, sampling):
    """The hockey-stick divergence of the mixture and the noise, both ways, integrated."""

    def mixture(x):
        return (1 - sampling) * norm.pdf(x, 0, noise) + sampling * norm.pdf(x, 1, noise)

    def delta(epsilon):
        def beyond(x, one, other):
            return max(0.0, one(x) - exp(epsilon) * other(x))

        def alone(x):
            return norm.pdf(x, 0, noise)

        ends = (-12 * noise, 12 * noise + 1)
        pairs = ((mixture, alone), (alone, mixture))
        return max(quad(beyond, *ends, args=pair, limit=200)[0] for pair in pairs)

    epsilon = epsilon_after(Mechanism(noise, sampling), 1, 1e-3)
    assert delta(epsilon * 0.998) > 1e-3
    assert delta(epsilon) < 1e-3 * 1.001


@pytest.mark.parametrize(
    ("noise", "sampling", "rounds", "published"),
    [
        # TensorFlow Privacy, tutorials/README.md, MNIST in batches of 256 of 60,000.
        (1.12, 256 / 60000, 14062, 2.92),
        (0.6, 256 / 60000, 7031, 9.74),
        (1.2, 256 / 60000, 2343, 1.20),
        # Opacus, accountants_test.py: its Renyi accountant.
        (1.5, 0.04, 2250, 7.32911117143),
    ],
)
def test_published_epsilons_of_renyi_accountants_are_upper_bounds(
    noise, sampling, rounds, published
):
    """They are of looser bounds; loss distributions save a tenth to a third of them."""
    epsilon = epsilon_after(Mechanism(noise, sampling), rounds, DELTA)
    assert 0.6 * published < epsilon < published


def test_many_sampled_rounds_are_near_the_central_limit():
    """Opacus, accountants_test.py: 6.59 to 6.6 by the limit, which is a little too small."""
    assert 6.59 < epsilon_after(Mechanism(1.5, 0.04), 2250, DELTA) < 6.59 * 1.03


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("sampling", [0.3, 1.0])
def test_epsilon_grows_with_rounds_and_sampling_and_falls_with_noise_and_delta(sampling, discrete):
    def epsilon(rounds=50, noise=1.5, sampling=sampling, delta=DELTA):
        return epsilon_after(Mechanism(noise, sampling, discrete), rounds, delta)

    assert epsilon() < epsilon(rounds=51) < epsilon(rounds=200)
    assert epsilon(noise=3.0) < epsilon(noise=1.6) < epsilon()
    assert epsilon(sampling=sampling / 2) < epsilon() < epsilon(delta=DELTA / 10)


@pytest.mark.parametrize(("noise", "sampling"), [(1.0, 1.0), (2.0, 0.3), (1.0, 0.01)])
def test_discrete_noise_costs_no_less_than_gaussian_noise(noise, sampling):
    gaussian = epsilon_after(Mechanism(noise, sampling), 20, DELTA)
    discrete = epsilon_after(Mechanism(noise, sampling, discrete=True), 20, DELTA)
    alone = epsilon_after(Mechanism(noise, discrete=True), 20, DELTA)
    assert gaussian < discrete <= alone


def test_discrete_noise_without_sampling_is_concentrated_privacys_bound():
    """Canonne et al., Proposition 12: the least of r(a) + log(1 - 1/a) - log(a delta) / (a - 1)."""
    orders = np.linspace(1.01, 60, 100_000)
    losses = orders * 8 / (2 * 2.0**2) + np.log1p(-1 / orders)
    least = (losses - np.log(orders * DELTA) / (orders - 1)).min()
    epsilon = epsilon_after(Mechanism(2.0, discrete=True), 8, DELTA)
    assert least <= epsilon < least * 1.005


def test_the_bound_of_any_sampled_mechanism_by_hand():
    """Zhu and Wang, Theorem 5, of order 3: the sum of its four terms."""
    from privacy.epsilon import _sampled

    q, square = 0.1, 0.25
    none_or_one = 0.9**2 * (3 * q - q + 1)
    two = 3 * q**2 * 0.9 * exp(2 * square / 2)
    three = 3 * q**3 * exp(2 * 3 * square / 2)
    assert _sampled(3, square, q) == pytest.approx(np.log(none_or_one + two + three) / 2)


def test_no_rounds_cost_nothing_and_no_noise_costs_all():
    assert Ledger().epsilon(DELTA) == 0
    assert epsilon_after(Mechanism(1.0), 0, DELTA) == 0
    assert epsilon_after(Mechanism(0.0, 0.1), 0, DELTA) == 0
    assert Ledger().add(Mechanism(5.0), 3).add(Mechanism(0.0)).epsilon(DELTA) == inf


@pytest.mark.parametrize(
    ("epsilon", "rounds", "sampling", "discrete"),
    [(2.0, 10, 1.0, False), (8.0, 5, 0.3, False), (0.5, 100, 1.0, True), (40.0, 1, 1.0, True)],
)
def test_the_noise_for_a_budget_is_the_least(epsilon, rounds, sampling, discrete):
    noise = noise_for(epsilon, DELTA, rounds, sampling, discrete)
    assert epsilon_after(Mechanism(noise, sampling, discrete), rounds, DELTA) <= epsilon
    assert epsilon_after(Mechanism(noise / 1.01, sampling, discrete), rounds, DELTA) > epsilon


@pytest.mark.parametrize("mechanism", [Mechanism(3.0), Mechanism(2.0, 0.3), Mechanism(0.1)])
def test_the_rounds_within_a_budget_are_the_most(mechanism):
    rounds = rounds_within(3.0, DELTA, mechanism)
    assert epsilon_after(mechanism, rounds, DELTA) <= 3
    assert epsilon_after(mechanism, rounds + 1, DELTA) > 3
    assert rounds or mechanism.noise_multiplier == 0.1


def test_searches_end():
    assert rounds_within(1.0, DELTA, Mechanism(1e7)) == 1_000_000
    with pytest.raises(ValueError, match=r"^epsilon: 1e-12 is not allowed: at delta 1e-300 no "):
        noise_for(1e-12, 1e-300, 10)


def test_a_ledger_survives_a_checkpoint():
    ledger = (
        Ledger()
        .add(Mechanism(1 / 3, 0.1), 3)
        .add(Mechanism(2.0, 1.0, True))
        .add(Mechanism(1 / 3, 0.1))
    )
    assert dict(ledger.rounds) == {Mechanism(1 / 3, 0.1): 4, Mechanism(2.0, 1.0, True): 1}
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    assert again.epsilon(DELTA) == ledger.epsilon(DELTA)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (None, "ledger: None is not allowed: it should be a list"),
        ("[]", r"ledger: '\[\]' is not allowed: it should be a list"),
        ([{"noise_multiplier": 1.0}], r"ledger: \{'noise_multiplier': 1.0\} is not allowed"),
        (
            [{"noise_multiplier": -1.0, "sampling": 1.0, "discrete": False, "rounds": 1}],
            "noise_multiplier: -1.0 is not allowed: it should be a number >= 0",
        ),
        (
            [{"noise_multiplier": 1.0, "sampling": 1.0, "discrete": 0, "rounds": 1}],
            "discrete: a int is not allowed",
        ),
        (
            [{"noise_multiplier": 1.0, "sampling": 1.0, "discrete": False, "rounds": -1}],
            "rounds: -1 is not allowed: it should be a whole number >= 0",
        ),
    ],
)
def test_what_is_no_ledger_is_refused(entries, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Ledger.from_json(entries)


@pytest.mark.parametrize("sampling", [0.0, 1.5, float("nan"), "1"])
def test_a_sampling_is_a_probability(sampling):
    with pytest.raises(
        ValueError, match=r"^sampling: .* is not allowed: it should be a number > 0"
    ):
        Mechanism(1.0, sampling)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_a_delta_is_between_0_and_1(delta):
    with pytest.raises(ValueError, match=r"^delta: .* is not allowed: it should be a number "):
        Ledger().epsilon(delta)


def test_the_sum_of_shares_is_worth_less_by_hand():
    # Two shares: tau = 10 exp(-pi**2 * 0.49). Of one coordinate, the square is less.
    tau = 10 * exp(-(np.pi**2) * 0.49)
    expected = 1 / sqrt(1 / 1.5**2 + tau)
    assert distributed_noise_multiplier(1.5, 0.7, 2, 1) == pytest.approx(expected)
    # Of many, the triangle inequality's sum.
    expected = 1 / (1 / 1.5 + tau * 20)
    assert distributed_noise_multiplier(1.5, 0.7, 2, 400) == pytest.approx(expected)
    assert distributed_noise_multiplier(1.5, 0.7, 1, 4) == pytest.approx(1.5)
    assert distributed_noise_multiplier(1.5, 4.0, 100, 10**8) == 1.5


@pytest.mark.parametrize(("sigma", "devices"), [(0.5, 2), (0.5, 5), (0.8, 3)])
def test_the_sum_of_shares_loses_no_more_than_that(sigma, devices):
    """The Renyi divergences of the exact sum and its neighbour, by convolution."""
    share = np.exp(-(np.arange(-40, 41) ** 2) / (2 * sigma**2))
    total = share / share.sum()
    for _ in range(devices - 1):
        total = np.convolve(total, share / share.sum())
    near = total > 1e-250
    for moved in (1, 2):
        one, other = np.log(total[near][moved:]), np.log(total[near][:-moved])
        effective = distributed_noise_multiplier(
            sigma * sqrt(devices) / moved, sigma, devices, dimension=1
        )
        for order in (1.01, 1.5, 2.0, 4.0, 8.0):
            terms = np.exp(order * one + (1 - order) * other)
            divergence = np.log(terms.sum()) / (order - 1)
            assert divergence <= order / (2 * effective**2)


def test_shares_too_small_for_the_bound_are_refused():
    with pytest.raises(ValueError, match=r"^sigma_code_min: 0.4 is not allowed: .* >= 0.5$"):
        distributed_noise_multiplier(1.0, 0.4, 10, 1000)


def test_nothing_slow_is_imported_before_it_is_needed():
    for path in PRIVACY.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", ())]
            names.append(getattr(node, "module", None) or "")
            assert not {name.split(".")[0] for name in names} & {"dp_accounting", "scipy"}, path
