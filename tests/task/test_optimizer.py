"""Local training by AdamW beside SGD: float32, latent and strict weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.errors import SettingsError
from core.settings import Settings
from quant import federated_state, fit_scale, largest_code
from strategies import FedAvg, FedCOMGATE, StrategyContext
from task.data.dataset import Images
from task.hyperparameters import LocalTraining
from task.training import train

ADAMW = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.8}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def some_images(count=24):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 1, 6, 6), dtype=np.uint8)
    return Images(pixels, rng.integers(0, 3, count))


def trained(model, bits=32, training="qat", **changes):
    config = LocalTraining(bits, training, batch_size=8, **{**ADAMW, **changes})
    return train(model, some_images(), config, 1)


def test_float32_clients_take_torchs_steps():
    model, images = network(), some_images()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.8, 0.999), weight_decay=0.1)
    order = np.random.default_rng(1).permutation(24)
    for index in np.split(order, 3):
        optimizer.zero_grad()
        x = images.pixels[index].astype(np.float32) * np.float32(4 / 255) - np.float32(2)
        logits = plain(torch.from_numpy(x).to(memory_format=torch.channels_last))
        F.cross_entropy(logits, torch.from_numpy(images.labels[index])).backward()
        optimizer.step()
    trained(model)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())


def test_latent_weights_take_adamws_steps_of_its_size():
    model = network()
    start = {n: t.clone() for n, t in federated_state(model).items()}
    result = trained(model, 4, weight_decay=0.0, learning_rate=1e-3)
    # One of at most 1e-3 in each of three steps; SGD moves by gradients of any size.
    moved = torch.cat([result.moved[n].flatten().abs() for n in start])
    assert 1e-3 < moved.max() <= 3.1e-3


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_strict_weights_stay_on_the_grid_that_they_came_on(bits):
    model = network()
    scales = {n: fit_scale(model.get_parameter(n), bits) for n in ("0.weight", "3.weight")}
    result = trained(model, bits, "strict", gradient_bits=8, learning_rate=0.1)
    for name, scale in scales.items():
        assert torch.equal(result.update.scales[name], scale)
        weights = model.get_parameter(name).detach().flatten(1)
        codes = (weights / scale[:, None]).round()
        assert torch.equal(codes * scale[:, None], weights)
        assert codes.abs().max() <= largest_code(bits)
        assert result.moved[name].any()


def test_a_run_passes_its_optimizer_on():
    settings = Settings(optimizer="adamw")
    assert LocalTraining.of(settings, 8, 1, 0.0).optimizer == "adamw"
    assert LocalTraining.of(Settings(), 8, 1, 0.0).optimizer == "sgd"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: Settings(optimizer="adamw", low_bit_training="integer"),
            "optimizer: adamw with low-bit-training integer; allowed: sgd, to whose steps its "
            "gradients are scaled",
        ),
        (
            lambda: LocalTraining(8, "integer", optimizer="adamw"),
            "optimizer: adamw with low-bit-training integer; allowed: sgd",
        ),
        (
            lambda: FedCOMGATE(context=StrategyContext(optimizer="adamw")),
            "optimizer: adamw with fedcomgate, whose corrections are of the gradients that SGD "
            "moves by; allowed: sgd",
        ),
        (lambda: Settings(optimizer="adam"), "optimizer: 'adam' is not allowed"),
        (lambda: StrategyContext(optimizer="adam"), "optimizer: 'adam' is not allowed"),
        (lambda: LocalTraining(8, optimizer="adam"), "optimizer: 'adam' is not allowed"),
    ],
)
def test_what_adamw_does_not_go_with_is_refused_in_one_line(make, line):
    with pytest.raises(SettingsError) as error:
        make()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    FedAvg(context=StrategyContext(optimizer="adamw"))
