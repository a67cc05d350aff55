"""Calibrated rounding against exact re-solving in NumPy, and patches cut out one by one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant.qat.rounding
from quant import (
    QuantConfig,
    QuantizedTensor,
    calibrated_rounding,
    fit_scale,
    largest_code,
    prepare,
    quantize_nearest,
    quantized_layers,
    weight_scales,
)
from quant.qat.rounding import round_to_moments, second_moments

WIDTHS = range(2, 17)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def correlated(rows, inputs, seed=0):
    """Inputs that share what they say, of unequal size."""
    mixing = randn(inputs, inputs, seed=seed + 1) + 1.5
    sizes = 0.2 + torch.rand(inputs, generator=generator(seed + 2))
    return randn(rows, inputs, seed=seed) @ mixing * sizes


def resolved(weights, limit, moments):
    """Codes of rows in units of the step, and how near to a tie each row's rounding came.

    After each rounded weight those that are left are optimized anew, from the start, for the
    outputs that the row had: no recursion, no Cholesky factor.
    """
    moments = moments.double().numpy()
    hessian = moments.copy()
    mean = np.diag(moments).mean()
    hessian[np.diag_indices_from(hessian)] += 0.01 * mean if mean > 0 else 1.0
    order = sorted(range(len(hessian)), key=lambda i: -hessian[i, i])  # stable
    weights = weights.double().numpy()
    codes, nearest_to_tie = np.zeros_like(weights), np.full(len(weights), 0.5)
    for row, start in enumerate(weights):
        now = start.copy()
        for step, i in enumerate(order):
            within = min(max(now[i], -limit), limit)
            tie = abs(abs(within - np.floor(within)) - 0.5) if within == now[i] else 0.5
            nearest_to_tie[row] = min(nearest_to_tie[row], tie)
            codes[row, i] = np.rint(within)
            done, left = order[: step + 1], order[step + 1 :]
            push = hessian[np.ix_(left, done)] @ (codes[row, done] - start[done])
            now[left] = start[left] - np.linalg.solve(hessian[np.ix_(left, left)], push)
    return codes, nearest_to_tie


def assert_resolved(codes, quotient, bits, moments, at_least=0.3):
    """Compare the rows that no last bit decides."""
    limit = largest_code(bits)
    expected, nearest_to_tie = resolved(quotient, limit, moments)
    clear = nearest_to_tie > 1e-3 + 1e-6 * limit
    assert clear.mean() >= at_least
    np.testing.assert_array_equal(codes.flatten(1).numpy()[clear], expected[clear])


# --- round_to_moments ----------------------------------------------------------------------------


def test_an_error_is_passed_on_by_hand():
    # Two inputs that are always equal, damped: [[1.01, 1], [1, 1.01]]. 0.4 becomes 0 and leaves
    # 0.4 / 1.01 = 0.396 to the second, which so is 0.796 and becomes 1: the sum is kept.
    moments = torch.ones(1, 2, 2)
    codes = round_to_moments(torch.tensor([[0.4, 0.4]]), torch.ones(1), 4, moments)
    assert codes.tolist() == [[0, 1]]
    # At half the scale 0.8 becomes 1, and -0.2 / 1.01 makes 0.602 of the second: 1.
    codes = round_to_moments(torch.tensor([[0.4, 0.4]]), torch.tensor([0.5]), 4, moments)
    assert codes.tolist() == [[1, 1]]


def test_what_clipping_cuts_off_is_passed_on_too():
    # 1.6 is cut to 1; 0.6 / 1.01 = 0.594 makes a 1 of the second weight.
    codes = round_to_moments(torch.tensor([[1.6, 0.0]]), torch.ones(1), 2, torch.ones(1, 2, 2))
    assert codes.tolist() == [[1, 1]]


def test_inputs_of_the_largest_moments_come_first():
    # x2 = 2 x1, moments [[1, 2], [2, 4]] + 0.025. The second, larger, is rounded first: 0.4 -> 0,
    # and 0.4 * 2 / 1.025 = 0.78 makes 1.18 of the first: 1. In the other order the first, 0.4,
    # would be 0, the second 0.4 + 0.4 * 2 / 4.025 = 0.599: 1.
    moments = torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    codes = round_to_moments(torch.tensor([[0.4, 0.4]]), torch.ones(1), 4, moments)
    assert codes.tolist() == [[1, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12, 16])
def test_codes_are_those_of_exact_re_solving(bits):
    x, weight = correlated(60, 12, seed=bits), randn(40, 12, seed=100 + bits)
    moments = (x.T @ x)[None]
    scale = fit_scale(weight, bits)
    codes = round_to_moments(weight, scale, bits, moments)
    assert_resolved(codes, weight / scale[:, None], bits, moments[0])
    assert not torch.equal(codes, quantize_nearest(weight, scale, bits))


def test_few_rows_of_input_leave_a_singular_matrix_that_the_damping_mends():
    x, weight = correlated(3, 12), randn(40, 12, seed=1)
    scale = fit_scale(weight, 4)
    codes = round_to_moments(weight, scale, 4, (x.T @ x)[None])
    assert_resolved(codes, weight / scale[:, None], 4, x.T @ x)


def test_equal_moments_keep_the_order_of_the_inputs():
    # Ones on the diagonal: all inputs are of the same size.
    moments = torch.full((8, 8), 0.7) + 0.3 * torch.eye(8)
    weight = randn(40, 8)
    scale = fit_scale(weight, 3)
    codes = round_to_moments(weight, scale, 3, moments[None])
    assert_resolved(codes, weight / scale[:, None], 3, moments)


def test_groups_are_rounded_apart():
    weight = randn(60, 2, 5)
    scale = fit_scale(weight, 4)
    inputs = [correlated(50, 10, seed=s) for s in (1, 2, 3)]
    moments = torch.stack([x.T @ x for x in inputs])
    codes = round_to_moments(weight, scale, 4, moments)
    assert codes.shape == weight.shape
    for group in range(3):
        own = slice(20 * group, 20 * group + 20)
        quotient = weight[own].flatten(1) / scale[own, None]
        assert_resolved(codes[own], quotient, 4, moments[group])


@pytest.mark.parametrize("bits", WIDTHS)
def test_uncorrelated_inputs_give_nearest_rounding(bits):
    weight = randn(16, 4, 3, 3, seed=bits)
    scale = fit_scale(weight, bits)
    sizes = torch.rand(36, generator=generator(bits)) * 100
    sizes[::5] = 0  # some inputs are always zero
    codes = round_to_moments(weight, scale, bits, torch.diag(sizes)[None])
    assert codes.dtype == torch.int16
    # Both divide in float32; a last bit may decide what lies between two codes.
    quotient = weight.double() / scale.double().reshape(-1, 1, 1, 1)
    clear = ((quotient - quotient.floor() - 0.5).abs() > 1e-7 * largest_code(bits)).numpy()
    assert clear.mean() > 0.95
    nearest = quantize_nearest(weight, scale, bits)
    np.testing.assert_array_equal(codes.numpy()[clear], nearest.numpy()[clear])


def test_all_zero_inputs_give_nearest_rounding():
    weight = randn(6, 8)
    scale = fit_scale(weight, 3)
    codes = round_to_moments(weight, scale, 3, torch.zeros(2, 8, 8))
    assert torch.equal(codes, quantize_nearest(weight, scale, 3))


def test_a_dead_group_beside_a_live_one():
    weight, x = randn(40, 6), correlated(30, 6)
    scale = fit_scale(weight, 3)
    moments = torch.stack([torch.zeros(6, 6), x.T @ x])
    codes = round_to_moments(weight, scale, 3, moments)
    assert torch.equal(codes[:20], quantize_nearest(weight[:20], scale[:20], 3))
    assert_resolved(codes[20:], weight[20:] / scale[20:, None], 3, x.T @ x)


def test_dead_inputs_are_rounded_to_nearest_and_bear_nothing():
    weight, x = randn(40, 12), correlated(60, 12)
    dead = [0, 4, 11]
    x[:, dead] = 0
    scale = fit_scale(weight, 4)
    codes = round_to_moments(weight, scale, 4, (x.T @ x)[None])
    assert torch.equal(codes[:, dead], quantize_nearest(weight, scale, 4)[:, dead])
    assert_resolved(codes, weight / scale[:, None], 4, x.T @ x)
    # Other values on dead inputs change nothing for the living.
    other = weight.clone()
    other[:, dead] = 5.0
    alive = [i for i in range(12) if i not in dead]
    assert torch.equal(
        round_to_moments(other, scale, 4, (x.T @ x)[None])[:, alive], codes[:, alive]
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_stay_on_the_grid_whatever_is_passed_on(bits):
    weight, x = randn(12, 10, seed=bits), correlated(20, 10, seed=bits)
    limit = largest_code(bits)
    # The largest weight lies at twice the largest code.
    scale = weight.abs().amax(1) / (2 * limit)
    codes = round_to_moments(weight, scale, bits, (x.T @ x)[None])
    assert codes.dtype == torch.int16
    assert int(codes.max()) == limit
    assert int(codes.min()) == -limit


@pytest.mark.parametrize(("bits", "share"), [(2, 0.7), (3, 0.4), (4, 0.4), (8, 0.4), (16, 0.5)])
def test_outputs_change_less_than_with_nearest_rounding(bits, share):
    x, weight = correlated(200, 24), randn(32, 24, seed=7)
    scale = fit_scale(weight, bits)

    def error(codes):
        moved = QuantizedTensor(codes, scale).dequantize() - weight
        return float((x @ moved.T).double().square().sum())

    calibrated = round_to_moments(weight, scale, bits, (x.T @ x)[None])
    assert error(calibrated) < share * error(quantize_nearest(weight, scale, bits))


def test_a_size_of_all_inputs_changes_nothing():
    """Images of another range, the same codes: the damping is a share."""
    x, weight = correlated(60, 12), randn(20, 12)
    scale = fit_scale(weight, 4)
    moments = (x.T @ x)[None]
    codes = round_to_moments(weight, scale, 4, moments)
    for factor in (2.0**-30, 2.0**30):
        assert torch.equal(round_to_moments(weight, scale, 4, moments * factor), codes)


def test_weight_scale_and_moments_are_left_as_they_are():
    x, weight = correlated(60, 12), randn(20, 12).requires_grad_()
    scale, moments = fit_scale(weight, 4), (x.T @ x)[None]
    before = [t.detach().clone() for t in (weight, scale, moments)]
    codes = round_to_moments(weight, scale, 4, moments)
    assert not codes.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((weight, scale, moments), before, strict=True))


# --- second_moments ------------------------------------------------------------------------------


def patches_one_by_one(layer, x, sides):
    """Rows of a convolution's input, ``[groups, rows, fan_in]``; `sides` top, bottom, left, right.

    Cut out by loops over images and places.
    """
    modes = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}
    top, bottom, left, right = sides
    x = np.pad(
        x.double().numpy(),
        ((0, 0), (0, 0), (top, bottom), (left, right)),
        modes[layer.padding_mode],
    )
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    per_group = layer.in_channels // layer.groups
    rows = [[] for _ in range(layer.groups)]
    for image in x:
        for i in range(0, image.shape[1] - dh * (kh - 1), sh):
            for j in range(0, image.shape[2] - dw * (kw - 1), sw):
                for group in range(layer.groups):
                    channels = image[group * per_group : (group + 1) * per_group]
                    patch = [
                        channel[i + a * dh, j + b * dw]
                        for channel in channels
                        for a in range(kh)
                        for b in range(kw)
                    ]
                    rows[group].append(patch)
    return np.array(rows)


def conv(*args, **kwargs):
    torch.manual_seed(0)
    return prepare(nn.Conv2d(*args, **kwargs), QuantConfig(4))


CONVOLUTIONS = {
    "plain": (conv(3, 4, 3), (0, 0, 0, 0)),
    "pointwise": (conv(4, 4, 1, stride=2), (0, 0, 0, 0)),
    "padded": (conv(2, 4, 3, padding=1), (1, 1, 1, 1)),
    "uneven padding": (conv(2, 4, (3, 2), padding=(2, 1)), (2, 2, 1, 1)),
    "strided": (conv(2, 4, 3, stride=(2, 3), padding=1), (1, 1, 1, 1)),
    "dilated": (conv(2, 4, (3, 2), dilation=(2, 3), padding=(2, 0)), (2, 2, 0, 0)),
    "grouped": (conv(6, 9, 3, groups=3, padding=1), (1, 1, 1, 1)),
    "depthwise": (conv(4, 8, 3, groups=4, stride=2), (0, 0, 0, 0)),
    "all at once": (
        conv(4, 6, 3, stride=(2, 1), dilation=(1, 2), groups=2, padding=(1, 2)),
        (1, 1, 2, 2),
    ),
    "valid": (conv(2, 4, 3, padding="valid"), (0, 0, 0, 0)),
    "same": (conv(2, 4, 3, padding="same"), (1, 1, 1, 1)),
    # An even kernel pads one more behind than in front.
    "same, even": (conv(2, 4, (2, 4), padding="same"), (0, 1, 1, 2)),
    "same, dilated": (conv(2, 4, (4, 2), padding="same", dilation=(1, 3)), (1, 2, 1, 2)),
    "reflect": (conv(2, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 2, 1, 1)),
    "replicate": (conv(2, 4, 3, padding=2, padding_mode="replicate"), (2, 2, 2, 2)),
    "circular": (conv(2, 4, 3, padding=(1, 2), padding_mode="circular"), (1, 1, 2, 2)),
    "same, even, reflect": (
        conv(2, 4, 4, padding="same", padding_mode="reflect"),
        (1, 2, 1, 2),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_second_moments_of_a_convolution_are_those_of_its_patches(kind):
    layer, sides = CONVOLUTIONS[kind]
    x = randn(3, layer.in_channels, 7, 6) + 0.5
    rows = patches_one_by_one(layer, x, sides)
    # The patches are the layer's: times its weights they make its outputs.
    weight = layer.quantized_weight().detach().double().numpy()
    weight = weight.reshape(layer.groups, -1, rows.shape[2])
    outputs = np.einsum("grf,gof->rgo", rows, weight).reshape(rows.shape[1], -1)
    outputs += layer.bias.detach().double().numpy()
    actual = layer(x).detach().permute(0, 2, 3, 1).flatten(0, 2).double()
    np.testing.assert_allclose(actual, outputs, rtol=1e-4, atol=1e-5)

    expected = np.einsum("gri,grj->gij", rows, rows)
    for images in (x, x.to(memory_format=torch.channels_last)):
        moments = second_moments(layer, images)
        np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(9,), (4,), (2, 3)])
def test_second_moments_of_a_linear_layer_take_all_leading_dimensions(shape):
    layer = prepare(nn.Linear(5, 2), QuantConfig(4))
    x = randn(*shape, 5)
    rows = x.reshape(-1, 5).double()
    expected = sum(torch.outer(row, row) for row in rows)
    torch.testing.assert_close(second_moments(layer, x), expected[None].float())


def test_of_many_rows_every_nth_is_looked_at(monkeypatch):
    monkeypatch.setattr(quant.qat.rounding, "_ROWS", 10)
    layer = prepare(nn.Linear(4, 2), QuantConfig(4))
    x = randn(25, 4)  # 25 rows, at most 10: every third
    torch.testing.assert_close(second_moments(layer, x), (x[::3].T @ x[::3])[None])
    x = randn(10, 4)  # as many as allowed
    torch.testing.assert_close(second_moments(layer, x), (x.T @ x)[None])


def test_of_many_images_every_nth_is_looked_at(monkeypatch):
    monkeypatch.setattr(quant.qat.rounding, "_ROWS", 40)
    layer, x = conv(1, 2, 1, stride=2), randn(10, 1, 4, 4)
    # Each image has 4 places: 10 images are 40 rows.
    assert float(second_moments(layer, x)) == pytest.approx(float(x[..., ::2, ::2].square().sum()))
    monkeypatch.setattr(quant.qat.rounding, "_ROWS", 39)
    expected = float(x[::2, :, ::2, ::2].square().sum())
    assert float(second_moments(layer, x)) == pytest.approx(expected)
    # One image has more rows than are wanted: it is looked at all the same.
    monkeypatch.setattr(quant.qat.rounding, "_ROWS", 1)
    expected = float(x[:1, :, ::2, ::2].square().sum())
    assert float(second_moments(layer, x)) == pytest.approx(expected)


# --- calibrated_rounding -------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, two linear layers and one that is never used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU())
        self.hidden = nn.Linear(6 * 16, 12)
        self.head = nn.Linear(12, 30)
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(F.relu(self.hidden(self.first(x).flatten(1))))


def net(bits=3, activation_bits=32):
    torch.manual_seed(0)
    return prepare(Net(), QuantConfig(bits, activation_bits))


@pytest.mark.parametrize("activation_bits", [32, 3])
def test_each_layer_is_rounded_for_what_the_rounded_layers_before_it_give(activation_bits):
    model, x = net(activation_bits=activation_bits), randn(50, 2, 4, 4)
    plain = copy.deepcopy(model)
    rounded = calibrated_rounding(model, lambda m: m(x))
    assert list(rounded) == ["first.0.weight", "hidden.weight", "head.weight"]

    def on_grid(t):
        if activation_bits == 32:
            return t
        # 3 bits: 3 steps to either side, or 7 from zero.
        step = t.abs().max() / (3 if t.min() < 0 else 7)
        return (t / step).round() * step

    layer = plain.first[0]
    rows = torch.from_numpy(patches_one_by_one(layer, on_grid(x), (1, 1, 1, 1)))[0]
    quotient = layer.weight.detach().flatten(1) / layer.weight_scale[:, None]
    assert_resolved(rounded["first.0.weight"].codes, quotient, 3, rows.T @ rows)

    y = F.conv2d(on_grid(x), rounded["first.0.weight"].dequantize(), layer.bias, padding=1)
    y = F.relu(y).flatten(1)
    y = F.relu(F.linear(on_grid(y), rounded["hidden.weight"].dequantize(), plain.hidden.bias))
    y = on_grid(y).detach()
    quotient = plain.head.weight.detach() / plain.head.weight_scale[:, None]
    assert_resolved(rounded["head.weight"].codes, quotient, 3, y.T @ y)


def test_weights_become_the_rounded_ones_and_nothing_else_changes():
    model, x = net(), randn(20, 2, 4, 4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scales = {name: t.clone() for name, t in weight_scales(model).items()}
    rounded = calibrated_rounding(model, lambda m: m(x))
    for name, scale in weight_scales(model).items():
        assert torch.equal(scale, scales[name])
        assert name not in rounded or torch.equal(rounded[name].scale, scale)
    for name, tensor in model.state_dict().items():
        expected = rounded[name].dequantize() if name in rounded else before[name]
        assert torch.equal(tensor, expected)
    assert all(p.requires_grad for p in model.parameters())
    # A forward pass computes with these very weights.
    for name, layer in quantized_layers(model):
        if f"{name}.weight" in rounded:
            assert torch.equal(layer.quantized_weight(), rounded[f"{name}.weight"].dequantize())


def test_a_layer_that_is_never_reached_is_left_out():
    model, x = net(), randn(5, 2, 4, 4)
    spare = model.spare.weight.clone()
    assert "spare.weight" not in calibrated_rounding(model, lambda m: m(x))
    assert torch.equal(model.spare.weight, spare)
    # Nor is one that the given pass stops short of.
    assert list(calibrated_rounding(net(), lambda m: m.first(x))) == ["first.0.weight"]
    assert calibrated_rounding(net(), lambda m: None) == {}


def test_a_layer_that_is_used_twice_is_rounded_for_its_first_input():
    x, other = correlated(40, 8, seed=1), correlated(40, 8, seed=5)
    torch.manual_seed(0)
    layer = prepare(nn.Linear(8, 20), QuantConfig(3))
    once, swapped = copy.deepcopy(layer), copy.deepcopy(layer)
    outputs = []
    twice = calibrated_rounding(layer, lambda m: outputs.extend([m(x), m(other)]))["weight"]
    assert torch.equal(twice.codes, calibrated_rounding(once, lambda m: m(x))["weight"].codes)
    reverse = calibrated_rounding(swapped, lambda m: (m(other), m(x)))["weight"]
    assert not torch.equal(twice.codes, reverse.codes)
    # The second use computes with the rounded weights too.
    torch.testing.assert_close(outputs[1], F.linear(other, twice.dequantize(), layer.bias))


def test_images_pass_once():
    calls = []
    model, x = net(), randn(5, 2, 4, 4)
    calibrated_rounding(model, lambda m: (calls.append(m), m(x)))
    assert calls == [model]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_hooks_are_taken_off_and_others_stay():
    model, x = net(), randn(5, 2, 4, 4)
    seen = []
    model.hidden.register_forward_pre_hook(lambda *_: seen.append(1))
    calibrated_rounding(model, lambda m: m(x))
    assert hooks(model) == 1
    assert seen == [1]
    weight = model.hidden.weight.detach().clone()
    model(10 * x)
    assert torch.equal(model.hidden.weight, weight)


def test_hooks_are_taken_off_when_the_pass_fails():
    model = net()

    def failing(m):
        m.first(randn(5, 2, 4, 4))
        raise RuntimeError("no more images")

    with pytest.raises(RuntimeError, match="no more images"):
        calibrated_rounding(model, failing)
    assert hooks(model) == 0
    # Also when the layer itself refuses what it is given.
    with pytest.raises(RuntimeError):
        calibrated_rounding(net(), lambda m: m(randn(5, 3, 4, 4)))


def test_the_networks_outputs_change_less_than_with_nearest_rounding():
    x = randn(100, 2, 4, 4) + 0.5
    torch.manual_seed(0)
    plain = Net()
    nearest, calibrated = (prepare(copy.deepcopy(plain), QuantConfig(3)) for _ in range(2))
    calibrated_rounding(calibrated, lambda m: m(x))
    with torch.no_grad():
        errors = [float((m(x) - plain(x)).square().mean()) for m in (calibrated, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_the_result_needs_no_gradient_and_torchs_generator_is_not_touched():
    model, x = net(), randn(5, 2, 4, 4)
    state = torch.get_rng_state()
    rounded = calibrated_rounding(model, lambda m: m(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(t.dequantize().requires_grad for t in rounded.values())
    assert torch.is_grad_enabled()
