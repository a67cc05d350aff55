"""What images tell: the grids of activations; `round_weights`, step by step."""

import copy

import numpy as np
import pytest
import torch
from specs import to_bits
from torch import nn
from torch.nn import functional as F

import task.calibration
from core.settings import Settings
from quant import QuantConfig, federated_state, fit_scale, prepare, quantized_layers, weight_scales
from quant.qat.activations import fit_activation_grid
from quant.qat.rounding import round_to_moments
from task.at_width import at_width
from task.calibration import calibrate_activations, calibrate_normalization, round_weights
from task.data.dataset import Pixels
from task.data.to_input import to_input
from task.models import build_model


def pixels_of(count, size=6, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    # Smooth images: neighbouring pixels say much the same.
    noise = rng.integers(-40, 41, (count, channels, size, size))
    slope = rng.integers(0, 256, (count, 1, 1, 1)) + 10 * np.arange(size)
    return np.clip(slope + noise, 0, 255).astype(np.uint8)


def network(bits=3, seed=0):
    """Convolution, BatchNorm, linear layer; statistics that fit no image."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 20)
    )
    model[1].running_mean.fill_(30.0)
    model[1].running_var.fill_(0.01)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        model[1].bias.copy_(torch.tensor([0.0, 0.5, -0.5, 1.0]))
    return prepare(model, QuantConfig(bits))


def test_every_layer_sees_images_normalized_by_themselves_behind_rounded_weights():
    model, pixels = network(), pixels_of(60)
    plain = copy.deepcopy(model)
    rounded = round_weights(model, Pixels(pixels))
    assert list(rounded) == ["0.weight", "4.weight"]

    x = to_input(pixels)
    scale = fit_scale(plain[0].weight, 3)
    rows = F.unfold(x, 3).mT.flatten(0, 1)
    codes = round_to_moments(plain[0].weight, scale, 3, (rows.T @ rows)[None])
    assert torch.equal(rounded["0.weight"].codes, codes)
    assert torch.equal(rounded["0.weight"].scale, scale)

    y = F.conv2d(x, codes * scale.reshape(-1, 1, 1, 1), plain[0].bias)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), False, keepdim=True)
    gain, shift = (t.reshape(1, -1, 1, 1) for t in (plain[1].weight, plain[1].bias))
    y = F.relu((y - mean) / (variance + 1e-5).sqrt() * gain + shift).flatten(1).detach()
    scale = fit_scale(plain[4].weight, 3)
    codes = round_to_moments(plain[4].weight, scale, 3, (y.T @ y)[None])
    # Float32 sums in another order: all but a few codes are the same.
    assert (rounded["4.weight"].codes != codes).float().mean() < 0.005
    # The statistics that the model came with would have given others.
    stale = copy.deepcopy(plain).eval()
    stale[0].weight.data.copy_(rounded["0.weight"].dequantize())
    z = stale[:4](x).detach()
    other = round_to_moments(plain[4].weight, scale, 3, (z.T @ z)[None])
    assert (other != codes).float().mean() > 0.05


def test_stale_statistics_do_not_matter():
    model, other, pixels = network(), network(), pixels_of(40)
    other[1].running_mean.zero_()
    other[1].running_var.fill_(1)
    other[1].num_batches_tracked.fill_(7)
    one, two = round_weights(model, Pixels(pixels)), round_weights(other, Pixels(pixels))
    assert all(torch.equal(one[n].codes, two[n].codes) for n in one)
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert torch.equal(model[1].running_var, other[1].running_var)


def test_the_model_holds_the_rounded_weights_and_statistics_of_the_images():
    model, pixels = network(), pixels_of(60)
    model[1].momentum = 0.25
    scales = {n: t.clone() for n, t in weight_scales(model).items()}
    kept = {n: model.state_dict()[n].clone() for n in ("0.bias", "1.weight", "1.bias", "4.bias")}
    rounded = round_weights(model, Pixels(pixels))
    for name, layer in quantized_layers(model):
        assert torch.equal(layer.weight, rounded[f"{name}.weight"].dequantize())
        assert torch.equal(layer.weight_scale, scales[f"{name}.weight"])
    assert all(torch.equal(model.state_dict()[n], t) for n, t in kept.items())
    assert model[1].momentum == 0.25
    assert not any(m.training for m in model.modules())
    # Those that calibration finds for the rounded network, in one batch.
    again = copy.deepcopy(model)
    calibrate_normalization(again, Pixels(pixels))
    torch.testing.assert_close(model[1].running_mean, again[1].running_mean)
    torch.testing.assert_close(model[1].running_var, again[1].running_var)


def test_dropout_is_off_and_a_model_without_normalization_works():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(36, 8))
    without = nn.Sequential(nn.Flatten(), nn.Identity(), copy.deepcopy(plain[2]))
    pixels = pixels_of(40)
    one, two = (round_weights(prepare(m, QuantConfig(4)), Pixels(pixels)) for m in (plain, without))
    assert torch.equal(one["2.weight"].codes, two["2.weight"].codes)


@pytest.mark.parametrize(
    ("values", "count"), [(36 * 10, 10), (36 * 10 + 35, 10), (5, 2), (10**6, 30)]
)
def test_of_large_images_only_the_first_few_are_used(monkeypatch, values, count):
    pixels = pixels_of(30)
    expected = round_weights(network(), Pixels(pixels[:count]))
    monkeypatch.setattr(task.calibration, "_MOST_VALUES", values)
    limited = round_weights(network(), Pixels(pixels))
    assert all(torch.equal(t.codes, expected[n].codes) for n, t in limited.items())
    if count < 30:
        monkeypatch.undo()
        others = round_weights(network(), Pixels(pixels))
        assert any(not torch.equal(t.codes, others[n].codes) for n, t in limited.items())


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
@pytest.mark.parametrize("bits", [2, 4])
def test_real_networks_keep_their_outputs_better_than_rounded_to_nearest(name, bits):
    model, pixels = build_model(name, 1, 8, 10, 0), pixels_of(128, 8)
    settings = Settings(activation_bits=32)
    calibrated, nearest = (at_width(model, settings, bits) for _ in range(2))
    rounded = round_weights(calibrated, Pixels(pixels))
    assert rounded.keys() == to_bits(federated_state(model), bits).quantized.keys()
    for network in (model, nearest):
        calibrate_normalization(network, Pixels(pixels))
    with torch.no_grad():
        expected, x = model.eval()(to_input(pixels)), to_input(pixels)
        errors = [float((m.eval()(x) - expected).square().mean()) for m in (calibrated, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_activations_are_fitted_to_normalized_images_and_the_statistics_stay():
    model, pixels = network(), pixels_of(64)
    model[0].config = model[4].config = QuantConfig(4, 4)
    before = copy.deepcopy(federated_state(model))
    momentum = model[1].momentum
    calibrate_activations(model, Pixels(pixels))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert model[1].momentum == momentum
    assert not any(m.training for m in model.modules())
    again = copy.deepcopy(model)
    calibrate_normalization(again, Pixels(pixels))
    seen = again[:4](to_input(pixels))
    # The same but for the last bits: the first layer's grid, and statistics of all in one batch.
    assert model[4].input_grid.scale == pytest.approx(fit_activation_grid(seen, 4).scale, rel=2e-3)


def test_images_that_are_sorted_are_looked_at_from_end_to_end():
    dark, bright = np.zeros((500, 1, 6, 6), np.uint8), np.full((500, 1, 6, 6), 160, np.uint8)
    model = prepare(nn.Conv2d(1, 1, 1), QuantConfig(8, 8))
    for pixels in (np.concatenate([dark, bright]), np.concatenate([bright, dark])):
        calibrate_activations(model, Pixels(pixels))
        x = to_input(np.concatenate([dark[:32], bright[:32]]))
        assert model.input_grid == fit_activation_grid(x, 8)


def test_without_images_every_input_has_the_grid_that_spans_it():
    model = network()
    model[0].config = model[4].config = QuantConfig(4, 4)
    calibrate_activations(model, Pixels(pixels_of(1)[:0]))
    assert model[0].input_grid is None
