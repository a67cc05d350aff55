import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant.lowbit.strict
from core.errors import SettingsError
from core.seeds import Stream, derive_seed
from core.settings import Settings
from quant import (
    QuantConfig,
    StrictSGD,
    encode,
    fake_quantize,
    federated_state,
    fit_scale,
    load_state,
    prepare,
    quantized_layers,
    set_generator,
    weight_scales,
)
from task.at_width import at_width, check_quantizable
from task.calibration import calibrate_activations, calibrate_normalization
from task.data.dataset import Images, Pixels
from task.data.to_input import to_input
from task.evaluation import evaluate
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import DivergedError, train


def update_and_score(*args, **kwargs):
    """Update and score of `train`."""
    result = train(*args, **kwargs)
    return result.update, result.score


def some_images(count, size=8, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, size, size), dtype=np.uint8)
    return Images(pixels, rng.integers(0, classes, count))


def small_model(seed=0):
    """Convolution, BatchNorm and linear layer on 8x8 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def by_hand(model, images, config, seed):
    """Plain SGD with momentum, weight decay and the proximal term, written out."""
    received = [p.detach().clone() for p in model.parameters()]
    velocity = [None] * len(received)
    rng = np.random.default_rng(seed)
    model.train()
    losses, hits, seen = 0.0, 0, 0
    for _ in range(config.epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            x = images.pixels[rows].astype(np.float32) * np.float32(4 / 255) - np.float32(2)
            y = torch.from_numpy(images.labels[rows])
            # The layout decides which kernels run, and with them the last bits.
            logits = model(torch.from_numpy(x).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            losses += loss.item() * len(rows)
            hits += int((logits.argmax(1) == y).sum())
            seen += len(rows)
            with torch.no_grad():
                for i, (w, g) in enumerate(zip(model.parameters(), gradients, strict=True)):
                    if config.proximal_mu:
                        g = g + config.proximal_mu * (w - received[i])
                    g = g + config.weight_decay * w if config.weight_decay else g
                    velocity[i] = g if velocity[i] is None else config.momentum * velocity[i] + g
                    w -= config.learning_rate * velocity[i]
    return losses / seen, hits / seen


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def test_input_spans_minus_two_to_two():
    x = to_input(np.array([0, 51, 102, 255], np.uint8).reshape(1, 1, 2, 2))
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([-2, -1.2, -0.4, 2], abs=1e-6)


def test_training_leaves_the_pixels_as_they_were():
    images = some_images(20)
    before = images.pixels.copy()
    update_and_score(small_model(), images, LocalTraining(8, batch_size=10), 0)
    assert np.array_equal(images.pixels, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 20, "momentum": 0.0},  # One plain step.
        {"batch_size": 8, "momentum": 0.5},  # Momentum and rates exact in binary.
        {"batch_size": 8, "momentum": 0.5, "weight_decay": 0.25, "epochs": 2},
        {"batch_size": 10, "momentum": 0.5, "low_bit_training": "strict"},
    ],
)
def test_float32_training_equals_a_plain_loop_bit_for_bit(settings):
    images, start = some_images(20), small_model()
    config = LocalTraining(32, learning_rate=0.125, **settings)
    expected = copy.deepcopy(start)
    loss, accuracy = by_hand(expected, images, config, 7)
    update, score = update_and_score(start, images, config, 7)
    assert (update.bits, update.content, dict(update.quantized)) == (32, "weights", {})
    assert_same(dict(update.floats), federated_state(expected))
    assert score.loss == pytest.approx(loss, rel=1e-12)
    assert (score.accuracy, score.num_examples) == (accuracy, 20)


def test_a_last_batch_of_one_image_joins_the_one_before():
    # 9 images in batches of 4: the ninth would stand alone in BatchNorm, so 4 + 5.
    images, start = some_images(9), small_model()
    config = LocalTraining(32, batch_size=4, learning_rate=0.125, momentum=0.0)
    result = train(copy.deepcopy(start), images, config, 3)
    order = np.random.default_rng(3).permutation(9)
    expected = copy.deepcopy(start).train()
    for index in (order[:4], order[4:]):
        expected.zero_grad()
        logits = expected(to_input(images.pixels[index]))
        F.cross_entropy(logits, torch.from_numpy(images.labels[index])).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.125 * parameter.grad
    assert result.steps == 2
    for name, tensor in result.update.dequantize().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_single_images_are_trained_on_one_by_one_when_asked_for():
    network = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 3))
    result = train(network, some_images(5, classes=3), LocalTraining(32, batch_size=1), 0)
    assert result.steps == 5


def test_training_that_diverges_says_so():
    config = LocalTraining(32, batch_size=4, learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"training diverged: the loss of step \d+ is nan"):
        train(small_model(), some_images(24), config, 0)


def test_a_correction_is_subtracted_from_the_gradients_it_names():
    images, start = some_images(8), small_model()
    correction = {"4.weight": torch.randn(10, 144), "1.bias": torch.randn(4)}
    config = LocalTraining(32, batch_size=8, learning_rate=0.5, momentum=0.0)
    plain = train(copy.deepcopy(start), images, config, 0).moved
    corrected = train(copy.deepcopy(start), images, config, 0, correction=correction).moved
    # One step: w - 0.5 (g - delta), so that it moves by 0.5 delta more.
    for name in ("0.weight", "1.bias", "1.weight", "4.weight", "4.bias"):
        extra = 0.5 * correction[name] if name in correction else torch.zeros_like(plain[name])
        torch.testing.assert_close(corrected[name] - plain[name], extra, rtol=1e-4, atol=1e-5)


def test_what_moved_is_the_end_less_the_start_as_the_client_holds_them():
    start = small_model()
    config = LocalTraining(4, "strict", activation_bits=4, gradient_bits=8, batch_size=8)
    received = {n: t.clone() for n, t in federated_state(start).items()}
    result = train(start, some_images(24), config, 1)
    for name, tensor in result.update.quantized.items():
        began = fake_quantize(received[name], fit_scale(received[name], 4), 4)
        torch.testing.assert_close(result.moved[name], tensor.dequantize() - began)


def test_a_model_of_which_nothing_is_quantized_is_refused_by_name():
    class Own(nn.Linear):
        pass

    check_quantizable(small_model(), "small")
    no_weights = "BatchNorm2d; none of them has weights of two or more dimensions"
    no_rule = r"Own; the model \(Own\): weight stays float32: Own is a subclass of Linear, whose"
    for model, why in ((nn.BatchNorm2d(3), no_weights), (Own(2, 2), no_rule)):
        with pytest.raises(SettingsError, match=f"'x' has no layer to quantize, only {why}"):
            check_quantizable(model, "x")


@pytest.mark.parametrize("extra", [{"proximal_mu": 0.1}, {}])
def test_a_parameter_that_takes_no_part_stays_as_it_is(extra):
    model = small_model()
    model[0].idle = nn.Linear(2, 2)  # Of the convolution, which does not know it.
    before = model[0].idle.weight.detach().clone()
    correction = {} if extra else {"0.idle.weight": torch.ones(2, 2)}
    config = LocalTraining(32, **extra)
    trained = train(model, some_images(8), config, 0, correction=correction)
    assert torch.equal(model[0].idle.weight, before)
    assert not trained.moved["0.idle.weight"].any()


@pytest.mark.parametrize("bits", [2, 4, 5, 8, 16])
def test_qat_update_is_the_fake_quantized_model_bit_for_bit(bits):
    model = small_model()
    config = LocalTraining(bits, activation_bits=bits, epochs=2, batch_size=8)
    update, _ = update_and_score(model, some_images(24), config, 1)
    assert (update.bits, update.content) == (bits, "weights")
    sent = update.dequantize()
    layers = dict(quantized_layers(model))
    assert {f"{name}.weight" for name in layers} == set(update.quantized)
    for name, layer in layers.items():
        assert torch.equal(sent[f"{name}.weight"], layer.quantized_weight().detach())
        # The weights trained on are float32 and off the grid; the scale is fitted to them.
        assert not torch.equal(sent[f"{name}.weight"], layer.weight)
        assert torch.equal(update.quantized[f"{name}.weight"].scale, fit_scale(layer.weight, bits))
    state = federated_state(model)
    assert all(torch.equal(update.floats[name], state[name]) for name in update.floats)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_strict_update_lies_on_the_grid_of_the_received_weights(bits):
    model = small_model()
    received = {name: tensor.clone() for name, tensor in federated_state(model).items()}
    config = LocalTraining(
        bits, "strict", activation_bits=bits, gradient_bits=8, epochs=2, batch_size=8
    )
    update, _ = update_and_score(model, some_images(24), config, 1)
    trained = federated_state(model)
    moved = 0
    for name in ("0.weight", "4.weight"):
        codes, scale = update.quantized[name].codes, update.quantized[name].scale
        assert torch.equal(scale, fit_scale(received[name], bits))
        assert codes.abs().max() <= 2 ** (bits - 1) - 1
        # What is sent is what the client holds, bit for bit.
        columns = scale.reshape(-1, *[1] * (codes.ndim - 1))
        assert torch.equal(codes.float() * columns, trained[name])
        moved += int((codes != torch.round(received[name] / columns)).sum())
    assert moved > 0
    assert all(torch.equal(update.floats[name], trained[name]) for name in update.floats)


CONFIGS = [
    LocalTraining(32, batch_size=8),
    LocalTraining(4, activation_bits=4, batch_size=8),
    LocalTraining(4, "strict", activation_bits=4, gradient_bits=8, batch_size=8),
    LocalTraining(4, activation_bits=4, gradient_bits=4, batch_size=8),
]
IDS = ["float32", "qat", "strict", "qat with gradient-bits"]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_same_seed_same_update_other_seed_other_update(config):
    def sent(seed):
        update, score = update_and_score(small_model(), some_images(24), config, seed)
        return encode(update), score

    torch.manual_seed(100)
    first = sent(5)
    torch.manual_seed(200)
    assert sent(5) == first
    assert sent(6)[0] != first[0]


@pytest.mark.parametrize("gradient_bits", [3, 8, 32])
def test_strict_step_has_the_widths_of_its_configuration(gradient_bits):
    # One step put together from quant's parts.
    images, seed = some_images(24), 4
    expected = prepare(small_model(), QuantConfig(4, 6, gradient_bits))
    # One stream: of output gradients from the last layer on, then of the optimizer.
    noise = torch.Generator().manual_seed(derive_seed(seed, Stream.ROUNDING))
    set_generator(expected, noise)
    optimizer = StrictSGD(
        expected.named_parameters(),
        weight_scales(expected),
        4,
        gradient_bits=gradient_bits,
        generator=noise,
        lr=0.1,
    )
    calibrate_activations(expected, images)
    expected.train()
    order = np.random.default_rng(seed).permutation(24)
    logits = expected(to_input(images.pixels[order]))
    F.cross_entropy(logits, torch.from_numpy(images.labels[order])).backward()
    optimizer.step()
    config = LocalTraining(4, "strict", 6, gradient_bits, 1, 24, 0.1, momentum=0.0)
    update, _ = update_and_score(small_model(), images, config, seed)
    assert_same(update.dequantize(), federated_state(expected))


def test_strict_rounding_noise_follows_the_seed():
    # One batch holds all images, so that their order moves sums by last bits only.
    config = LocalTraining(2, "strict", activation_bits=8, gradient_bits=8, batch_size=24)
    first, _ = update_and_score(small_model(), some_images(24), config, 1)
    other, _ = update_and_score(small_model(), some_images(24), config, 2)
    assert not torch.equal(first.quantized["4.weight"].codes, other.quantized["4.weight"].codes)


def test_dropout_follows_the_seed():
    def sent(seed, state=0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        torch.manual_seed(state)
        config = LocalTraining(32, batch_size=24, learning_rate=1.0)
        return update_and_score(model, some_images(24), config, seed)[0].floats["2.weight"]

    assert torch.equal(sent(1), sent(1, state=3))
    assert (sent(1) - sent(2)).abs().max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["float32", "qat"])
def test_proximal_term_of_zero_and_of_a_first_step_changes_nothing(config):
    # mu (w - w_received) is zero where w is still what was received.
    images = some_images(8)
    plain, _ = update_and_score(small_model(), images, config, 0)
    for mu in (0.0, 10.0):
        update, _ = update_and_score(small_model(), images, replace(config, proximal_mu=mu), 0)
        assert_same(update.dequantize(), plain.dequantize())


def test_proximal_step_by_hand():
    # Two classes with weights (w, -w) on one pixel of 255, which is 2, and no bias. All images are
    # of class 0, so that d loss / d w_0 = -2 (1 - p) with p = 1 / (1 + exp(-4 w)), and w_1 mirrors
    # it. The first step starts at w = 0 with p = 1/2; in the second the proximal term is mu w.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    images = Images(np.full((2, 1, 1, 1), 255, np.uint8), np.zeros(2, np.int64))
    mu, rate = 0.5, 0.1
    config = LocalTraining(32, epochs=2, learning_rate=rate, momentum=0.0, proximal_mu=mu)
    update, _ = update_and_score(model, images, config, 0)
    first = rate * 2 * (1 - 0.5)
    p = 1 / (1 + np.exp(-4 * first))
    second = first + rate * 2 * (1 - p) - rate * mu * first
    weights = update.floats["1.weight"].flatten().tolist()
    assert weights == pytest.approx([second, -second], rel=1e-5)


def test_proximal_training_equals_the_term_in_a_plain_loop():
    images, start = some_images(24), small_model()
    config = LocalTraining(
        32, epochs=2, batch_size=8, learning_rate=0.125, momentum=0.5, proximal_mu=0.5
    )
    expected = copy.deepcopy(start)
    by_hand(expected, images, config, 2)
    update, _ = update_and_score(start, images, config, 2)
    for name, tensor in federated_state(expected).items():
        torch.testing.assert_close(update.floats[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", ["qat", "strict"])
def test_proximal_term_holds_low_bit_weights_near_what_was_received(training):
    received = small_model()[4].weight.detach()

    def distance(mu):
        config = LocalTraining(8, training, 8, 8, 4, 8, momentum=0.0, proximal_mu=mu)
        update, _ = update_and_score(small_model(), some_images(24), config, 0)
        return float((update.dequantize()["4.weight"] - received).norm())

    assert distance(5.0) < 0.7 * distance(0.0)


def test_calibration_by_hand_on_one_batch():
    # Pixels 0, 0, 255, 255 are -2, -2, 2, 2: mean 0, unbiased variance 16 / 3.
    # Pixels 255, 255, 255, 255 are 2 each: mean 2, variance 0.
    pixels = np.array([[0, 255], [0, 255], [255, 255], [255, 255]], np.uint8).reshape(4, 2, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(2))
    model[0].running_mean.fill_(9)
    model[0].running_var.fill_(9)
    calibrate_normalization(model, Pixels(pixels))
    assert model[0].running_mean.tolist() == pytest.approx([0, 2], abs=1e-6)
    assert model[0].running_var.tolist() == pytest.approx([16 / 3, 0], abs=1e-5)
    assert model[0].momentum == 0.1
    assert not model.training
    assert not model[0].training


def test_calibration_of_a_second_layer_sees_the_first_normalized_by_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    pixels = some_images(40).pixels
    x = to_input(pixels).double()
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    y = F.conv2d(x, model[1].weight.double(), model[1].bias.double()).detach()
    calibrate_normalization(model, Pixels(pixels))
    mean, variance = model[2].running_mean.double(), model[2].running_var.double()
    torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_calibration_averages_over_batches_and_forgets_what_was():
    pixels = some_images(256).pixels
    model, stale = nn.Sequential(nn.BatchNorm2d(1)), nn.Sequential(nn.BatchNorm2d(1, momentum=0.3))
    stale[0].running_mean.fill_(1e6)
    stale[0].num_batches_tracked.fill_(50)
    calibrate_normalization(model, Pixels(pixels))
    calibrate_normalization(stale, Pixels(pixels))
    assert torch.equal(model[0].running_mean, stale[0].running_mean)
    assert stale[0].momentum == 0.3
    # 256 images make equal batches, whose means average to the mean of all.
    assert float(model[0].running_mean) == pytest.approx(float(to_input(pixels).mean()), abs=1e-5)
    assert float(model[0].running_var) == pytest.approx(float(to_input(pixels).var()), rel=1e-2)


@pytest.mark.parametrize("count", [129, 257])
def test_calibration_takes_any_number_of_images(count):
    # A last batch of one image has one value a channel, as behind a network that pools to 1x1;
    # and it must not count for as much as a whole batch.
    pixels = some_images(count, size=1).pixels
    model = nn.Sequential(nn.BatchNorm2d(1))
    calibrate_normalization(model, Pixels(pixels))
    assert float(model[0].running_mean) == pytest.approx(float(to_input(pixels).mean()), abs=0.05)


def test_calibration_leaves_dropout_off_and_parameters_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
    calibrate_normalization(model, some_images(64))
    expected = float(to_input(some_images(64).pixels).var())
    assert float(model[1].running_var) == pytest.approx(expected, rel=1e-3)
    assert (model[1].weight.item(), model[1].bias.item()) == (1, 0)


def test_calibration_of_a_model_without_normalization_does_nothing():
    model = build_model("cnn", 1, 8, 10, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate_normalization(model, some_images(8))
    assert_same(model.state_dict(), before)


def test_evaluation_equals_a_direct_computation():
    # 1100 images: two whole batches and a part.
    images, model = some_images(1100), small_model()
    model[1].running_mean.fill_(0.3)
    score = evaluate(model, images)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(images.pixels / np.float32(255)) * 4 - 2).double()
    rows = torch.arange(1100)
    labels = torch.from_numpy(images.labels)
    losses = logits.exp().sum(1).log() - logits[rows, labels]
    assert score.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert score.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert score.num_examples == 1100


def test_evaluation_by_hand():
    # The bias alone decides: always class 1, with logits 0 and log 3, so p = 1/4 and 3/4.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([0.0, float(np.log(3))])
    images = Images(np.zeros((4, 1, 1, 1), np.uint8), np.array([1, 1, 1, 0]))
    score = evaluate(model, images)
    assert score.accuracy == 0.75
    assert score.loss == pytest.approx((3 * np.log(4 / 3) + np.log(4)) / 4, rel=1e-6)


def test_evaluation_changes_nothing():
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, some_images(30))
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(("server_round", "rate"), [(1, 0.5), (2, 0.25), (4, 0.0625)])
def test_learning_rate_decays_by_round(server_round, rate):
    settings = Settings(learning_rate=0.5, learning_rate_decay=0.5)
    assert LocalTraining.of(settings, 8, server_round, 0.0).learning_rate == rate


def test_local_training_takes_everything_from_the_settings():
    settings = Settings(
        low_bit_training="strict",
        activation_bits=6,
        gradient_bits=7,
        local_epochs=3,
        batch_size=11,
        learning_rate=0.2,
        momentum=0.4,
        weight_decay=0.01,
        weight_step=0.125,
        optimizer="adamw",
    )
    expected = LocalTraining(
        4, "strict", 6, 7, 3, 11, 0.2, 0.4, 0.01, 0.3, 0.125, optimizer="adamw"
    )
    assert LocalTraining.of(settings, 4, 1, 0.3) == expected


@pytest.mark.parametrize(("training", "bits"), [("strict", 8), ("qat", 32)])
def test_local_training_defaults_for_gradients_and_activations(training, bits):
    config = LocalTraining.of(Settings(low_bit_training=training), 4, 1, 0.0)
    assert (config.activation_bits, config.gradient_bits) == (4, bits)


def test_state_holds_the_floating_point_tensors_and_loads_back():
    model, other = build_model("resnet8", 1, 8, 10, 0), build_model("resnet8", 1, 8, 10, 1)
    model.bn.running_mean.fill_(3)
    other.bn.num_batches_tracked.fill_(5)
    state = federated_state(model)
    assert "bn.running_mean" in state
    assert not any(name.endswith("num_batches_tracked") for name in state)
    assert len(state) == len(model.state_dict()) - 9  # Nine BatchNorm layers.
    load_state(other, state)
    assert_same(federated_state(other), state)
    assert int(other.bn.num_batches_tracked) == 5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("given", "used"), [(0, None), (8, 8), (32, 32)])
def test_model_at_a_width_computes_as_a_client_of_it_would(bits, given, used):
    model = small_model().eval()
    x = to_input(some_images(16).pixels)
    expected = prepare(copy.deepcopy(model), QuantConfig(bits, used or bits))(x)
    plain = model(x)
    low = at_width(model, Settings(activation_bits=given), bits)
    assert torch.equal(low(x), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(model(x), plain)  # The original is as it was.
    assert not list(quantized_layers(model))


def test_model_at_32_bits_is_an_independent_copy():
    model = small_model()
    twin = at_width(model, Settings(), 32)
    assert not list(quantized_layers(twin))
    assert_same(twin.state_dict(), model.state_dict())
    twin[4].weight.data.zero_()
    assert model[4].weight.any()


@pytest.mark.parametrize("training", ["qat", "strict"])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_training_learns_at_every_width(bits, training):
    # Class k has a bright row k: a linear model separates them.
    images = some_images(200, classes=8)
    dim = images.pixels // 4
    dim[np.arange(200), 0, images.labels] = 255
    settings = Settings(low_bit_training=training, local_epochs=6, batch_size=20)
    model = small_model()
    _, score = update_and_score(
        model, Images(dim, images.labels), LocalTraining.of(settings, bits, 1, 0.0), 0
    )
    assert score.accuracy > 0.6
    assert evaluate(model, Images(dim, images.labels)).accuracy > 0.9


class GradientOfRoot(nn.Module):
    """The gradient of a root at zero is infinite, and NaN behind it; the loss is finite."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = F.dropout2d(self.conv(x), 0.5, self.training)
        return self.head(F.avg_pool2d(x**2, 2).sqrt().flatten(1))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("training", ["qat", "strict"])
def test_a_gradient_that_is_not_finite_ends_training_by_name(bits, training):
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 256, (16, 1, 8, 8), np.uint8), np.arange(16) % 3)
    config = LocalTraining(bits, low_bit_training=training, gradient_bits=8, batch_size=8)
    with pytest.raises(DivergedError, match=r"the gradient of conv\.\w+ in step 1 is not finite"):
        train(GradientOfRoot(), images, config, seed=0)


def test_rounding_draws_other_numbers_than_dropout():
    """One seed gives torch's generator, which dropout draws from, and another one its own."""
    model, images = small_model(), some_images(8)
    seen = []
    kept = quant.lowbit.strict.quantize_stochastic

    def noting(weight, scale, bits, generator):
        seen.append(torch.rand(5, generator=torch.Generator().set_state(generator.get_state())))
        return kept(weight, scale, bits, generator)

    config = LocalTraining(4, low_bit_training="strict", batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant.lowbit.strict, "quantize_stochastic", noting)
        train(model, images, config, seed=3)
    assert not torch.equal(seen[0], torch.rand(5, generator=torch.Generator().manual_seed(3)))
