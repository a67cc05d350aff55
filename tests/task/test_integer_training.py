"""Integer training of `train`, against a model of it in a few lines of plain PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from core.errors import SettingsError
from core.seeds import Stream, derive_seed
from core.settings import Settings
from quant import Scaled, load_state, stored_codes, ternary
from task.at_width import at_width, ready_to_evaluate
from task.data.dataset import Images, load_dataset
from task.data.to_input import to_input
from task.evaluation import evaluate
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import DivergedError, train
from task.trial import check_at_width

SETTINGS = Settings(low_bit_training="integer", model="vgg7-x0.25")
NAMES = ["vgg7-x0.25", "vgg7-nobn-x0.25"]


def some_images(count, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return Images(pixels, rng.integers(0, 10, count))


def network(name=NAMES[0], seed=0):
    return build_model(name, 1, 8, 10, seed)


def local(bits, **changes):
    return replace(LocalTraining.of(SETTINGS, bits, 1, 0.0), **changes)


# --- the model in plain PyTorch ----------------------------------------------------------------


def on(x, levels):
    return (x * levels).round().clamp(1 - levels, levels - 1) / levels


def shifted(x):
    largest = float(x.abs().max())
    return x / 2.0 ** round(np.log2(largest)) if largest else x


def replay(name, images, bits, wide, eta, batch_size, seed):
    """Codes after one epoch, and the codes of the start."""
    model = network(name)
    alphas = [m.alpha for m in model.modules() if isinstance(m, Scaled)]
    grid, edge, levels = 2.0 ** (bits - 1), 2.0 ** (bits - 2), 2.0 ** (wide - 1)
    stored = [(w.detach() * grid).round().clamp(-edge, edge) for w in model.parameters()]
    start = [codes.clone() for codes in stored]
    noise = torch.Generator().manual_seed(derive_seed(seed, Stream.ROUNDING))
    order = np.random.default_rng(seed).permutation(len(images))

    def activated(a):
        # Before the hook's scaling the gradient is masked.
        a.register_hook(lambda g: on(shifted(g), levels))
        high = 1 - 1 / levels
        mask = (a > 0) & (a < high)
        return on(a.detach().clamp(0, high), levels) + (a - a.detach()) * mask

    for index in np.split(order, len(images) // batch_size):
        used = [((c / edge).round().clamp(-1, 1) / 2).requires_grad_() for c in stored]
        x = on(to_input(images.pixels[index]) / 2, levels)
        for place, (weight, alpha) in enumerate(zip(used[:6], alphas[:6], strict=True)):
            x = F.conv2d(x, weight / alpha, padding=1)
            if place % 2 == 0:
                x = F.max_pool2d(x, 2)
            if "nobn" not in name:
                x = F.batch_norm(x, None, None, training=True) * 0.4
            x = activated(x)
        x = x.flatten(1) @ (used[6] / alphas[6]).T
        if "nobn" not in name:
            x = F.batch_norm(x, None, None, training=True) * 0.4
        logits = activated(x) @ (used[7] / alphas[7]).T
        logits.register_hook(lambda g: on(shifted(g), levels))
        F.cross_entropy(logits, torch.from_numpy(images.labels[index])).backward()
        for codes, weight in zip(stored, used, strict=True):
            u = shifted(weight.grad) * eta * 2.0 ** (bits - 8)
            draw = torch.rand(u.shape, generator=noise)
            codes.sub_(u.floor() + (draw < u - u.floor())).clamp_(-edge, edge)
    return stored, start


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bits", "wide"), [(8, 8), (6, 6), (12, 8), (16, 8)])
def test_a_client_agrees_with_plain_pytorch_bit_for_bit(name, bits, wide):
    images = some_images(40)
    config = local(bits, batch_size=10, integer_learning_rate=4.0)
    assert (config.activation_bits, config.gradient_bits) == (wide, wide)
    trained = train(network(name), images, config, seed=5, upload="stored")
    codes, start = replay(name, images, bits, wide, 4.0, 10, seed=5)
    assert trained.steps == 4
    for tensor, expected, began in zip(
        trained.update.quantized.values(),
        _sorted(name, codes),
        _sorted(name, start),
        strict=True,
    ):
        assert torch.equal(tensor.codes.float(), expected)
        assert not torch.equal(expected, began)
    # What was stored at the start is the update less the movement, exactly.
    ended = trained.update.dequantize()
    for key, began in zip(trained.update.quantized, _sorted(name, start), strict=True):
        assert torch.equal((ended[key] - trained.moved[key]) * 2 ** (bits - 1), began)


def _sorted(name, tensors):
    """In the order of an update: by name."""
    names = [key for key, _ in network(name).named_parameters()]
    return [tensor for _, tensor in sorted(zip(names, tensors, strict=True), key=lambda x: x[0])]


# --- what a client sends -----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [6, 8, 12, 16])
def test_an_update_holds_stored_weights_of_one_scale(bits):
    update = train(network(), some_images(20), local(bits), seed=1, upload="stored").update
    edge = 2 ** (bits - 2)
    for tensor in update.quantized.values():
        assert tensor.scale.tolist() == [2.0 ** (1 - bits)] * len(tensor.scale)
        assert tensor.codes.abs().max() == edge
        # More than three values: what is stored, not what it computes with.
        assert len(tensor.codes.unique()) > 3
    assert all(name.endswith(("running_mean", "running_var")) for name in update.floats)


def test_one_seed_is_one_update():
    def codes(seed):
        update = train(network(), some_images(20), local(8), seed=seed, upload="stored").update
        return torch.cat([tensor.codes.flatten() for tensor in update.quantized.values()])

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))


def test_scales_of_another_grid_do_not_change_the_weights_own():
    odd = {name: torch.full((len(w),), 0.3) for name, w in network().named_parameters()}
    one = train(network(), some_images(20), local(8), 1, scales=odd, upload="stored").update
    other = train(network(), some_images(20), local(8), 1, upload="stored").update
    for name, tensor in one.quantized.items():
        assert torch.equal(tensor.codes, other.quantized[name].codes)
        assert torch.equal(tensor.scale, other.quantized[name].scale)


# --- corrections and pulls, which are in units of plain SGD ------------------------------------


@pytest.mark.parametrize("bits", [8, 12])
def test_a_correction_moves_weights_as_far_as_in_sgd(bits):
    # A learning rate of 1/128 and a correction of 3 move by 3/128 a step; WAGE's own step is tiny.
    config = local(bits, learning_rate=2.0**-7, integer_learning_rate=2.0**-40, batch_size=10)
    model = network()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    ones = {name: torch.full_like(weight, 3.0) for name, weight in model.named_parameters()}
    moved = train(model, some_images(20), config, seed=0, correction=ones).moved
    for name in ones:
        assert (moved[name] == 2 * 3 / 128).all()


def test_a_proximal_term_pulls_back_by_hand():
    # A learning rate of 1/2. Step 1: the correction of 1/4 moves by 16/128. Step 2: again, and the
    # pull takes back a half of the 16/128 that the weight is away.
    config = local(8, learning_rate=0.5, integer_learning_rate=2.0**-40, batch_size=10)
    model = network()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    push = {name: torch.full_like(weight, 0.25) for name, weight in model.named_parameters()}
    pulled = replace(config, proximal_mu=1.0)
    moved = train(model, some_images(20), pulled, seed=0, correction=push).moved
    for name in push:
        assert (moved[name] == (16 + 16 - 8) / 128).all()


# --- both kinds of clients ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_widths_share_the_scale_of_every_layer(name):
    """With ternary weights and float32 activations a low-bit network is the Float32 one."""
    model = network(name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(ternary(weight))
    x = to_input(some_images(10).pixels)
    settings = SETTINGS.model_copy(update={"activation_bits": 32})
    low, high = (at_width(model, settings, bits).eval() for bits in (8, 32))
    assert torch.equal(low(x), high(x))
    # And with 8-bit activations it is near.
    rounded = at_width(model, SETTINGS, 8).eval()(x)
    assert not torch.equal(rounded, high(x))
    assert (rounded - high(x)).abs().max() < 0.1 * high(x).abs().max() + 0.05


def test_a_float32_client_does_sgd_on_its_weights_over_alpha():
    """Bit for bit, as alpha is a power of two: momentum and all."""
    images, name = some_images(40), NAMES[1]
    model = network(name)
    alphas = [module.alpha for module in model.modules() if isinstance(module, Scaled)]
    assert len(set(alphas)) > 1
    pairs = zip(model.parameters(), alphas, strict=True)
    used = [(weight.detach() / alpha).requires_grad_() for weight, alpha in pairs]
    optimizer = torch.optim.SGD(used, lr=0.01, momentum=0.9)
    for index in np.split(np.random.default_rng(3).permutation(40), 4):
        x = to_input(images.pixels[index]) / 2
        for place, weight in enumerate(used[:6]):
            x = F.conv2d(x, weight, padding=1)
            x = F.hardtanh(F.max_pool2d(x, 2) if place % 2 == 0 else x, 0, 1)
        logits = F.hardtanh(x.flatten(1) @ used[6].T, 0, 1) @ used[7].T
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(images.labels[index])).backward()
        optimizer.step()
    trained = train(
        model, images, local(32, batch_size=10, learning_rate=0.01), seed=3, upload="stored"
    )
    for (key, _), weight, alpha in zip(model.named_parameters(), used, alphas, strict=True):
        assert torch.equal(trained.update.floats[key], weight.detach() * alpha)
        assert trained.moved[key].abs().max() > 0


@pytest.mark.parametrize("bits", [6, 8, 16])
def test_evaluation_computes_with_the_ternary_form(bits):
    model = network()
    network_at_width = at_width(model, SETTINGS, bits)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(ternary(stored_codes(weight, bits) * 2.0 ** (1 - bits)))
    again, x = at_width(model, SETTINGS, bits), to_input(some_images(10).pixels)
    assert torch.equal(network_at_width.eval()(x), again.eval()(x))


@pytest.mark.parametrize(
    ("name", "bits", "rate", "eta"),
    [
        *[("vgg7-x0.5", bits, 0.2, 8.0) for bits in (8, 32)],
        ("vgg7-nobn", 8, 0.01, 4.0),
    ],
)
def test_loss_falls_on_digits(name, bits, rate, eta):
    data = load_dataset(Settings())
    images = data.train[np.arange(800)]
    model = network(name)
    config = local(bits, learning_rate=rate, integer_learning_rate=eta, batch_size=20, epochs=2)
    first = train(model, images, config, seed=0, upload="stored")
    second = network(name)
    load_state(second, first.update.dequantize())
    last = train(second, images, config, seed=1, upload="stored")
    model = network(name)
    load_state(model, last.update.dequantize())
    score = evaluate(ready_to_evaluate(model, SETTINGS, bits, {}, images[:256]), data.test)
    assert last.score.loss < 0.85 * first.score.loss
    # Guessing has 10 %.
    assert score.accuracy > (0.4 if "nobn" in name else 0.75)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_a_model_of_other_layers_is_refused(bits):
    resnet = build_model("resnet8", 1, 8, 10, 0)
    said = "model: 'CifarResNet' with low-bit-training integer: conv.weight is not the weight of a"
    with pytest.raises(SettingsError, match=said):
        train(resnet, some_images(4), local(bits), seed=0)


@pytest.mark.parametrize("bits", [8, 32])
def test_every_width_passes_what_is_tried_before_a_run(bits):
    check_at_width(network(), SETTINGS, bits, some_images(4))


def test_a_client_whose_loss_is_nan_fails():
    model = network()
    model.hidden.norm.register_forward_hook(lambda _, args, y: y * float("nan"))
    with pytest.raises(DivergedError, match="the loss of step 1 is nan"):
        train(model, some_images(4), local(8), seed=0)


def test_the_step_decays_by_round():
    settings = Settings(learning_rate_decay=0.5, integer_learning_rate=4.0)
    assert LocalTraining.of(settings, 8, 3, 0.0).integer_learning_rate == 1.0
