"""How much of a device the published models may tell: epsilon at a delta.

The model. Neighbours differ in one device, whose contribution is replaced by zero; it is at most
the clip. In a round, each device takes part with probability `sampling`, and Gaussian noise of
standard deviation ``noise_multiplier * clip`` is added to the sum. Every device is in one group of
a bit-width, so a round costs what its group costs, and the worst group's cost is everybody's.

Two things that the numbers presuppose. Amplification by sampling holds against those who do not see
who takes part: against a server, which chooses, account with ``sampling=1``. And the sampling is
Poisson's, each device by itself; a fixed number of devices a round is often accounted so, but is
not the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import pi, sqrt

import numpy as np

from core.arguments import check_kind, check_number
from privacy.epsilon import Mechanism, Spent, epsilon_of

__all__ = [
    "Ledger",
    "Mechanism",
    "distributed_noise_multiplier",
    "epsilon_after",
    "noise_for",
    "rounds_within",
]

# Where searches end.
MOST_NOISE, MOST_ROUNDS = 2.0**30, 1_000_000
# Of a noise multiplier that is searched for.
PRECISION = 1e-3
# Below it, the derivation of `distributed_noise_multiplier` does not hold.
LEAST_SIGMA = 0.5


@dataclass(frozen=True)
class Ledger:
    """The rounds so far, of whatever kinds: a value; `add` returns another.

    Attributes
    ----------
    rounds : tuple of (Mechanism, int)
        Kinds of rounds, and how many of each.

    Examples
    --------
    >>> ledger = Ledger().add(Mechanism(2.0), 3).add(Mechanism(4.0)).add(Mechanism(2.0))
    >>> [(mechanism.noise_multiplier, count) for mechanism, count in ledger.rounds]
    [(2.0, 4), (4.0, 1)]
    >>> round(ledger.epsilon(1e-5), 2)
    4.53
    """

    rounds: Spent = ()

    def add(self, mechanism: Mechanism, rounds: int = 1) -> "Ledger":
        """Return the ledger after rounds more.

        Of a round whose groups have different effective noise, the smallest counts.
        """
        check_kind("mechanism", mechanism, Mechanism)
        check_number("rounds", rounds, least=0, whole=True)
        counts = dict(self.rounds)
        counts[mechanism] = counts.get(mechanism, 0) + int(rounds)
        return Ledger(tuple(counts.items()))

    def epsilon(self, delta: float) -> float:
        """Return the epsilon at `delta` after all rounds; infinite if one had no noise."""
        check_number("delta", delta, above=0, below=1)
        return epsilon_of(tuple(entry for entry in self.rounds if entry[1]), delta)

    def to_json(self) -> list[dict[str, object]]:
        """Return what `json.dumps` takes and `from_json` reads."""
        return [{**asdict(mechanism), "rounds": count} for mechanism, count in self.rounds]

    @classmethod
    def from_json(cls, entries: object) -> "Ledger":
        """Return the ledger that `to_json` wrote.

        Raises
        ------
        ValueError
            If it is something else; one line that names it.
        """
        ledger = cls()
        if not isinstance(entries, Iterable) or isinstance(entries, str | bytes | Mapping):
            raise ValueError(f"ledger: {entries!r} is not allowed: it should be a list of entries")
        names = {"noise_multiplier", "sampling", "discrete", "rounds"}
        for entry in entries:
            if not isinstance(entry, Mapping) or set(entry) != names:
                raise ValueError(f"ledger: {entry!r} is not allowed; allowed: {sorted(names)}")
            kind = {name: value for name, value in entry.items() if name != "rounds"}
            ledger = ledger.add(Mechanism(**kind), entry["rounds"])
        return ledger


def epsilon_after(mechanism: Mechanism, rounds: int, delta: float) -> float:
    """Return the epsilon at `delta` after rounds of one kind.

    >>> round(epsilon_after(Mechanism(2.0), 4, 1e-5), 4)
    4.3772

    Raises
    ------
    ValueError
        If an argument is not allowed.
    """
    return Ledger().add(mechanism, rounds).epsilon(delta)


def noise_for(
    epsilon: float, delta: float, rounds: int, sampling: float = 1.0, discrete: bool = False
) -> float:
    """Return the smallest noise multiplier, to 0.1 %, that stays within a budget.

    >>> round(noise_for(4.0, 1e-5, rounds=4), 2)
    2.16

    Raises
    ------
    ValueError
        If an argument is not allowed, or no noise is enough.
    """
    check_number("epsilon", epsilon, above=0)
    check_number("rounds", rounds, least=1, whole=True)

    def enough(noise: float) -> bool:
        return epsilon_after(Mechanism(noise, sampling, discrete), rounds, delta) <= epsilon

    most = 1.0
    while not enough(most):
        most *= 2
        if most > MOST_NOISE:
            raise ValueError(
                f"epsilon: {epsilon:g} is not allowed: at delta {delta:g} no noise is enough for it"
            )
    least = most / 2
    while enough(least) and least > 1 / MOST_NOISE:
        most, least = least, least / 2
    while most > least * (1 + PRECISION):
        middle = sqrt(least * most)
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def rounds_within(epsilon: float, delta: float, mechanism: Mechanism) -> int:
    """Return how many rounds stay within a budget; 1,000,000 if they are as many or more.

    >>> rounds_within(4.5, 1e-5, Mechanism(2.0))
    4

    Raises
    ------
    ValueError
        If an argument is not allowed.
    """
    check_number("epsilon", epsilon, above=0)

    def within(rounds: int) -> bool:
        return epsilon_after(mechanism, rounds, delta) <= epsilon

    most = 1
    while within(most):
        if most >= MOST_ROUNDS:
            return MOST_ROUNDS
        most = min(2 * most, MOST_ROUNDS)
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if within(middle) else (least, middle)
    return least


def distributed_noise_multiplier(
    noise_multiplier: float, sigma_code_min: float, devices: int, dimension: int
) -> float:
    """Return the noise multiplier that a sum of discrete Gaussians is worth, for a `discrete` one.

    A sum of n discrete Gaussians is not quite one. With ``z`` the noise multiplier of the sum and
    ``tau = 10 * sum(exp(-2 * pi**2 * sigma**2 * k / (k + 1)) for k in 1 .. n - 1)``, a round is
    ``e**2 / 2``-concentrated differentially private for

    ``e = min(sqrt(1 / z**2 + tau * d), 1 / z + tau * sqrt(d))``

    and the result is ``1 / e``. It is Theorem 1 of Kairouz et al. (ICML 2021, arXiv:2102.06387) but
    for its ``tau * d / 2``; the double is what follows here. Adding the (k + 1)-th share, the sum's
    mass function is a discrete Gaussian's times a theta function of variance
    ``sigma**2 * k / (k + 1)``, whose largest by smallest value is at most ``exp(5 q)``, where q is
    tau's summand, if ``sigma >= 0.5``. So privacy losses differ by ``tau / 2`` a coordinate at
    most, which adds ``tau * d / 2`` to a Renyi divergence of any order ``a >= 1``, and ``a / 2``
    times ``tau * d`` is no less. The second term is concentrated privacy's triangle inequality.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the sum's noise by the clip (that of the rounded movement), > 0.
    sigma_code_min : float
        Smallest sigma of one device's share, in codes, over all coordinates; at least 0.5.
    devices : int
        How many shares are in the sum.
    dimension : int
        Number of coordinates, d.

    Returns
    -------
    float
        At most `noise_multiplier`.

    Raises
    ------
    ValueError
        If an argument is not allowed.

    Examples
    --------
    >>> round(distributed_noise_multiplier(1.0, 2.0, devices=20, dimension=10**6), 6)
    1.0
    >>> round(distributed_noise_multiplier(1.0, 1.0, devices=20, dimension=10**6), 3)
    0.647
    """
    check_number("noise_multiplier", noise_multiplier, above=0)
    check_number("devices", devices, least=1, whole=True)
    check_number("dimension", dimension, least=1, whole=True)
    check_number("sigma_code_min", sigma_code_min, least=LEAST_SIGMA)
    share = np.arange(1, devices) / np.arange(2, devices + 1)
    tau = 10 * float(np.exp(-2 * (pi * sigma_code_min) ** 2 * share).sum())
    square = noise_multiplier**-2 + tau * dimension
    other = 1 / noise_multiplier + tau * sqrt(dimension)
    return float(min(noise_multiplier, 1 / min(sqrt(square), other)))
