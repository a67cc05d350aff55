import math

import numpy as np
import pytest
import torch

from quant import cosine, relevancy_mask


def masks_of(size):
    return (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)


def brute_force(low, high, least, most):
    """Largest cosine of mask * low with high, over all masks of `least` to `most` entries."""
    masks = masks_of(low.size)
    sizes = masks.sum(1)
    kept = masks[(least <= sizes) & (sizes <= most)] * low
    norms = np.linalg.norm(kept, axis=1) * np.linalg.norm(high)
    return np.divide(kept @ high, norms, out=np.zeros(len(kept)), where=norms > 0).max()


def vectors(rng, size, kind):
    if kind == "integers":  # many ties and zeros
        return rng.integers(-3, 4, (2, size)).astype(float)
    if kind == "wide":  # magnitudes over six decades
        return rng.normal(size=(2, size)) * 10 ** rng.uniform(-3, 3, (2, size))
    if kind == "alike":
        high = rng.normal(size=size)
        return np.stack([high + 0.5 * rng.normal(size=size), high])
    return rng.normal(size=(2, size))


def mask_cosine(mask, low, high):
    return cosine(torch.from_numpy(mask.numpy() * low), torch.from_numpy(high))


KINDS = ["normal", "integers", "wide", "alike"]


@pytest.mark.parametrize("kind", KINDS)
def test_unbounded_mask_is_the_best_of_all(kind):
    rng = np.random.default_rng(0)
    for _ in range(80):
        size = int(rng.integers(1, 10))
        low, high = vectors(rng, size, kind)
        mask = relevancy_mask(torch.from_numpy(low), torch.from_numpy(high))
        best = brute_force(low, high, 0, size)
        assert math.isclose(mask_cosine(mask, low, high), best, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", ["at_most", "at_least", "both"])
def test_bounded_mask_is_the_best_of_all_where_that_points_along_high(kind, bound):
    rng = np.random.default_rng(1)
    checked = 0
    for _ in range(25):
        size = int(rng.integers(2, 10))
        low, high = vectors(rng, size, kind)
        least, most = sorted(rng.integers(0, size + 1, 2).tolist())
        least, most = {"at_most": (0, most), "at_least": (least, size)}.get(bound, (least, most))
        # Whole counts as shares that rounding cannot move.
        shares = {"at_most": min(1, (most + 0.25) / size), "at_least": max(0, least - 0.25) / size}
        mask = relevancy_mask(torch.from_numpy(low), torch.from_numpy(high), **shares)
        assert least <= int(mask.sum()) <= most
        best = brute_force(low, high, least, most)
        found = mask_cosine(mask, low, high)
        assert found <= best + 1e-12
        if best > 1e-12:
            checked += 1
            assert math.isclose(found, best, rel_tol=1e-9), (low, high, least, most)
    assert checked > 8


def test_a_bounded_mask_that_a_coarse_sweep_misses():
    # Three of ten entries; four points in place of 64 find 0.504 only. Compared with all masks.
    low = np.array([0.0, 3, -2, 0, -2, 3, -1, -3, -2, 2])
    high = np.array([1.0, 2, 1, 3, -1, 0, -3, 2, -1, -2])
    mask = relevancy_mask(torch.from_numpy(low), torch.from_numpy(high), at_most=0.3)
    best = brute_force(low, high, 0, 3)
    assert best == pytest.approx(0.5144957554)
    assert mask_cosine(mask, low, high) == pytest.approx(best, rel=1e-9)


def test_three_coordinates_by_hand():
    # low (1, 1, -1), high (2, 1, 1): cos = <c low, high> / (|c low| sqrt 6). Keeping 1: 2 / sqrt 6
    # = 0.816; keeping 1 and 2: 3 / (sqrt 2 sqrt 6) = 0.866; all: 2 / (sqrt 3 sqrt 6) = 0.471.
    low, high = torch.tensor([1.0, 1, -1]), torch.tensor([2.0, 1, 1])
    assert relevancy_mask(low, high).tolist() == [True, True, False]
    assert relevancy_mask(low, high, at_most=1 / 3).tolist() == [True, False, False]
    assert relevancy_mask(low, high, at_least=1.0).tolist() == [True, True, True]
    assert cosine(low * torch.tensor([1, 1, 0]), high) == pytest.approx(math.sqrt(3) / 2)


def test_four_coordinates_by_hand():
    # low (1, 2, 4, 1), high (3, 2, 1, -1): b / a is 3, 1, 1/4, -1, so that only prefixes of that
    # order can win. <., high> / |.|: 3 / 1 = 3; 7 / sqrt 5 = 3.130; 11 / sqrt 21 = 2.400.
    low, high = torch.tensor([1.0, 2, 4, 1]), torch.tensor([3.0, 2, 1, -1])
    assert relevancy_mask(low, high).tolist() == [True, True, False, False]
    # One entry: 3 / 1, 4 / 2, 4 / 4, -1. Three: without the last 2.400, without the third
    # 6 / sqrt 6 = 2.449, which is the best.
    assert relevancy_mask(low, high, at_most=0.25).tolist() == [True, False, False, False]
    assert relevancy_mask(low, high, at_least=0.75).tolist() == [True, True, False, True]


def test_mask_keeps_the_shape_and_leaves_the_movements_alone():
    low, high = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    before = low.clone(), high.clone()
    mask = relevancy_mask(low, high, at_most=0.4)
    assert mask.dtype == torch.bool
    assert mask.shape == low.shape
    assert mask.sum() <= 24
    assert torch.equal(low, before[0])
    assert torch.equal(high, before[1])


@pytest.mark.parametrize("zero", ["low", "high", "both", "opposed"])
@pytest.mark.parametrize(("at_least", "kept"), [(0.0, 0), (0.5, 3), (0.9, 6)])
def test_where_nothing_agrees_the_smallest_mask_is_taken(zero, at_least, kept):
    # Sizes by hand: ceil(0.5 * 6) = 3, ceil(0.9 * 6) = ceil(5.4) = 6.
    some = torch.tensor([1.0, -2, 3, 0.5, -1, 4])
    low = torch.zeros(6) if zero in ("low", "both") else some
    high = torch.zeros(6) if zero in ("high", "both") else some
    if zero == "opposed":
        high = -some
    assert int(relevancy_mask(low, high, at_least=at_least).sum()) == kept


@pytest.mark.parametrize(("at_least", "dropped"), [(0.9, 10), (0.5, 50), (1.0, 0)])
def test_at_least_bounds_what_is_dropped(at_least, dropped):
    # All coordinates disagree but one, so that as many are dropped as may be.
    low = torch.arange(1.0, 101)
    high = -low
    high[7] = 1
    mask = relevancy_mask(low, high, at_least=at_least)
    assert int((~mask).sum()) == dropped
    assert mask[7]


def test_a_long_vector_meets_the_best_prefix():
    # Without a bound the optimum is a prefix of the coordinates sorted by high / low: the best is
    # found here by trying each in a Python loop. Above 4096 coordinates the code sweeps coarsely.
    rng = np.random.default_rng(3)
    low, high = rng.normal(size=(2, 6000))
    order = sorted(np.flatnonzero(low * high > 0), key=lambda i: -high[i] / low[i])
    dot = square = best = 0.0
    for i in order:
        dot, square = dot + low[i] * high[i], square + low[i] ** 2
        best = max(best, dot / math.sqrt(square) / np.linalg.norm(high))
    found = relevancy_mask(torch.from_numpy(low), torch.from_numpy(high))
    assert mask_cosine(found, low, high) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_a_long_vector_with_a_bound_beats_simple_choices(share):
    # Candidates of the same size: the largest products, the best ratios, the largest |high|.
    rng = np.random.default_rng(4)
    low, high = rng.normal(size=(2, 6000))
    count = round(share * 6000)
    mask = relevancy_mask(torch.from_numpy(low), torch.from_numpy(high), at_most=share + 1e-6)
    assert int(mask.sum()) <= count
    found = mask_cosine(mask, low, high)
    agree = low * high > 0
    for score in (low * high, np.where(agree, high / low, -1), np.where(agree, abs(high), -1)):
        candidate = np.zeros(6000)
        candidate[np.argsort(-score)[:count]] = 1
        value = (candidate * low) @ high / np.linalg.norm(candidate * low) / np.linalg.norm(high)
        assert found >= value - 1e-9


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (3, 2)), ((6,), (2, 3)), ((1,), (3,))])
def test_shapes_that_differ_are_refused(shapes):
    low, high = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="shapes"):
        relevancy_mask(low, high)


@pytest.mark.parametrize(
    ("at_least", "at_most"),
    [(-0.1, 1), (0, 1.1), (0.6, 0.5), (0, -1), (math.nan, 1), (0, math.nan)],
)
def test_bad_bounds_are_refused(at_least, at_most):
    with pytest.raises(ValueError, match="at_least <= at_most"):
        relevancy_mask(torch.ones(4), torch.ones(4), at_most=at_most, at_least=at_least)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_equal_bounds_give_that_size(n):
    low, high = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    for tenths in range(11):
        mask = relevancy_mask(low, high, at_most=tenths / 10, at_least=tenths / 10)
        # n is a multiple of ten, so that the share is a whole number of coordinates.
        assert int(mask.sum()) == n * tenths // 10


def test_cosine_by_hand():
    # (3, 4) and (4, 3): 24 / 25. A vanishing vector has no direction: 0.
    assert cosine(torch.tensor([[3.0], [4.0]]), torch.tensor([[4.0], [3.0]])) == pytest.approx(0.96)
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([-2.0, 0])) == -1
    assert cosine(torch.zeros(2), torch.ones(2)) == 0
