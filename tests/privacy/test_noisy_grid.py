"""A group's movements with noise: clipped, exact without noise, and as noisy as is accounted."""

import numpy as np
import pytest
import torch

from privacy.noisy_grid import NoisyGrid, NoisySum, movement_of
from quant import Update, UpdateSpec, quantize_state

SPEC = UpdateSpec({"w": (40, 50), "bn.running_var": (5,)}, frozenset({"w"}))
RECEIVED = {"w": torch.linspace(-1, 1, 2000).reshape(40, 50), "bn.running_var": torch.ones(5)}


def grid(noise=0.0, clip=2.0, devices=4, **more):
    return NoisyGrid(SPEC, clip, noise, devices, 16, RECEIVED, **more)


def moved_by(movement):
    """A Float32 device's update that goes so far."""
    values = {"w": RECEIVED["w"] + movement, "bn.running_var": torch.full((5,), 7.0)}
    return Update(32, "weights", {}, values)


def summed(one, updates):
    parts = [one.integers(u, 1, np.random.default_rng(i)) for i, u in enumerate(updates)]
    return [sum(columns) for columns in zip(*parts, strict=True)]


def test_without_noise_the_mean_of_short_movements_is_theirs_to_half_a_step():
    torch.manual_seed(0)
    movements = [torch.randn(40, 50) * 0.02 for _ in range(4)]
    one = grid()
    mean = one.mean(summed(one, [moved_by(m) for m in movements]), 4)
    want = RECEIVED["w"] + torch.stack(movements).mean(0)
    assert (mean["w"] - want).abs().max() <= one.step * (1 + 1e-3)
    # Statistics are not sent, whatever they became.
    assert torch.equal(mean["bn.running_var"], RECEIVED["bn.running_var"])


def test_a_long_movement_is_shortened_to_the_clip_in_its_direction():
    long = torch.ones(40, 50)
    one = grid(clip=0.5)
    moved = one.mean(summed(one, [moved_by(long)]), 1)["w"] - RECEIVED["w"]
    # 2,000 coordinates of one each have norm sqrt(2000).
    assert torch.allclose(moved, long * 0.5 / 2000**0.5, atol=2 * one.step)
    assert float(moved.norm()) <= one.bound


def test_no_update_whatever_exceeds_what_the_noise_is_in_proportion_to():
    torch.manual_seed(1)
    one = grid(clip=1.0)
    for scale in (1e-6, 1e-3, 1, 1e6):
        codes = one.integers(moved_by(torch.randn(40, 50) * scale), 1, np.random.default_rng(0))[1]
        assert np.linalg.norm(codes * one.step) <= one.bound


def test_the_noise_of_a_sum_is_that_which_is_accounted():
    one = grid(noise=1.5, devices=4)
    still = [moved_by(torch.zeros(40, 50))] * 4
    sums = np.concatenate([summed(one, still)[1][:2000] for _ in range(20)])
    # The relative error of a standard deviation of 40,000 samples is 1 / sqrt(80,000) = 0.35 %.
    assert sums.std() * one.step == pytest.approx(1.5 * one.bound, rel=0.02)
    assert abs(sums.mean()) < 5 * sums.std() / 200
    assert not summed(one, still)[1][2000:].any()
    assert one.effective_noise(4) == pytest.approx(1.5)


def test_sums_with_noise_stay_within_their_bits():
    one = grid(noise=3.0, clip=1.0, devices=6)
    [_, (count, bits)] = one.widths(9)
    assert count == 2005
    updates = [moved_by(torch.zeros(40, 50).index_fill(0, torch.tensor([0]), 1.0))] * 9
    assert np.abs(summed(one, updates)[1]).max() < 2 ** (bits - 1)


def test_a_low_bit_device_moves_from_its_own_rounding_of_the_start():
    scales = {"w": torch.full((40,), 0.25)}
    held = quantize_state(RECEIVED, 4, scales)
    assert not movement_of(held, RECEIVED)["w"].any()
    other = quantize_state({**RECEIVED, "w": held.dequantize()["w"] + 0.25}, 4, scales)
    want = other.dequantize()["w"] - held.dequantize()["w"]
    assert torch.equal(movement_of(other, RECEIVED)["w"], want)
    assert want.any()


def test_a_difference_is_its_own_movement():
    difference = Update(32, "difference", {}, {"w": torch.ones(40, 50)})
    assert torch.equal(movement_of(difference, RECEIVED)["w"], torch.ones(40, 50))


def test_the_servers_noise_is_in_proportion_to_the_clip():
    movements = [{"w": torch.full((200, 200), 0.1)}, {"w": torch.zeros(200, 200)}]
    total = NoisySum(movements[0], clip=2.0)
    for movement in movements:
        total.add(movement)
    mean = total.mean(noise_multiplier=3.0, devices=2)
    # The first is clipped to norm 2: 0.01 each, half of it in the mean, under noise of 2 * 3 / 2.
    assert float(mean["w"].std()) == pytest.approx(3.0, rel=0.02)
    assert float(mean["w"].mean()) == pytest.approx(0.005, abs=5 * 3.0 / 200)


def test_no_movement_between_float32_numbers_is_too_large_to_be_clipped():
    far = {"w": torch.tensor([3e38])}
    moved = movement_of(Update(32, "weights", {}, far), {"w": torch.tensor([-3e38])})
    total = NoisySum(moved, clip=1.0)
    total.add(moved)
    assert float(total.mean(noise_multiplier=1e-6, devices=1)["w"]) == pytest.approx(1, abs=1e-4)


def test_a_device_counts_once():
    with pytest.raises(ValueError, match="weight: 2 is not allowed"):
        grid().integers(moved_by(torch.zeros(40, 50)), 2, np.random.default_rng(0))


def test_what_is_not_finite_is_refused_and_numbers_far_apart_are_clipped():
    bad = moved_by(torch.full((40, 50), float("nan")))
    with pytest.raises(ValueError, match="finite"):
        grid().integers(bad, 1, np.random.default_rng(0))
    far = Update(32, "weights", {}, {**RECEIVED, "w": torch.full((40, 50), 3e38)})
    one = grid(clip=1.0)
    codes = one.integers(far, 1, np.random.default_rng(0))[1]
    assert 0.9 < np.linalg.norm(codes * one.step) <= one.bound
