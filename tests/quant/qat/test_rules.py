"""Every rule against a slow reference, at every width: layers are held to torch's own."""

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from layer_cases import CASES, loss_of, made, tensors_in
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

from quant import (
    QuantConfig,
    StrictAdamW,
    StrictSGD,
    calibrate_activations,
    decode,
    encode,
    federated_state,
    fit_scale,
    largest_code,
    layers_by_weight,
    load_state,
    prepare,
    quantizable_weights,
    quantize_model,
    quantize_state,
    quantized_layers,
    set_generator,
    set_scales,
    spec_of,
    unsupported_layers,
    weight_scales,
)
from quant.qat import rules
from quant.qat.activations import (
    fake_quantize_activation,
    fit_activation_grid,
    put_on_grid,
    quantize_output_gradient,
)

# Every width with some layer, every layer with the narrowest, the widest and some between.
AT_A_WIDTH = [
    (name, bits)
    for place, name in enumerate(CASES)
    for bits in range(2, 17)
    if bits in (2, 16) or (bits + place) % 4 == 0
]
EACH = pytest.mark.parametrize("name", CASES)
# Those of one layer.
SINGLE = pytest.mark.parametrize("name", sorted(CASES.keys() - {"tied", "encoder", "attending"}))


def on_grid(weight, bits, clip=1.0):
    """What a weight is on its grid, row by row: the slow reference."""
    values, limit = weight.detach().numpy(), 2 ** (bits - 1) - 1
    rows = []
    for row in values:
        scale = fit_scale(torch.from_numpy(row.copy())[None], bits).numpy()[0] * np.float32(clip)
        codes = np.clip(np.rint(row * (np.float32(1) / scale)), -limit, limit)
        rows.append(codes.astype(np.float32) * scale)
    return torch.from_numpy(np.stack(rows))


def dequantized(layer, bits, clip=1.0):
    """A copy of a float32 layer whose weights, all but biases and normalization, are on grids."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and not name.split(".")[-1].startswith("bias"):
                parameter.copy_(on_grid(parameter, bits, clip))
    return layer


def equal(one, other):
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    assert pairs
    return all(torch.equal(a, b) for a, b in pairs)


def test_there_is_a_case_for_every_rule():
    of_torch = {kind for kind in rules._RULES if kind.__module__.startswith("torch.")}
    assert of_torch <= {type(m) for name in CASES for m in made(name)[0].modules()}
    assert NonDynamicallyQuantizableLinear in of_torch


@EACH
def test_all_weights_are_quantized_and_keep_their_names(name):
    layer, _ = made(name)
    before, expected = list(layer.state_dict()), quantizable_weights(layer)
    assert set(expected) == {
        n
        for n, p in layer.named_parameters()
        if p.ndim > 1 and not n.split(".")[-1].startswith("bias")
    }
    assert unsupported_layers(layer) == []
    prepare(layer, QuantConfig(4, 8, 8))
    assert list(layer.state_dict()) == before
    assert quantizable_weights(layer) == expected == list(weight_scales(layer))
    assert unsupported_layers(layer) == []
    for weight, scale in weight_scales(layer).items():
        assert scale.shape == layer.get_parameter(weight).shape[:1]


@pytest.mark.parametrize(("name", "bits"), AT_A_WIDTH)
def test_the_forward_pass_is_that_of_the_dequantized_codes_bit_for_bit(name, bits):
    layer, inputs = made(name)
    expected = dequantized(layer, bits)
    prepare(layer, QuantConfig(bits))
    assert equal(layer(*inputs), expected(*inputs))
    # As it is evaluated, where torch has kernels of its own. Whether a matrix product is folded
    # depends on whether a factor requires a gradient: those on grids do not without one.
    layer.eval(), expected.eval().requires_grad_(False)
    with torch.no_grad():
        assert equal(layer(*inputs), expected(*inputs))
    # What is sent is what was computed with.
    sent = quantize_model(layer, bits).dequantize()
    for weight in quantizable_weights(layer):
        assert torch.equal(sent[weight], expected.get_parameter(weight))


@EACH
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_pass_straight_through_and_are_zero_where_weights_are_clipped(name, bits):
    layer, inputs = made(name)
    expected, inside = dequantized(layer, bits, clip=0.5), {}
    prepare(layer, QuantConfig(bits))
    for weight, scale in weight_scales(layer).items():
        set_scales(layer, {weight: scale / 2})
        values = layer.get_parameter(weight).detach()
        codes = values.flatten(1) / (scale / 2)[:, None]
        inside[weight] = (codes.round().abs() <= largest_code(bits)).reshape(values.shape)
        assert not inside[weight].all()
    loss_of(layer(*inputs)).backward()
    loss_of(expected(*inputs)).backward()
    for parameter, reference in expected.named_parameters():
        gradient = reference.grad * inside.get(parameter, torch.tensor(1.0))
        own = layer.get_parameter(parameter).grad
        torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)


@SINGLE
def test_inputs_have_a_grid_that_is_fitted_to_them(name):
    layer, inputs = made(name)
    expected = dequantized(layer, 5)
    prepare(layer, QuantConfig(5, activation_bits=3))
    first, *others = inputs
    x = first.data if isinstance(first, PackedSequence) else first
    for grid in (None, fit_activation_grid(x, 3) if x.is_floating_point() else None):
        assert layer.input_grid == grid
        if not x.is_floating_point():  # Indices.
            on_its_grid = first
        else:
            values = fake_quantize_activation(x, 3) if grid is None else put_on_grid(x, grid)
            on_its_grid = values if x is first else first._replace(data=values)
        if "attention" in name:
            again = (fake_quantize_activation(other, 3) for other in others)
            others_on = [on_its_grid if o is first else next(again) for o in others]
            others_on = [on_its_grid] * 2 if others[0] is first else others_on
        else:
            others_on = others
        assert equal(layer(*inputs), expected(on_its_grid, *others_on))
        calibrate_activations(layer, lambda m: m(*inputs))


@SINGLE
def test_the_gradient_of_every_output_is_quantized(name):
    layer, inputs = made(name)
    expected, noise = dequantized(layer, 5), torch.Generator().manual_seed(2)
    prepare(layer, QuantConfig(5, gradient_bits=3))
    set_generator(layer, torch.Generator().manual_seed(2))
    loss_of(layer(*inputs)).backward()
    outputs = [quantize_output_gradient(y, 3, noise) for y in tensors_in(expected(*inputs))]
    loss_of(outputs).backward()
    exact = dequantized(made(name)[0], 5)
    loss_of(exact(*inputs)).backward()
    for parameter, reference in expected.named_parameters():
        torch.testing.assert_close(layer.get_parameter(parameter).grad, reference.grad)
        assert not torch.equal(reference.grad, exact.get_parameter(parameter).grad)


OPTIMIZERS = {
    "sgd": partial(StrictSGD, lr=0.5, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(StrictAdamW, lr=0.2, weight_decay=1e-3),
}


@EACH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_strict_training_keeps_every_weight_on_its_grid(name, optimizer, bits):
    layer, inputs = made(name)
    prepare(layer, QuantConfig(bits, 8, 8))
    scales = {n: s.clone() for n, s in weight_scales(layer).items()}
    noise = torch.Generator().manual_seed(1)
    steps = OPTIMIZERS[optimizer](
        layer.named_parameters(), scales, bits, gradient_bits=8, generator=noise
    )
    start = {n: layer.get_parameter(n).detach().clone() for n in scales}
    for _ in range(3):
        steps.zero_grad()
        loss_of(layer(*inputs)).backward()
        steps.step()
        for weight, scale in scales.items():
            values = layer.get_parameter(weight).detach()
            codes = (values.flatten(1).double() / scale.double()[:, None]).round()
            assert codes.abs().max() <= largest_code(bits)
            level = codes.float() * scale[:, None]
            assert torch.equal(level.reshape(values.shape), values)
    assert all((layer.get_parameter(n) != before).any() for n, before in start.items())
    assert all(torch.equal(weight_scales(layer)[n], scale) for n, scale in scales.items())


@EACH
@pytest.mark.parametrize("bits", [2, 5, 16])
def test_a_model_is_the_same_behind_the_wire(name, bits):
    layer, inputs = made(name)
    other, spec = made(name)[0], spec_of(layer)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    prepare(layer, QuantConfig(bits))
    update = quantize_state(federated_state(layer), bits, weight_scales(layer))
    assert update.quantized.keys() == spec.on_grid
    received = decode(encode(update), spec, bits)
    # As a client does it.
    load_state(other, received.dequantize())
    prepare(other, QuantConfig(bits))
    set_scales(other, received.scales)
    assert equal(other(*inputs), layer(*inputs))


@EACH
def test_a_second_prepare_and_a_copy_take_effect(name):
    layer, inputs = made(name)
    again = prepare(made(name)[0], QuantConfig(3, 5))
    prepare(layer, QuantConfig(9, 4))
    y = layer(*inputs)
    loss_of(y).backward()
    copied = copy.deepcopy(layer)
    assert equal(copied(*inputs), y)
    prepare(layer, QuantConfig(3, 5))
    assert equal(layer(*inputs), again(*inputs))
    assert not equal(layer(*inputs), y)
    # The copy stays what it was, and has scales of its own.
    assert equal(copied(*inputs), y)
    for weight, held in layers_by_weight(copied):
        set_scales(copied, {weight: held.scale * 1.5})
    assert equal(layer(*inputs), again(*inputs))
    assert not equal(copied(*inputs), y)


@EACH
def test_a_prepared_model_computes_with_weights_of_a_functional_call(name):
    """What a prepared model is called with in place of its parameters has its grids too."""
    layer, inputs = made(name)
    prepare(layer, QuantConfig(8))
    start = layer(*inputs)
    other = {n: (p * 0.5).detach().requires_grad_() for n, p in layer.named_parameters()}
    halved = functional_call(layer, other, inputs)
    load_state(layer, other)
    set_scales(layer, {n: scale * 2 for n, scale in weight_scales(layer).items()})
    assert equal(halved, layer(*inputs))
    assert not equal(halved, start)


@EACH
def test_a_prepared_model_is_saved_and_loaded_whole(name):
    layer, inputs = made(name)
    prepare(layer, QuantConfig(4, 8))
    y = layer(*inputs)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=False)(*inputs), y)


@EACH
def test_new_weights_have_scales_that_fit_them(name):
    layer, inputs = made(name)
    prepare(layer, QuantConfig(8, 8))
    calibrate_activations(layer, lambda m: m(*inputs))
    larger = {n: 100 * t for n, t in layer.state_dict().items()}
    layer.load_state_dict(larger)
    assert not any(quant.input_grid for _, quant in quantized_layers(layer))
    for weight, scale in weight_scales(layer).items():
        assert torch.equal(scale, fit_scale(larger[weight], 8))
    for weight, held in layers_by_weight(layer):
        new = nn.Parameter(torch.ones_like(held.parameter))
        setattr(held.layer, held.attribute, new)
        assert torch.equal(held.scale, torch.full_like(held.scale, 1 / 127)), weight
    if hasattr(layer, "_reset_parameters"):
        layer._reset_parameters()
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for weight, held in layers_by_weight(layer):
        assert torch.equal(held.scale, fit_scale(held.parameter, 8)), weight
    with pytest.raises(TypeError, match="cannot be torch"):
        layer.half()
