"""What `train` gives to be sent, in each form, beside what the network itself holds."""

import numpy as np
import pytest
import torch
from torch import nn

from quant import fit_scale, layers_by_weight, quantize_nearest, quantize_stochastic
from task import TensorExamples
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

DATA = TensorExamples(
    (torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(form, dither=0, training="qat", bits=3):
    model = network()
    config = LocalTraining(bits, training, batch_size=4, learning_rate=0.1)
    return model, train(model, DATA, config, seed=1, upload=form, dither=dither)


def test_latent_weights_are_sent_as_they_are():
    model, result = trained("stored")
    assert (result.update.bits, result.update.quantized) == (32, {})
    for name, tensor in result.update.floats.items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(("form", "dither"), [("forward", 0), ("dithered", 7)])
def test_qat_weights_are_rounded_on_the_grid_that_is_fitted_to_them(form, dither):
    model, result = trained(form, dither)
    noise = torch.Generator().manual_seed(7)
    # Of all tensors in the order in which they travel.
    for name in ("0.weight", "2.weight"):
        latent = model.state_dict()[name]
        scale = fit_scale(latent, 3)
        rounded = quantize_nearest(latent, scale, 3)
        if dither:
            rounded = quantize_stochastic(latent, scale, 3, noise)
        assert torch.equal(result.update.quantized[name].codes, rounded)
        assert torch.equal(result.update.quantized[name].scale, scale)


@pytest.mark.parametrize("form", ["forward", "dithered", "stored"])
def test_strict_weights_are_the_same_in_every_form(form):
    model, result = trained(form, dither=7 if form == "dithered" else 0, training="strict")
    for name, weight in layers_by_weight(model):
        assert torch.equal(result.update.quantized[name].dequantize(), weight.quantized())


@pytest.mark.parametrize("form", ["forward", "dithered", "stored"])
def test_integer_weights(form):
    model = build_model("vgg7-x0.125", 1, 8, 10, 0)
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(size=(8, 1, 8, 8)).astype(np.float32))
    data = TensorExamples((inputs, torch.arange(8)))
    config = LocalTraining(6, "integer", batch_size=4)
    result = train(model, data, config, seed=1, upload=form, dither=3 if form == "dithered" else 0)
    stored = {n: t for n, t in model.state_dict().items() if n in result.update.quantized}
    assert stored
    noise = torch.Generator().manual_seed(3)
    for name, tensor in result.update.quantized.items():
        if form == "stored":
            assert torch.equal(tensor.dequantize(), stored[name])
            continue
        doubled = 2 * stored[name]
        if form == "forward":
            expected = doubled.round().clamp(-1, 1) / 2
        else:
            drawn = torch.rand(doubled.shape, generator=noise)
            expected = (doubled.floor() + (drawn < doubled - doubled.floor())).clamp(-1, 1) / 2
        assert torch.equal(tensor.dequantize(), expected), name
