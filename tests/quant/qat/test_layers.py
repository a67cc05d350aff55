import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant import (
    QuantConfig,
    QuantConv2d,
    QuantLinear,
    mse_scale,
    prepare,
    quantized_layers,
    refit_scales,
    set_generator,
    weight_scales,
)
from quant.qat.activations import fake_quantize_activation, fake_quantize_gradient


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular", bias=False),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(values, scale, low, high):
    """Round and clip in float64: the independent form of a fake quantization."""
    values, scale = values.double(), scale.double()
    return (torch.round(values / scale).clamp(low, high) * scale).float()


def weight_on_grid(weight, bits):
    """A weight on its absolute-maximum grid; only for widths above 4 bits."""
    limit = 2 ** (bits - 1) - 1
    scale = (weight.detach().abs().flatten(1).amax(1) / limit).reshape(-1, *[1] * (weight.ndim - 1))
    return on_grid(weight.detach(), scale, -limit, limit)


def test_prepare_keeps_the_state_dict():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    assert prepare(model, QuantConfig(4, 8, 8)) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    small_model().load_state_dict(after)
    model.load_state_dict(before)


def test_prepare_changes_convolutions_and_linear_layers_in_place():
    model = small_model()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    prepare(model, QuantConfig(4))
    assert [(n, type(m)) for n, m in quantized_layers(model)] == [
        ("0", QuantConv2d),
        ("3", QuantConv2d),
        ("5", QuantLinear),
    ]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_a_single_layer_is_a_model_too():
    layer = prepare(nn.Linear(3, 2), QuantConfig(3))
    assert type(layer) is QuantLinear
    assert list(weight_scales(layer)) == ["weight"]


def test_subclasses_are_left_alone():
    class OwnLinear(nn.Linear):
        pass

    class OwnConv(nn.Conv2d):
        pass

    class OwnAttention(nn.MultiheadAttention):
        """Its out_proj has a rule, for the attention of torch only."""

    model = nn.ModuleList([OwnLinear(2, 2), OwnConv(1, 1, 1), nn.Linear(2, 2), OwnAttention(4, 1)])
    types = [type(m) for m in model.modules()]
    prepare(model, QuantConfig(4))
    changed = [
        new for new, old in zip(map(type, model.modules()), types, strict=True) if new != old
    ]
    assert changed == [QuantLinear]


def test_hooks_stay():
    layer = nn.Linear(2, 2)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    prepare(layer, QuantConfig(4))(torch.ones(1, 2))
    assert calls == [1]


@pytest.mark.parametrize("bits", [5, 8, 12, 16])
def test_forward_of_a_convolution_equals_an_independent_one(bits):
    # Round and clip in float64, then torch's own convolution.
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    plain = copy.deepcopy(layer)
    prepare(layer, QuantConfig(bits))
    x = inputs(2, 4, 9, 9)
    expected = F.conv2d(x, weight_on_grid(plain.weight, bits), plain.bias, 2, 1, 2, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    # Quantization is visible: at 16 bits the plain layer is 2**-16 away, more below.
    assert (layer(x) - plain(x)).abs().max() > 2.0**-bits / 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_forward_of_a_linear_layer_equals_torchs_fake_quantize(bits):
    layer = nn.Linear(20, 5)
    plain = copy.deepcopy(layer)
    prepare(layer, QuantConfig(bits))
    limit = 2 ** (bits - 1) - 1
    weight = torch.fake_quantize_per_channel_affine(
        plain.weight, mse_scale(plain.weight, bits), torch.zeros(5), 0, -limit, limit
    )
    x = inputs(7, 20)
    assert torch.equal(layer(x), F.linear(x, weight, plain.bias))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_forward_with_quantized_input_equals_torchs_fake_quantize(bits, signed):
    layer = nn.Linear(20, 5)
    plain = copy.deepcopy(layer)
    prepare(layer, QuantConfig(8, activation_bits=bits))
    x = inputs(7, 20) if signed else inputs(7, 20).relu()
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = float(x.abs().max() / high)
    on_input_grid = torch.fake_quantize_per_tensor_affine(x, scale, 0, low, high)
    expected = F.linear(on_input_grid, weight_on_grid(plain.weight, 8), plain.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_activation_grid_by_hand():
    # Not negative, 2 bits: levels 0, 1, 2, 3 of step 1.5 / 3 = 0.5.
    x = torch.tensor([[0.0, 0.2, 0.8], [1.1, 1.3, 1.5]])
    assert fake_quantize_activation(x, 2).tolist() == [[0, 0, 1], [1, 1.5, 1.5]]
    # With negative entries, 3 bits: levels -3 to 3 of step 3 / 3 = 1, whichever end is the larger.
    x = torch.tensor([-3.0, -1.4, 0.6, 2.2])
    assert fake_quantize_activation(x, 3).tolist() == [-3, -1, 1, 2]
    assert fake_quantize_activation(-x, 3).tolist() == [3, 1, -1, -2]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_grid_uses_its_levels(bits):
    # A ramp meets every level: 2**k of them unsigned, 2**k - 1 symmetric.
    ramp = torch.linspace(0, 1, 5001)
    assert fake_quantize_activation(ramp, bits).unique().numel() == 2**bits
    assert fake_quantize_activation(ramp * 2 - 1, bits).unique().numel() == 2**bits - 1


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("negative", [False, True])
def test_activation_gradient_passes_everywhere(bits, negative):
    # The grid spans the tensor, so that nothing is clipped.
    x = torch.linspace(-1.0 if negative else 0.0, 1, 101).requires_grad_()
    upstream = inputs(101)
    fake_quantize_activation(x, bits).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("quantize", [fake_quantize_activation, fake_quantize_gradient])
def test_zeros_stay_zero(quantize):
    assert torch.equal(quantize(torch.zeros(3, 4), 4), torch.zeros(3, 4))


def test_gradient_grid_by_hand():
    # 3 bits: step 6 / 3 = 2; the others go to one of the two levels around them.
    gradient = torch.tensor([6.0, -1.2, 0.9, 3.1])
    drawn = torch.stack([fake_quantize_gradient(gradient, 3) for _ in range(100)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[6], [-2, 0], [0, 2], [2, 4]]


def test_weight_gradient_is_straight_through():
    # y = x w': the gradient at w is x where w is inside the grid, 0 where it is clipped.
    layer = prepare(nn.Linear(4, 1, bias=False), QuantConfig(3))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -1.4, 2.0, -2.0]]))
    layer.weight_scale = torch.tensor([0.5])  # levels up to 1.5; 1.4 / 0.5 rounds to 3, the last
    layer(torch.tensor([[1.0, 2, 3, 4]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1, 2, 0, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_output_gradients_are_quantized(bits, kind):
    # With one sample and one output position the bias gradient is the output gradient itself.
    layer = nn.Linear(3, 500) if kind == "linear" else nn.Conv2d(3, 500, 1)
    prepare(layer, QuantConfig(8, gradient_bits=bits))
    x = inputs(1, 3).requires_grad_() if kind == "linear" else inputs(1, 3, 1, 1).requires_grad_()
    set_generator(layer, torch.Generator().manual_seed(2))
    upstream = inputs(500)
    y = layer(x)
    y.backward(upstream.reshape(y.shape))
    limit = 2 ** (bits - 1) - 1
    error = layer.bias.grad
    expected = fake_quantize_gradient(upstream, bits, torch.Generator().manual_seed(2))
    assert torch.equal(error, expected)
    step = upstream.abs().max() / limit
    torch.testing.assert_close(error, on_grid(error, step, -limit, limit), rtol=1e-6, atol=0)
    assert (error - upstream).abs().max() < step * 1.0001
    assert 2 < error.unique().numel() <= 2 * limit + 1
    # The layer below and the weight see the quantized output gradient, not the original one.
    weight = layer.quantized_weight().detach().flatten(1)
    torch.testing.assert_close(x.grad.flatten(), error @ weight)
    outer = error[:, None] * x.detach().flatten()
    torch.testing.assert_close(layer.weight.grad.flatten(1), outer)


def test_errors_pass_unchanged_at_32_bits():
    layer = prepare(nn.Linear(3, 50), QuantConfig(8))
    upstream = inputs(50)
    layer(inputs(1, 3)).backward(upstream[None])
    assert torch.equal(layer.bias.grad, upstream)


def test_scales_are_fitted_at_prepare_and_on_request():
    model = prepare(small_model(), QuantConfig(8))
    scales = weight_scales(model)
    assert list(scales) == ["0.weight", "3.weight", "5.weight"]
    state = model.state_dict()
    for name, scale in scales.items():
        torch.testing.assert_close(scale, state[name].abs().flatten(1).amax(1) / 127)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert all(weight_scales(model)[name] is scale for name, scale in scales.items())
    refit_scales(model)
    # Powers of two scale exactly.
    assert all(torch.equal(weight_scales(model)[name], 2 * s) for name, s in scales.items())


def test_a_prepared_model_can_be_copied_and_trained():
    model = copy.deepcopy(prepare(small_model(), QuantConfig(4, 8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = inputs(32, 3, 8, 8), torch.arange(32) % 5
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bits", [0, 1, 17, 31, 33, 4.0, "8", None, True])
@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "gradient_bits"])
def test_other_widths_are_refused(field, bits):
    with pytest.raises(ValueError, match="2 to 16"):
        QuantConfig(**{"weight_bits": 4, field: bits})


def test_32_bits_are_for_activations_and_gradients_only():
    assert QuantConfig(2, 32, 32) == QuantConfig(2)
    with pytest.raises(ValueError, match="2 to 16"):
        QuantConfig(32)
