"""The drift of a level by hand, and what is left when it is taken out."""

import pytest
import torch

from quant import (
    QuantizedTensor,
    add_drift,
    fit_scale,
    largest_code,
    level_drift,
    quantize_nearest,
    trained_channels,
)


def test_two_bits_by_hand():
    codes = torch.tensor([[-1, 0, 1, 0], [1, 1, -1, 0]], dtype=torch.int16)
    start = QuantizedTensor(codes, torch.tensor([0.5, 2.0]))
    moved = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 4.0, 0.0]])
    target = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 2.0, 0.0, 2.0]])
    # Differences: [[1, .5, -1, -1], [-2, 2, -4, 2]], for the levels
    #              [[-1, 0, 1, 0], [1, 1, -1, 0]], in steps of .5 and 2:
    # -1: (1 - 4) / (.5 + 2);  0: (.5 - 1 + 2) / (.5 + .5 + 2);  1: (-1 - 2 + 2) / (.5 + 2 + 2).
    drift = level_drift(moved, target, start, 2)
    torch.testing.assert_close(drift, torch.tensor([-1.2, 0.5, -2 / 9]))
    assert drift.dtype == torch.float32
    aligned = add_drift(moved, torch.tensor([0.25, -1.0, 3.0]), start, 2)
    expected = torch.tensor([[1.125, -0.5, 1.5, 0.5], [8.0, 6.0, 4.5, -2.0]])
    torch.testing.assert_close(aligned, expected)


def test_three_bits_by_hand_with_levels_that_hold_nothing():
    codes = torch.tensor([[[-3, 2], [0, -3]]], dtype=torch.int16)
    start = QuantizedTensor(codes, torch.tensor([0.25]))
    moved = torch.tensor([[[0.0, 0.25], [1.0, 0.5]]])
    target = torch.tensor([[[0.5, 0.0], [1.0, -0.5]]])
    # Steps: -3: (2 - 4) / 2, 2: -1, 0: 0; no weight starts on -2, -1, 1 and 3.
    drift = level_drift(moved, target, start, 3)
    assert drift.tolist() == [-1, 0, 0, 0, 0, -1, 0]
    aligned = add_drift(moved, drift, start, 3)
    assert aligned.tolist() == [[[-0.25, 0.0], [1.0, 0.25]]]


@pytest.mark.parametrize(
    ("bits", "levels"), [(2, 3), (3, 7), (4, 15), (5, 15), (8, 15), (15, 15), (16, 15)]
)
def test_as_many_levels_as_the_grid_has_but_at_most_fifteen(bits, levels):
    limit = largest_code(bits)
    codes = torch.arange(-limit, limit + 1, dtype=torch.int16)[None]
    start = QuantizedTensor(codes, torch.ones(1))
    # Each weight differs by the number of its run of levels, -7 to 7, worked in integers.
    most = levels // 2
    runs = [(2 * most * abs(c) + limit) // (2 * limit) for c in codes[0].tolist()]
    numbers = torch.tensor([runs], dtype=torch.float32) * codes.sign()
    drift = level_drift(torch.zeros_like(numbers), numbers, start, bits)
    assert drift.tolist() == list(range(-most, most + 1))
    assert torch.equal(add_drift(torch.zeros_like(numbers), drift, start, bits), numbers)


@pytest.mark.parametrize(
    ("bits", "last", "first"), [(8, 9, 10), (8, 27, 28), (16, 2340, 2341), (16, 30426, 30427)]
)
def test_where_one_run_of_levels_ends_and_the_next_begins(bits, last, first):
    # 7 * 9 / 127 = 0.496, 7 * 10 / 127 = 0.551; 7 * 27 / 127 = 1.488, 7 * 28 / 127 = 1.543;
    # 7 * 2340 / 32767 = 0.4999, 7 * 2341 / 32767 = 0.5001; 7 * 30426 / 32767 = 6.4999.
    codes = torch.tensor([[last, first, -last, -first]], dtype=torch.int16)
    start = QuantizedTensor(codes, torch.ones(1))
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    drift = level_drift(torch.zeros(1, 4), target, start, bits)
    at = (7 * last + largest_code(bits) // 2) // largest_code(bits)
    if at == 0:
        # The run around zero reaches to either side: (1 + 3) / 2.
        assert (drift[7], drift[8], drift[6]) == (2, 2, 4)
    else:
        picked = [float(drift[7 + i]) for i in (at, at + 1, -at, -at - 1)]
        assert picked == [1, 2, 3, 4]


def random_start(bits, seed=0, shape=(8, 6, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    # Channels of unlike size, so that their steps differ.
    weight = torch.randn(shape, generator=generator)
    weight *= torch.linspace(0.1, 3, shape[0]).reshape(-1, 1, 1, 1)
    scale = fit_scale(weight, bits)
    start = QuantizedTensor(quantize_nearest(weight, scale, bits), scale)
    moved, target = (0.1 * torch.randn(shape, generator=generator) for _ in range(2))
    return start, moved, target


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_aligned_movement_has_the_targets_mean_on_every_level(bits):
    start, moved, target = random_start(bits)
    aligned = add_drift(moved, level_drift(moved, target, start, bits), start, bits)
    steps, before, wanted = aligned.double(), moved.double(), target.double()
    limit = largest_code(bits)
    for level in range(-limit, limit + 1):
        here = start.codes == level
        assert float(steps[here].mean()) == pytest.approx(float(wanted[here].mean()), abs=1e-6)
        assert abs(float(before[here].mean() - wanted[here].mean())) > 1e-4
        # All weights of a level are moved by as many steps: how they differ otherwise stays.
        shift = ((steps - before) / start.scale.reshape(-1, 1, 1, 1))[here]
        assert float(shift.max() - shift.min()) < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_an_aligned_movement_has_no_drift(bits):
    start, moved, target = random_start(bits, seed=3)
    drift = level_drift(moved, target, start, bits)
    aligned = add_drift(moved, drift, start, bits)
    left = level_drift(aligned, target, start, bits)
    # In steps, of which a movement is hundreds at 16 bits.
    assert drift.abs().max() > 1e-3
    assert left.abs().max() < 1e-6 * (moved.abs() / start.scale.reshape(-1, 1, 1, 1)).max() + 1e-6
    torch.testing.assert_close(add_drift(aligned, left, start, bits), aligned, rtol=1e-4, atol=1e-6)


def test_a_drift_of_a_level_is_found_and_taken_out():
    start, target, _ = random_start(4, seed=5)
    inward = -0.3 * start.codes.sign() * (start.codes.abs() == 7)
    moved = target + inward * start.scale.reshape(-1, 1, 1, 1)
    drift = level_drift(moved, target, start, 4)
    expected = torch.zeros(15)
    expected[0], expected[14] = -0.3, 0.3
    torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(add_drift(moved, drift, start, 4), target)


def test_nothing_given_is_changed():
    start, moved, target = random_start(3)
    before = [t.clone() for t in (moved, target, start.codes, start.scale)]
    drift = level_drift(moved, target, start, 3)
    kept = drift.clone()
    add_drift(moved, drift, start, 3)
    after = (moved, target, start.codes, start.scale, drift)
    assert all(torch.equal(a, b) for a, b in zip(after, [*before, kept], strict=True))


def test_a_channel_of_zeros_does_not_drown_the_others():
    """Its step is the smallest there is, 2**-100, and a movement of it countless steps."""
    weight = torch.tensor([[3.5, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    scale = fit_scale(weight, 4)
    start = QuantizedTensor(quantize_nearest(weight, scale, 4), scale)
    moved, target = torch.zeros(2, 4), torch.full((2, 4), 0.01)
    aligned = add_drift(moved, level_drift(moved, target, start, 4), start, 4)
    assert aligned.abs().max() < 1


def test_a_channel_that_moved_by_the_rounding_of_a_mean_was_not_trained():
    """Ten equal float32 values do not always average to themselves."""
    codes = torch.tensor([[127, 3], [127, 3], [0, -1]], dtype=torch.int16)
    start = QuantizedTensor(codes, torch.tensor([0.1, 0.1, 3.0]))
    value = torch.tensor(12.7)
    mean = torch.stack([value * 3.0] * 7).sum() / 21
    moved = torch.zeros(3, 2)
    moved[0, 0] = mean - value
    moved[1, 1], moved[2, 0] = -0.1 / 1000, 1e-3
    assert abs(moved[0, 0]) < 1e-5
    assert trained_channels(moved, start, 8).tolist() == [False, True, True]
