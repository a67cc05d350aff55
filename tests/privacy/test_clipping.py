import re
from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import clipping
from privacy.clipping import (
    clip_factor,
    next_clip,
    noise_beside_count,
    norm_of,
    round_within,
    rounded_clip,
)


def length(codes, steps):
    return float(np.sqrt(np.sum((np.asarray(codes) * steps) ** 2)))


def test_the_norm_is_of_all_tensors_in_float64():
    movement = {"a": torch.full((2, 8), 0.25), "b": torch.tensor([2.0]), "none": torch.zeros(0)}
    # 16 / 16 + 4.
    assert norm_of(movement) == pytest.approx(sqrt(5), rel=1e-15)
    # A float32 square of it would be infinite.
    assert norm_of({"a": torch.tensor([1e30, 1e30])}) == pytest.approx(sqrt(2) * 1e30, rel=1e-6)
    assert norm_of({}) == 0


def test_a_tensor_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"^movement: b has norm nan; allowed: finite tensors$"):
        norm_of({"a": torch.ones(1), "b": torch.tensor([1.0, float("nan")])})


def test_what_is_short_stays_and_what_is_long_is_shortened():
    assert clip_factor(0.0, 1.0) == 1
    assert clip_factor(2.0, 2.0) == 1
    assert clip_factor(8.0, 2.0) == 0.25


@pytest.mark.parametrize(("norm", "clip"), [(float("nan"), 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_wrong_norms_are_refused(norm, clip):
    with pytest.raises(ValueError, match=" is not allowed: it should be a number "):
        clip_factor(norm, clip)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
    coarse=st.floats(-3, 3),
    clip=st.floats(-12, 6).map(lambda power: 10.0**power),
    fill=st.sampled_from([0.0, 0.3, 1.0, 1 + 1e-6]),
)
def test_rounding_never_exceeds_the_clip(seed, count, coarse, clip, fill):
    generator = np.random.default_rng(seed)
    # From many steps to the clip to a thousandth of one; the movement fills it, and a little more.
    steps = clip * 10.0 ** (coarse + generator.uniform(-1, 1, count))
    movement = generator.normal(size=count)
    movement *= fill * clip / np.linalg.norm(movement)
    codes = round_within(movement / steps, steps, clip, generator)
    assert codes.dtype == np.int64
    assert length(codes, steps) <= clip * (1 + 1e-14)
    assert (np.abs(codes - movement / steps) <= 1 + 1e-5 * np.abs(movement / steps)).all()
    assert fill or not codes.any()


def test_what_float32_left_too_long_is_shortened_where_no_rounding_would_help():
    # Whole codes, whose norm is 5.000015.
    codes = round_within([3.0, 4.0], 1.000003, 5.0, np.random.default_rng(0))
    assert sorted(codes.tolist()) in ([2, 4], [3, 3], [2, 3])


def test_the_mean_is_kept_where_the_clip_leaves_room():
    generator = np.random.default_rng(0)
    codes = np.array([0.25, -0.75, 3.5, 0.0, -2.0])
    steps = np.array([0.1, 0.2, 0.1, 1.0, 0.3])
    drawn = [round_within(codes, steps, 2.0, generator) for _ in range(2000)]
    # The fractions' standard deviation is at most 1/2.
    assert np.abs(np.mean(drawn, 0) - codes).max() < 4 * 0.5 / 2000**0.5
    assert {tuple(row[3:]) for row in drawn} == {(0, -2)}


def test_the_generator_decides():
    codes = np.random.default_rng(1).normal(size=50)

    def rounded(seed):
        return round_within(codes, 0.01, 1.0, np.random.default_rng(seed)).tolist()

    assert rounded(3) == rounded(3)
    assert rounded(3) != rounded(4)


def test_without_room_all_are_rounded_toward_zero(monkeypatch):
    monkeypatch.setattr(clipping, "DRAWS", 0)
    codes = round_within([2.9, -1.9, -0.9], 0.1, 0.36, np.random.default_rng(0))
    assert codes.tolist() == [2, -1, 0]


@pytest.mark.parametrize(
    ("codes", "steps", "words"),
    [
        ([3.0, 4.1], 1.0, "movement_in_codes: norm 5.08035 is not allowed: it should be at most"),
        ([float("nan")], 1.0, "movement_in_codes: norm nan is not allowed"),
        ([1.0], 0.0, "steps: 0.0 is not allowed: it should be a number > 0"),
        ([1.0], [1.0, 1.0], "steps: shape (2,) does not fit codes of (1,)"),
    ],
)
def test_what_was_not_clipped_is_refused(codes, steps, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        round_within(codes, steps, 5.0, np.random.default_rng(0))


@pytest.mark.parametrize("step", [1e-3, 0.05, 3.0])
def test_rounding_keeps_the_norm_that_it_is_said_to(step):
    """Of a movement that fills the clip; on a coarse grid the most room is needed."""
    generator = np.random.default_rng(0)
    steps = step * generator.uniform(0.2, 1, 400)
    movement = generator.normal(size=400)
    movement /= np.linalg.norm(movement)
    within = rounded_clip(1.0, steps)
    codes = movement / steps
    drawn = [np.floor(codes + generator.random(400)) for _ in range(500)]
    # Hoeffding's bound promises 39 %; 4 standard errors less are 31 %.
    assert np.mean([length(row, steps) <= within for row in drawn]) > 0.31
    assert 1 < within <= 1 + np.linalg.norm(steps)


def test_the_room_for_rounding_by_hand():
    # 1 + 100 * 0.01 / 4, and sqrt(2 log 2) * 0.1 * (1 + 1 / 2).
    expected = sqrt(1.25 + sqrt(2 * log(2)) * 0.15)
    assert rounded_clip(1.0, np.full(100, 0.1), miss=0.5) == pytest.approx(expected)
    # Coarse: with |s| = 100, the mean grows by 100 instead of 2500.
    expected = sqrt(101 + sqrt(2 * log(2)) * 10 * 51)
    assert rounded_clip(1.0, np.full(100, 10.0), miss=0.5) == pytest.approx(expected)
    assert rounded_clip(1.0, [0.5], miss=1e-9) == 1.5


def test_the_clip_goes_to_the_quantile():
    """The median of norms 1 .. 99 is 50; the paper's rate of 0.2 comes near it."""
    norms, clip = np.arange(1, 100), 0.1
    for _ in range(120):
        clip = next_clip(clip, float((norms <= clip).mean()), 0.5, 0.2)
    assert clip == pytest.approx(50, rel=0.02)
    # By hand: exp(-0.2 * (1 - 0.5)).
    assert next_clip(2.0, 1.0, 0.5, 0.2) == pytest.approx(2 * 0.904837418)
    assert next_clip(2.0, 0.5, 0.5, 0.2) == 2
    assert next_clip(2.0, -0.1, 0.5, 0.2) > 2


def test_the_next_clip_stays_a_number():
    with pytest.raises(ValueError, match=r"^next clip: 0.0 is not allowed"):
        next_clip(1e-300, 1e6, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"^quantile: 1.5 is not allowed"):
        next_clip(1.0, 1.0, 1.5, 0.2)


def test_the_counts_noise_is_paid_for_by_the_movements():
    # (1 - 1/100)**-0.5.
    assert noise_beside_count(1.0, 5.0) == pytest.approx(1.0050378)
    together = noise_beside_count(0.7, 3.0) ** -2 + (2 * 3.0) ** -2
    assert together**-0.5 == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"^count_sigma: 0.5 is not allowed: .* > 0.5"):
        noise_beside_count(1.0, 0.5)
