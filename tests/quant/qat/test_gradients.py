"""Stochastic rounding of gradients: levels, means, seeds, and what is not finite, by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from quant import QuantConfig, prepare, set_generator
from quant.qat.activations import fake_quantize_gradient, quantize_output_gradient

BITS = [2, 3, 8, 9, 12, 16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spanning(values, bits, step):
    """Values in steps, as one row, and behind them the largest code, which makes the step."""
    limit = 2 ** (bits - 1) - 1
    return torch.cat([torch.as_tensor(values, dtype=torch.float32), torch.tensor([limit])]) * step


# Beside 15 bits of a code, a float32 has 9 of a fraction.
FRACTIONS = [(b, f) for b in BITS for f in (2**-10, 0.25, 0.49, 0.9) if (b, f) != (16, 2**-10)]


@pytest.mark.parametrize(("bits", "fraction"), FRACTIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_between_two_levels_goes_to_either_and_is_kept_on_average(bits, fraction, sign):
    # Up one level with probability `fraction`: the mean of n has the deviation sqrt(f (1 - f) / n).
    # At 2**-10 all would vanish to nearest, and 200 of 200,000 survive.
    count, step = 200_000, 2.0**-7
    gradient = spanning(torch.full((count,), sign * fraction), bits, step)
    codes = fake_quantize_gradient(gradient, bits, generator(bits))[:-1].double() / step
    assert set(codes.unique().tolist()) == {0.0, float(sign)}
    deviation = (fraction * (1 - fraction) / count) ** 0.5
    # Probabilities are whole numbers of 2**-16, or of 2**-8 beside the largest codes.
    half = 2.0 ** -(min(16, 24 - bits) + 1)
    assert abs(codes.mean().item() - sign * fraction) < 5 * deviation + half


def test_the_mean_of_many_draws_is_the_gradient():
    # One draw is off by less than a step, and by half a step at most in deviation.
    gradient = torch.randn(40, 5, generator=generator(1))
    draws, noise = 4000, generator(2)
    step = gradient.abs().max() / 7
    drawn = torch.stack([fake_quantize_gradient(gradient, 4, noise) for _ in range(draws)])
    assert ((drawn - gradient).abs() < step * 1.0001).all()
    bias = (drawn.double().mean(0) - gradient).abs().max()
    assert bias < 5 * 0.5 * step / draws**0.5


@pytest.mark.parametrize("bits", BITS)
def test_values_on_a_level_stay_there(bits):
    limit = 2 ** (bits - 1) - 1
    codes = torch.linspace(-limit, limit, min(2 * limit + 1, 4095)).round()
    gradient = codes.repeat(100, 1) * 2.0**-9
    assert torch.equal(fake_quantize_gradient(gradient, bits, generator()), gradient)


@pytest.mark.parametrize("bits", BITS)
def test_nothing_leaves_the_grid(bits):
    # Of magnitudes that are all the largest none is beyond it, whatever the inverse of the scale.
    limit = 2 ** (bits - 1) - 1
    for seed in range(50):
        largest = torch.rand(1, generator=generator(seed)) + 0.5
        rounded = fake_quantize_gradient(largest.repeat(3000), bits, generator(seed))
        assert rounded.max() <= largest * (1 + 2**-23)
        assert rounded.min() >= largest * (limit - 1) / limit * (1 - 2**-22)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 2**17 - 1, 2**17 + 1, 2**18 + 3])
def test_any_number_of_values_has_noise_of_its_own(count):
    # Halves: each value is a coin, and two in a row are equal in half of all cases.
    gradient = spanning(torch.full((count,), 0.5), 4, 1.0)
    codes = fake_quantize_gradient(gradient, 4, generator(7))[:-1].double()
    assert ((codes == 0) | (codes == 1)).all()
    for lag in (1, 2, 4, 2**17):
        if count > 1000 + lag:
            equal = (codes[lag:] == codes[:-lag]).double()
            assert abs(equal.mean().item() - 0.5) < 5 * 0.5 / len(equal) ** 0.5


def test_shape_and_order_in_memory_are_kept():
    gradient = torch.randn(4, 3, 5, 5, generator=generator(3))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = gradient.contiguous(memory_format=layout)
        rounded = fake_quantize_gradient(given, 8, generator())
        assert rounded.shape == given.shape
        assert rounded.stride() == given.stride()
        assert (rounded - given).abs().max() < gradient.abs().max() / 127 * 1.0001
    every_other = gradient[:, :, ::2, ::2]
    rounded = fake_quantize_gradient(every_other, 8, generator())
    assert (rounded - every_other).abs().max() < gradient.abs().max() / 127 * 1.0001


def test_a_value_that_is_repeated_in_memory_is_rounded_each_time():
    # What `mean()` passes back is one number for all.
    gradient = torch.tensor([3.0, 0.5]).expand(2000, 2)
    rounded = fake_quantize_gradient(gradient, 3, generator())
    assert rounded[:, 0].eq(3).all()
    assert abs(rounded[:, 1].mean().item() - 0.5) < 5 * 0.5 / 2000**0.5
    assert torch.equal(gradient, torch.tensor([3.0, 0.5]).expand(2000, 2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bits, value):
    gradient = torch.tensor([1.0, 0.0, value, -2.0])
    assert fake_quantize_gradient(gradient, bits, generator()).isnan().all()


def test_one_seed_gives_one_result():
    gradient = torch.randn(1000, generator=generator(1))
    first = fake_quantize_gradient(gradient, 4, generator(5))
    torch.manual_seed(9)
    assert torch.equal(fake_quantize_gradient(gradient, 4, generator(5)), first)
    assert not torch.equal(fake_quantize_gradient(gradient, 4, generator(6)), first)
    noise = generator(5)
    fake_quantize_gradient(gradient, 4, noise)
    assert not torch.equal(fake_quantize_gradient(gradient, 4, noise), first)


def test_without_a_generator_the_noise_is_torchs():
    gradient = torch.randn(1000, generator=generator(1))
    torch.manual_seed(5)
    first = fake_quantize_gradient(gradient, 4)
    torch.manual_seed(5)
    assert torch.equal(fake_quantize_gradient(gradient, 4), first)


def test_output_gradients_draw_from_the_layers_generator():
    # One layer: its bias gradient is the rounded output gradient of its one sample.
    upstream = torch.randn(1, 500, generator=generator(1))

    def bias_gradient(layer):
        layer.bias.grad = None
        layer(torch.ones(1, 3)).backward(upstream)
        return layer.bias.grad

    layer = prepare(nn.Linear(3, 500), QuantConfig(8, gradient_bits=4))
    set_generator(layer, generator(3))
    before = torch.get_rng_state()
    first, second = bias_gradient(layer), bias_gradient(layer)
    assert torch.equal(torch.get_rng_state(), before)
    noise = generator(3)
    for drawn in (first, second):
        assert torch.equal(drawn, fake_quantize_gradient(upstream, 4, noise)[0])
    assert not torch.equal(first, second)
    # A copy draws what its original would.
    kept = copy.deepcopy(layer)
    assert torch.equal(bias_gradient(kept), bias_gradient(layer))


def test_small_output_gradients_reach_the_layers_below_on_average():
    # 2 bits: levels -1, 0, 1. To nearest 0.2 would vanish; here one in five is 1.
    count = 50_000
    x = torch.zeros(count).requires_grad_()
    upstream = torch.full((count,), 0.2)
    upstream[0] = 1.0
    quantize_output_gradient(x, 2, generator()).backward(upstream)
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    assert abs(x.grad[1:].mean().item() - 0.2) < 5 * 0.4 / count**0.5
