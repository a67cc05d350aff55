"""Fitted grids of activations: levels, clipping, gradient, and to what each layer's is fitted."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant import QuantConfig, calibrate_activations, prepare
from quant.qat.activations import (
    ActivationGrid,
    fake_quantize_activation,
    fit_activation_grid,
    put_on_grid,
)

BITS = [2, 3, 4, 8, 16]


def long_tailed(count=20_000, seed=0, signed=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) ** 3
    return x if signed else x.relu()


def error(x, grid):
    return float((put_on_grid(x, grid) - x).double().square().mean())


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_unsigned_where_nothing_is_negative_and_symmetric_elsewhere(bits):
    grid = fit_activation_grid(torch.linspace(0, 1, 100), bits)
    assert (grid.low, grid.high) == (0, 2**bits - 1)
    grid = fit_activation_grid(torch.linspace(-1, 1, 100), bits)
    assert (grid.low, grid.high) == (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)


def test_a_grid_by_hand():
    """Where all values are levels of the spanning grid, nothing is nearer than that grid."""
    x = torch.tensor([0.0, 0.5, 1.0, 1.5]).repeat(100)
    assert fit_activation_grid(x, 2) == ActivationGrid(0.5, 0, 3)
    # A thousand ones and a single four: worth clipping at 2 bits, where the step would be 4 / 3.
    x = torch.cat([torch.ones(1000), torch.tensor([4.0])])
    grid = fit_activation_grid(x, 2)
    assert error(x, grid) < error(x, ActivationGrid(4 / 3, 0, 3)) / 5


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_of_all_clipping_points_the_best_is_taken(bits, signed):
    x = long_tailed(signed=signed)
    grid = fit_activation_grid(x, bits)
    largest = float(x.abs().max())
    steps = [largest * i / 20 / grid.high for i in range(5, 21)]
    errors = [error(x, ActivationGrid(step, grid.low, grid.high)) for step in steps]
    assert error(x, grid) <= 1.02 * min(errors)
    if bits <= 4:
        spanning = (fake_quantize_activation(x, bits) - x).double().square().mean()
        assert error(x, grid) < 0.7 * spanning


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -3.0, 1e30])
def test_constant_tensors_keep_their_value(bits, value):
    x = torch.full((8, 4), value)
    torch.testing.assert_close(
        put_on_grid(x, fit_activation_grid(x, bits)), x, rtol=1e-5, atol=1e-30
    )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradient_are_those_of_torchs_fake_quantize(bits, signed):
    x = long_tailed(signed=signed).reshape(10, 20, 10, 10)
    x = x.contiguous(memory_format=torch.channels_last)
    fitted = fit_activation_grid(x, bits)
    # A power of two, by which division and multiplication by the inverse give the same.
    grid = ActivationGrid(2.0 ** round(math.log2(fitted.scale)), fitted.low, fitted.high)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = put_on_grid(ours, grid)
    expected = torch.fake_quantize_per_tensor_affine(theirs, grid.scale, 0, grid.low, grid.high)
    assert torch.equal(y, expected)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).float().mean() < 0.5


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def test_each_layer_is_fitted_to_what_reaches_it_behind_those_before():
    model = prepare(network(), QuantConfig(3, 3))
    plain = copy.deepcopy(model)
    images = torch.randn(16, 1, 6, 6)
    calibrate_activations(model, lambda m: m(images))
    first = fit_activation_grid(images, 3)
    assert model[0].input_grid == first
    x = F.conv2d(put_on_grid(images, first), plain[0].quantized_weight(), plain[0].bias)
    x = x.relu().flatten(1)
    second = fit_activation_grid(x, 3)
    assert model[3].input_grid == second
    x = F.linear(put_on_grid(x, second), plain[3].quantized_weight(), plain[3].bias).relu()
    third = fit_activation_grid(x, 3)
    assert model[5].input_grid == third
    logits = F.linear(put_on_grid(x, third), plain[5].quantized_weight(), plain[5].bias)
    assert torch.equal(model(images), logits)
    # No hook stays: another pass, of larger values, changes nothing.
    model(10 * images)
    assert model[0].input_grid == first


def test_a_second_calibration_replaces_the_first():
    model = prepare(network(), QuantConfig(3, 3))
    images = torch.randn(16, 1, 6, 6)
    for factor in (1, 7):
        calibrate_activations(model, lambda m, factor=factor: m(factor * images))
        assert model[0].input_grid == fit_activation_grid(factor * images, 3)


def test_layers_that_are_not_reached_or_not_quantized_have_no_grid():
    model = prepare(network(), QuantConfig(3, 3))
    calibrate_activations(model, lambda m: m[:1](torch.randn(4, 1, 6, 6)))
    assert model[0].input_grid is not None
    assert model[3].input_grid is None
    passes = []
    calibrate_activations(prepare(network(), QuantConfig(3)), passes.append)
    assert not passes


def test_a_layer_that_is_used_twice_has_the_grid_of_its_first_input():
    layer = prepare(nn.Linear(4, 4), QuantConfig(4, 4))
    x = torch.randn(8, 4)
    calibrate_activations(layer, lambda m: m(m(x).relu()))
    assert layer.input_grid == fit_activation_grid(x, 4)


def test_a_pass_that_fails_leaves_no_hook():
    model = prepare(network(), QuantConfig(3, 3))
    with pytest.raises(RuntimeError):
        calibrate_activations(model, lambda m: m(torch.randn(4, 2, 6, 6)))
    model[0].input_grid = None
    model(torch.randn(4, 1, 6, 6))
    assert model[0].input_grid is None
