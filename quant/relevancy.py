"""Relevancy masks: which coordinates of a low-bit group's movement may be mixed in.

The paper asks for the binary mask ``c`` that maximizes the cosine between ``c * low`` and
``high``, at most a share ``tau`` of the coordinates being kept. With ``a = low`` and ``b = high``,

    max_c cos(c * a, b)^2 * |b|^2  =  max over (c, lam) of  2 lam <c, a b> - lam^2 <c, a^2>,

because the best ``lam`` for a given ``c`` is ``<c, a b> / <c, a^2>``. For a given ``lam`` every
coordinate stands alone: its gain is ``2 lam a b - lam^2 a^2``, and the best mask takes the
largest positive gains. Without a bound on the size these masks are exactly the prefixes of the
coordinates sorted by ``b / a``, so one sort and one cumulative sum solve the problem exactly;
where a bound binds, ``lam`` is swept and each mask improved by alternating until it no longer
gains. On short vectors that finds the optimum of a search over all masks wherever the optimum has
a positive cosine; where every mask of the size points away from `high`, nearly always.
"""

from math import ceil, floor

import torch
from torch import Tensor

from core.arguments import check_kind

# Masks of short vectors are few and far apart, so that the sweep has to be fine; with many
# coordinates alternation from a few points comes near to the best and costs seconds less.
_SHORT = 4096
_SWEEP_SHORT = 64
_SWEEP_LONG = 4
_ALTERNATIONS = 8


def relevancy_mask(
    low: Tensor, high: Tensor, *, at_most: float = 1.0, at_least: float = 0.0
) -> Tensor:
    """Mask that makes the low-bit movement point most nearly along the high-bit one.

    Parameters
    ----------
    low, high : Tensor
        Movements of the two groups, float, same shape.
    at_most : float
        Largest share of coordinates kept: the paper's ``tau``.
    at_least : float
        Smallest share of coordinates kept. 0.9 drops the least relevant tenth at most; 0 is the
        paper's problem.

    Returns
    -------
    Tensor
        Boolean mask, shape of `low`. Where both movements vanish or no coordinate agrees in sign,
        the smallest mask allowed.

    Raises
    ------
    ValueError
        If the shapes differ or not ``0 <= at_least <= at_most <= 1``.

    Notes
    -----
    The first equation of the paper's section "Selective Weight Aggregation".

    Examples
    --------
    >>> relevancy_mask(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, 0.5]))
    tensor([ True, False,  True])
    """
    check_kind("low", low, Tensor)
    check_kind("high", high, Tensor)
    if low.shape != high.shape:
        raise ValueError(f"movements have shapes {tuple(low.shape)} and {tuple(high.shape)}")
    if not 0 <= at_least <= at_most <= 1:
        raise ValueError(f"0 <= at_least <= at_most <= 1 does not hold for {at_least}, {at_most}")
    a, b = low.reshape(-1).double(), high.reshape(-1).double()
    # The small number keeps 0.29 * 100 from being 28.
    most = floor(at_most * a.numel() + 1e-9)
    least = ceil(at_least * a.numel() - 1e-9)
    least = min(least, most)
    if least == a.numel():
        return torch.ones_like(low, dtype=torch.bool)
    mask = _unbounded_mask(a, b)
    if not least <= int(mask.sum()) <= most:
        mask = _bounded_mask(a, b, least, most, start=mask)
    return mask.reshape(low.shape)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape; 0 if either vanishes.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    0.6
    """
    a, b = a.reshape(-1).double(), b.reshape(-1).double()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else 0.0


def _unbounded_mask(a: Tensor, b: Tensor) -> Tensor:
    mask = torch.zeros(a.numel(), dtype=torch.bool, device=a.device)
    agreeing = torch.nonzero(a * b > 0).squeeze(1)
    if not agreeing.numel():
        return mask
    x, y = a[agreeing], b[agreeing]
    order = torch.argsort(y / x, descending=True, stable=True)
    dots, squares = (x * y)[order].cumsum(0), x.square()[order].cumsum(0)
    last = int(torch.argmax(dots / squares.sqrt()))
    mask[agreeing[order[: last + 1]]] = True
    return mask


def _bounded_mask(a: Tensor, b: Tensor, least: int, most: int, start: Tensor) -> Tensor:
    """Best mask of `least` to `most` entries found by a sweep over ``mu`` and alternation.

    ``mu = lam / 2``; written with it, the gains ``a b - mu a^2`` also hold where even the best mask
    has a negative cosine, and ``mu`` with it.
    """
    dots, squares = a * b, a.square()
    best, best_value = start, -torch.inf
    for mu in _candidates(dots, squares, start):
        mask, value = None, -torch.inf
        for _ in range(_ALTERNATIONS):
            new = _top(dots - mu * squares, least, most)
            dot, square = float(dots[new].sum()), float(squares[new].sum())
            new_value = dot / square**0.5 if square > 0 else 0.0
            if mask is not None and new_value <= value:
                break
            mask, value = new, new_value
            mu = dot / (2 * square) if square > 0 else 0.0
        if mask is not None and value > best_value:
            best, best_value = mask, value
    return best


def _candidates(dots: Tensor, squares: Tensor, start: Tensor) -> list[float]:
    """Values of ``mu`` that cover every size of mask, on a logarithmic scale."""
    ratios = (dots / squares)[squares > 0].abs()
    ratios = ratios[ratios > 0]
    if not ratios.numel():
        return [0.0]
    points = _SWEEP_SHORT if dots.numel() <= _SHORT else _SWEEP_LONG
    low, high = torch.log10(ratios.min()) - 1, torch.log10(ratios.max()) + 1
    sweep = torch.logspace(float(low), float(high), points, dtype=torch.float64).tolist()
    if start.any():
        sweep.append(float(dots[start].sum() / squares[start].sum()) / 2)
    # Negative values serve the case in which no mask of the size has a positive cosine.
    hopeless = dots.numel() <= _SHORT or not (dots > 0).any()
    return [0.0, *sweep, *([-mu for mu in sweep] if hopeless else [])]


def _top(gain: Tensor, least: int, most: int) -> Tensor:
    """Mask of the positive gains, but at least `least` and at most `most` of the largest."""
    mask = gain > 0
    positive = int(mask.sum())
    if positive > most:
        # The fewer are picked, the faster: drop from the positive ones or pick from them.
        candidates = torch.nonzero(mask).squeeze(1)
        drop = torch.topk(gain[candidates], positive - most, largest=False, sorted=False).indices
        mask[candidates[drop]] = False
    elif positive < least:
        candidates = torch.nonzero(~mask).squeeze(1)
        add = torch.topk(gain[candidates], least - positive, sorted=False).indices
        mask[candidates[add]] = True
    return mask
