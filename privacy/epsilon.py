"""Bounds on epsilon for rounds of Gaussian noise, by `dp-accounting`.

Without sampling, Gaussian noise has a closed form (Balle and Wang, ICML 2018). With it, the smaller
bound of Renyi accounting and of privacy loss distributions (PLD) is taken; the second is tighter,
but slow where epsilon is large. Noise that is `discrete` is only known to be as concentrated as
Gaussian noise (Canonne et al., 2020): it has Renyi accounting alone, with the sampling bound for
any mechanism (Zhu and Wang, ICML 2019, Theorem 5). That gives a tenth more without sampling; with
it, a third more or, where noise and sampling are both large, several times as much.

`dp_accounting` takes two seconds to import, so that it is when the first epsilon is computed.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, floor, inf, log, log1p, log2

import numpy as np
from numpy.typing import NDArray

from core.arguments import check_kind, check_number

# Of Renyi's divergence: whole numbers, for which sampled noise is computed fast.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
# Between them privacy loss distributions are computed: their size is epsilon by their resolution,
# 2**-11 of it. And of how many kinds of rounds: each takes a tenth of a second.
LEAST_EPSILON, MOST_EPSILON, MOST_KINDS = 1e-3, 64.0, 16


@dataclass(frozen=True)
class Mechanism:
    """What one round adds and to whom.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise by the clip, >= 0.
    sampling : float
        Probability that a device takes part, > 0 and <= 1.
    discrete : bool
        Whether the noise is discrete Gaussian on a coarse grid, as distributed noise is.

    Examples
    --------
    >>> Mechanism(noise_multiplier=1.1, sampling=0.01)
    Mechanism(noise_multiplier=1.1, sampling=0.01, discrete=False)
    """

    noise_multiplier: float
    sampling: float = 1.0
    discrete: bool = False

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, least=0)
        check_number("sampling", self.sampling, above=0)
        if self.sampling > 1:
            raise ValueError(
                f"sampling: {self.sampling!r} is not allowed: it should be a number > 0, <= 1"
            )
        check_kind("discrete", self.discrete, bool)


Spent = tuple[tuple[Mechanism, int], ...]


@lru_cache(maxsize=4096)
def epsilon_of(spent: Spent, delta: float) -> float:
    """Return epsilon at `delta` after rounds of several kinds, at least one of each.

    >>> round(epsilon_of(((Mechanism(2.0), 4),), 1e-5), 4)
    4.3772
    """
    if not spent:
        return 0.0
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in spent):
        return inf
    if any(mechanism.discrete for mechanism, _ in spent):
        return _by_concentration(spent, delta)
    if all(mechanism.sampling == 1 for mechanism, _ in spent):
        from dp_accounting import get_epsilon_gaussian

        square = sum(count / mechanism.noise_multiplier**2 for mechanism, count in spent)
        with np.errstate(divide="ignore"):
            return float(get_epsilon_gaussian(square**-0.5, delta))
    return _by_dp_accounting(spent, delta)


def _by_dp_accounting(spent: Spent, delta: float) -> float:
    """Return the smaller of the two bounds for sampled Gaussian noise."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting import SelfComposedDpEvent as Repeated
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    def event(mechanism: Mechanism, count: int) -> object:
        gaussian = GaussianDpEvent(mechanism.noise_multiplier)
        return Repeated(PoissonSampledDpEvent(mechanism.sampling, gaussian), count)

    rounds = ComposedDpEvent([event(mechanism, count) for mechanism, count in spent])
    renyi = float(RdpAccountant(ORDERS).compose(rounds).get_epsilon(delta))
    if not LEAST_EPSILON <= renyi <= MOST_EPSILON or len(spent) > MOST_KINDS:
        return renyi
    # A power of two: neighbouring numbers of rounds are computed alike, and epsilon grows with
    # them.
    interval = 2.0 ** (floor(log2(renyi)) - 11)
    losses = PLDAccountant(value_discretization_interval=interval).compose(rounds)
    return min(renyi, float(losses.get_epsilon(delta)))


def _by_concentration(spent: Spent, delta: float) -> float:
    """Return the bound for noise that is only known to be as concentrated as Gaussian noise."""
    from dp_accounting.rdp import compute_epsilon

    # Low orders tell where epsilon is large; a divergence grows with its order, so that the next
    # whole one stands for a fraction.
    orders = (*(1 + i / 20 for i in range(1, 20)), *(2 + i / 4 for i in range(1, 40)), *ORDERS)
    divergence = np.zeros(len(orders))
    for mechanism, count in spent:
        square = mechanism.noise_multiplier**-2
        every = np.array(orders) * square / 2
        if mechanism.sampling < 1:
            whole = [_sampled(ceil(order), square, mechanism.sampling) for order in orders]
            every = np.minimum(every, whole)
        divergence += count * every
    return float(compute_epsilon(orders, divergence, delta)[0])


@cache
def _log_binomials(order: int) -> NDArray[np.float64]:
    from scipy.special import gammaln

    chosen = np.arange(order + 1)
    result = gammaln(order + 1) - gammaln(chosen + 1) - gammaln(order - chosen + 1)
    return np.asarray(result, np.float64)


@lru_cache(maxsize=4096)
def _sampled(order: int, square: float, sampling: float) -> float:
    """Return the divergence of a sampled mechanism, after Zhu and Wang, Theorem 5."""
    taken = np.arange(order + 1)
    terms = _log_binomials(order) + taken * log(sampling) + (order - taken) * log1p(-sampling)
    terms += taken * (taken - 1) * square / 2
    terms[3:] += log(3)
    # Nobody or one taken: no privacy loss.
    terms[0] = (order - 1) * log1p(-sampling) + log(order * sampling - sampling + 1)
    terms[1] = -inf
    most = float(terms.max())
    return (most + log(float(np.exp(terms - most).sum()))) / (order - 1)
