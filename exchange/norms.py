"""Updates that are finite but far too large, which one client could ruin the model with."""

from collections.abc import Iterable, Mapping
from math import sqrt

from torch import Tensor

from quant import is_statistic

Norms = Mapping[str, float]


def norms_of(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the Euclidean norms of a model's parameters and of its BatchNorm statistics."""
    squares = {"parameters": 0.0, "statistics": 0.0}
    for name, tensor in values.items():
        squares[_kind(name)] += float(tensor.norm()) ** 2
    return norms_from(**squares)


def norms_from(parameters: float, statistics: float) -> dict[str, float]:
    """Return the same from their sums of squares."""
    return {"parameters": sqrt(parameters), "statistics": sqrt(statistics)}


def scale_of(model: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norms that updates are measured by: a model's, or if it is all zeros, of ones.

    A linear model may begin with zeros, beside which everything would be too large.
    """
    counts = {"parameters": 0, "statistics": 0}
    for name, tensor in model.items():
        counts[_kind(name)] += tensor.numel()
    return {kind: norm or sqrt(counts[kind]) for kind, norm in norms_of(model).items()}


def all_small(largest: Iterable[Norms], sent: Norms, bound: float) -> bool:
    """Return whether no update can be `too_large`, whatever the others are.

    Parameters
    ----------
    largest : iterable of mapping
        Norms that the updates have at most.
    sent, bound
        As of `too_large`.
    """
    most = _most(sent, bound)
    return all(norms[kind] <= most[kind] for norms in largest for kind in most)


def too_large(updates: Mapping[int, Norms], sent: Norms, bound: float) -> dict[int, str]:
    """Say which updates are out of all proportion.

    An update may be `bound` times as large as the model that was sent, or as the round's median
    update if that is larger. The model alone would not do, as all honest clients may leave a small
    one far behind; nor the median, as all but one may stand still. Of an even number the lower
    median is taken, so that of two clients the smaller one counts.

    One that comes alone is its own median, and is held against the model only. Statistics may be
    the square of `bound` times as large as the model's, as variances grow so when weights grow by
    `bound`.

    Parameters
    ----------
    updates : mapping of int to mapping
        `norms_of` the decoded update of each partition.
    sent : mapping
        `scale_of` the model that was sent.
    bound : float
        From 1; 0 lets everything pass.

    Returns
    -------
    dict of int to str
        The reason by partition.
    """
    reasons: dict[int, str] = {}
    if not bound or not updates:
        return reasons
    alone = len(updates) == 1
    for kind, by_model in _most(sent, bound).items():
        norms = sorted(norms[kind] for norms in updates.values())
        median = 0.0 if alone else norms[(len(norms) - 1) // 2]
        most = max(by_model, median * bound)
        for partition, own in updates.items():
            if own[kind] > most:
                reasons[partition] = (
                    f"its {kind} have a norm of {own[kind]:.3g}; norm-bound {bound:g} allows "
                    f"{most:.3g}"
                )
    return reasons


def _most(sent: Norms, bound: float) -> dict[str, float]:
    """Norms that are allowed whatever the other updates are."""
    return {k: n * (bound**2 if k == "statistics" else bound) for k, n in sent.items()}


def _kind(name: str) -> str:
    return "statistics" if is_statistic(name) else "parameters"
