"""WAGE's functions by hand, and a client's steps against a model of them in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from quant import (
    IntegerActivation,
    IntegerInput,
    IntegerOutput,
    IntegerSGD,
    NonFiniteError,
    QuantConfig,
    Scaled,
    check_integer,
    load_state,
    prepare,
    prepare_integer,
    scale_gradients,
    shared_scale,
    stored_codes,
    stored_state,
    ternary,
    weight_scales,
)
from quant.lowbit.integer import quantize_shifted, quantize_unit, shift_of, sigma

NAN, INF = float("nan"), float("inf")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(rows, alpha=1.0):
    """A scaled layer with these weights."""
    weight = torch.tensor(rows)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return Scaled(layer, alpha)


def network(seed=0, sizes=(5, 7, 6, 3), alphas=(1.0, 2.0, 4.0)):
    """Two hidden layers and a head, of weights from -0.75 to 0.75."""
    draw = generator(seed)
    layers: list[nn.Module] = [IntegerInput(0.5)]
    for n_in, n_out, alpha in zip(sizes, sizes[1:], alphas, strict=False):
        rows = torch.rand(n_out, n_in, generator=draw) * 1.5 - 0.75
        layers += [linear(rows.tolist(), alpha), IntegerActivation()]
    return nn.Sequential(*layers[:-1], IntegerOutput())


def images(count, of, seed=1):
    draw = generator(seed)
    x = torch.rand(count, of, generator=draw) * 4 - 2
    return x, torch.randint(0, 3, (count,), generator=draw)


# --- the functions -----------------------------------------------------------------------------


def test_the_step_is_two_to_the_one_minus_k():
    assert [sigma(bits) for bits in (2, 3, 8, 16)] == [1 / 2, 1 / 4, 1 / 128, 2**-15]


def test_q_rounds_to_the_open_unit_interval_by_hand():
    # k = 3: levels -3/4 to 3/4. 0.3 / 0.25 = 1.2; 0.375 / 0.25 = 1.5, a tie, to the even 2.
    x = torch.tensor([0.3, 0.375, 0.125, -0.9, 7.0, -7.0, 0.0])
    assert quantize_unit(x, 3).tolist() == [0.25, 0.5, 0.0, -0.75, 0.75, -0.75, 0.0]
    assert quantize_unit(torch.tensor([1.0, -1.0]), 8).tolist() == [127 / 128, -127 / 128]
    assert quantize_unit(torch.tensor([NAN]), 8).isnan().all()


@pytest.mark.parametrize(
    ("largest", "shift"),
    [
        *[(1.0, 1.0), (3.0, 4.0), (2.9, 4.0), (2.8, 2.0), (0.3, 0.25), (0.4, 0.5), (2.0**100,) * 2],
        *[(1.4142135, 1.0), (1.4142137, 2.0), (2.0**-126,) * 2, (1e-45, 2.0**-126)],
        *[(0.0, 1.0), (3.4e38, 2.0**126)],
    ],
)
def test_a_shift_is_the_power_of_two_nearest_on_a_log_scale(largest, shift):
    x = torch.tensor([[0.0, -largest], [largest / 2, 0.0]])
    assert shift_of(x) == shift_of(-x) == shift


def test_a_shift_is_that_of_the_logarithm_at_all_magnitudes():
    values = 2.0 ** np.linspace(-100, 100, 4001)
    expected = 2.0 ** np.rint(np.log2(values.astype(np.float32).astype(np.float64)))
    assert [float(shift_of(torch.tensor([v], dtype=torch.float32))) for v in values] == [*expected]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_so_and_is_no_ordinary_code(bad):
    x = torch.tensor([0.5, bad])
    assert shift_of(x).isnan()
    assert quantize_shifted(x, 8).isnan().all()
    with pytest.raises(NonFiniteError, match="the weight is not finite: 1 of 2"):
        stored_codes(x, 8)


def test_an_output_gradient_is_put_at_about_one_and_keeps_no_scale():
    # Largest 0.003: log2 = -8.38, 2**-8; 0.003 * 256 = 0.768, -0.001 * 256 = -0.256, in 128ths
    # 98.3 and -32.8. Times a power of two it is the same.
    x = torch.tensor([0.003, -0.001, 0.0])
    assert (quantize_shifted(x, 8) * 128).tolist() == [98, -33, 0]
    assert torch.equal(quantize_shifted(x * 2**20, 8), quantize_shifted(x, 8))
    # 1.3 / 1 is beyond the outermost level.
    assert quantize_shifted(torch.tensor([1.3]), 8).item() == 127 / 128
    assert quantize_shifted(torch.zeros(3), 8).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 6, 8, 12, 16])
def test_stored_weights_reach_from_minus_a_half_to_a_half(bits):
    codes = stored_codes(torch.tensor([-9.0, -0.5, 0.0, 0.5, 0.75]), bits)
    edge = 2 ** (bits - 2)
    assert codes.tolist() == [-edge, -edge, 0, edge, edge]
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)


def test_ternary_weights_are_those_of_the_stored_ones():
    # 0.2505 is stored as 32 / 128, on the threshold, and so computes as 0.
    weight = torch.tensor([0.2505, 0.2578, -0.25, -0.26, 0.5, -0.5, 0.0])
    codes = stored_codes(weight, 8)
    assert codes.tolist() == [32, 33, -32, -33, 64, -64, 0]
    assert ternary(codes / 128).tolist() == [0, 0.5, 0, -0.5, 0.5, -0.5, 0]


def test_the_stored_form_of_a_state_has_one_scale_for_all_channels():
    state = {"w": torch.tensor([[0.3], [9.0]]), "mean": torch.tensor([0.1])}
    update = stored_state(state, ["w"], 6)
    assert (update.bits, update.content) == (6, "weights")
    assert update.quantized["w"].codes.tolist() == [[10], [16]]
    assert update.quantized["w"].scale.tolist() == [1 / 32] * 2
    assert update.floats == {"mean": state["mean"]}
    with pytest.raises(NonFiniteError, match="w: the weight is not finite"):
        stored_state({"w": torch.tensor([[NAN]])}, ["w"], 6)


@pytest.mark.parametrize(
    ("fan_in", "alpha"),
    # 0.75 / sqrt(6 / 27) = 1.59: log2 0.67. / sqrt(6 / 864) = 9: 3.17. / sqrt(6 / 192) = 4.2: 2.08.
    [(9, 1.0), (27, 2.0), (864, 8.0), (192, 4.0), (1, 1.0)],
)
def test_alpha_is_a_power_of_two_from_one(fan_in, alpha):
    assert shared_scale(fan_in) == alpha


# --- the update --------------------------------------------------------------------------------


def test_a_step_of_whole_levels_by_hand():
    weight = nn.Parameter(torch.tensor([[0.25, -0.25, 0.49, 0.7, 0.1]]))
    optimizer = IntegerSGD({"w": weight}, 8, lr=8.0, generator=generator())
    # On the grid at once: 32, -32, 62.72 -> 63, clipped 64, 12.8 -> 13.
    assert (weight.detach() * 128).tolist() == [[32, -32, 63, 64, 13]]
    # 8 g: 8, -4, -8 (clipped at 64), 2, 0.
    weight.grad = torch.tensor([[1.0, -0.5, -1.0, 0.25, 0.0]])
    optimizer.step()
    assert (weight.detach() * 128).tolist() == [[24, -28, 64, 62, 13]]


@pytest.mark.parametrize("bits", [6, 8, 12, 16])
def test_eta_moves_weights_equally_far_at_every_width(bits):
    # 4/128 in all: 1, 4, 64 and 1,024 steps of the width's grid.
    weight = nn.Parameter(torch.tensor([[0.25]]))
    optimizer = IntegerSGD({"w": weight}, bits, lr=8.0, generator=generator())
    weight.grad = torch.tensor([[0.5]])
    optimizer.step()
    assert weight.item() == 0.25 - 4 / 128


def test_the_rounding_of_steps_has_no_bias():
    weight = nn.Parameter(torch.zeros(1, 100_000))
    optimizer = IntegerSGD({"w": weight}, 8, lr=1.0, generator=generator())
    weight.grad = torch.full_like(weight, 0.3)
    optimizer.step()
    codes = weight.detach() * 128
    assert {*codes.unique().tolist()} == {0, -1}
    # Four deviations of the mean: sqrt(0.3 * 0.7 / 1e5) = 0.00145.
    assert codes.mean() == pytest.approx(-0.3, abs=0.006)


def test_one_seed_is_one_result():
    def after(seed):
        weight = nn.Parameter(torch.zeros(4, 50))
        optimizer = IntegerSGD({"w": weight}, 8, lr=1.0, generator=generator(seed))
        weight.grad = torch.linspace(-1, 1, 200).view(4, 50)
        optimizer.step()
        return weight.detach()

    assert torch.equal(after(3), after(3))
    assert not torch.equal(after(3), after(4))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_is_no_step(bad):
    weight = nn.Parameter(torch.tensor([[0.25, 0.0]]))
    optimizer = IntegerSGD({"w": weight}, 8, lr=8.0, generator=generator())
    weight.grad = torch.tensor([[1.0, bad]])
    with pytest.raises(NonFiniteError, match="w: the gradient is not finite"):
        optimizer.step()
    assert weight.tolist() == [[0.25, 0.0]]


def test_a_weight_without_a_gradient_stays():
    weight = nn.Parameter(torch.tensor([[0.25]]))
    IntegerSGD({"w": weight}, 8, lr=8.0, generator=generator()).step()
    assert weight.item() == 0.25


# --- the network -------------------------------------------------------------------------------


def test_activations_are_clipped_alike_at_every_width():
    a = torch.tensor([-0.1, 0.0, 0.3, 0.999, 1.0, 3.0])
    activation = IntegerActivation()
    assert torch.equal(activation(a), a.clamp(0, 1))
    activation.activation_bits = 8
    assert (activation(a) * 128).tolist() == [0, 0, 38, 127, 127, 127]


def test_an_activations_gradient_is_masked_before_it_is_scaled():
    # Of gradients 8, 0.3, -0.1 and 9 the outer two meet the clip. 0.3 / 0.25 = 1.2, beyond the
    # outermost level; -0.1 / 0.25 = -0.4: -51.2 / 128.
    a = torch.tensor([-1.0, 0.5, 0.25, 2.0], requires_grad=True)
    activation = IntegerActivation()
    activation.activation_bits = activation.gradient_bits = 8
    activation(a).backward(torch.tensor([8.0, 0.3, -0.1, 9.0]))
    assert (a.grad * 128).tolist() == [0, 127, -51, 0]


def test_the_input_is_on_the_grid_of_activations():
    enter = IntegerInput(0.5)
    x = torch.tensor([-2.0, 0.011, 2.0])
    assert torch.equal(enter(x), x / 2)
    enter.activation_bits = 8
    assert (enter(x) * 128).tolist() == [-127, 1, 127]


def test_float32_sgd_on_w_is_sgd_on_v():
    """With momentum, a decay and a pull to the start: W = alpha V to the bit."""
    net = network()
    plain = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 6, bias=False))
    plain.append(nn.Linear(6, 3, bias=False))
    scaled = [module for module in net if isinstance(module, Scaled)]
    for ours, theirs in zip(scaled, plain, strict=True):
        theirs.weight.data = ours.layer.weight.detach() / ours.alpha
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    one = torch.optim.SGD(net.parameters(), **sgd)
    other = torch.optim.SGD(plain.parameters(), **sgd)
    start = [weight.detach().clone() for weight in net.parameters()]
    x, labels = images(8, 5)
    for _ in range(3):
        one.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        scale_gradients(net)
        for weight, began in zip(net.parameters(), start, strict=True):
            weight.grad += 0.5 * (weight.detach() - began)
        one.step()

        other.zero_grad()
        y = plain[0](x / 2).clamp(0, 1)
        y = plain[1](y).clamp(0, 1)
        nn.functional.cross_entropy(plain[2](y), labels).backward()
        for theirs, ours, began in zip(plain, scaled, start, strict=True):
            theirs.weight.grad += 0.5 * (theirs.weight.detach() - began / ours.alpha)
        other.step()
    for ours, theirs in zip(scaled, plain, strict=True):
        assert not torch.equal(ours.layer.weight, start[0])
        assert torch.equal(ours.layer.weight, theirs.weight * ours.alpha)


class InNumPy:
    """A client of integer training, written from the paper with integers for codes."""

    def __init__(self, weights, alphas, bits, wide):
        self.edge, self.bits, self.wide = 2 ** (bits - 2), bits, 2 ** (wide - 1)
        grid = 2 ** (bits - 1)
        self.codes = [np.clip(np.rint(w * grid), -self.edge, self.edge) for w in weights]
        self.alphas = alphas

    def grid(self, x):
        return np.clip(np.rint(x * self.wide), 1 - self.wide, self.wide - 1) / self.wide

    def shifted(self, x):
        largest = np.abs(x).max()
        return x / 2 ** np.rint(np.log2(largest)) if largest else x

    def logits(self, x):
        """Forward; keeps what each layer saw and what went into its activation."""
        self.seen, self.before = [self.grid(x / 2)], []
        for place, (codes, alpha) in enumerate(zip(self.codes, self.alphas, strict=True)):
            self.forward = np.clip(np.rint(codes / self.edge), -1, 1) / 2
            y = self.seen[-1] @ (self.forward / alpha).T
            self.before.append(y)
            if place < len(self.codes) - 1:
                self.seen.append(self.grid(np.clip(y, 0, None)))
        return y

    def step(self, e, eta, draw):
        """Backward from the gradient of the loss by the logits, and the update."""
        e, gradients = self.grid(self.shifted(e)), []
        for place in reversed(range(len(self.codes))):
            gradients.insert(0, e.T @ self.seen[place] / self.alphas[place])
            forward = np.clip(np.rint(self.codes[place] / self.edge), -1, 1) / 2
            if place:
                below, a = e @ (forward / self.alphas[place]), self.before[place - 1]
                open_ = (a > 0) & (a < 1 - 1 / self.wide)
                e = self.grid(self.shifted(below * open_))
        for place, g in enumerate(gradients):
            u = self.shifted(g) * eta * 2.0 ** (self.bits - 8)
            noise = torch.rand(g.shape, generator=draw).numpy()
            steps = np.floor(u) + (noise < u - np.floor(u))
            self.codes[place] = np.clip(self.codes[place] - steps, -self.edge, self.edge)


@pytest.mark.parametrize(("bits", "wide"), [(8, 8), (6, 6), (12, 8), (16, 8), (3, 3)])
def test_a_client_agrees_with_the_model_in_numpy_bit_for_bit(bits, wide):
    """Sums of few values on coarse grids are exact in float32, in whatever order."""
    net = network()
    weights = [w.detach().numpy().astype(np.float64) for w in net.parameters()]
    prepare_integer(net, QuantConfig(bits, wide, wide))
    ours = IntegerSGD(dict(net.named_parameters()), bits, lr=8.0, generator=generator(7))
    theirs, draw = InNumPy(weights, [1.0, 2.0, 4.0], bits, wide), generator(7)
    moved = 0
    for step in range(6):
        x, labels = images(8, 5, seed=step)
        logits = net(x)
        assert np.array_equal(logits.detach().numpy(), theirs.logits(x.numpy()))
        e = logits.detach().softmax(1) - nn.functional.one_hot(labels, 3)
        ours.zero_grad()
        logits.backward(e / 8)
        scale_gradients(net)
        before = [codes.copy() for codes in theirs.codes]
        ours.step()
        theirs.step((e / 8).numpy().astype(np.float64), 8.0, draw)
        for weight, codes in zip(net.parameters(), theirs.codes, strict=True):
            assert np.array_equal(weight.detach().numpy() * 2 ** (bits - 1), codes)
        moved += sum((a != b).sum() for a, b in zip(before, theirs.codes, strict=True))
    assert moved > 20


def test_convolutions_compute_with_ternary_weights_and_their_scale():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    nn.init.uniform_(conv.weight, -0.75, 0.75, generator=generator())
    weight = conv.weight.detach().clone()
    net = nn.Sequential(IntegerInput(), Scaled(conv, 2.0), IntegerOutput())
    x = quantize_unit(torch.randn(2, 2, 5, 5, generator=generator()), 8)
    prepare_integer(net, QuantConfig(8, 8, 8))
    levels = ternary(stored_codes(weight, 8) / 128)
    assert {*levels.unique().tolist()} == {-0.5, 0, 0.5}
    assert torch.equal(net(x), nn.functional.conv2d(x, levels / 2, padding=1))
    assert weight_scales(net)["1.layer.weight"].tolist() == [1 / 128] * 3
    # Loaded weights do not change the grid.
    load_state(net, {"1.layer.weight": weight * 9})
    assert weight_scales(net)["1.layer.weight"].tolist() == [1 / 128] * 3


def test_at_32_bits_nothing_is_rounded():
    net = network()
    x, _ = images(4, 5)
    y = (x / 2) @ net[1].layer.weight.T
    y = y.clamp(0, 1) @ net[3].layer.weight.T / 2
    torch.testing.assert_close(net(x), y.clamp(0, 1) @ net[5].layer.weight.T / 4)


def test_a_prepared_network_takes_other_widths():
    x, _ = images(4, 5)
    twice = prepare_integer(prepare_integer(network(), QuantConfig(8, 8)), QuantConfig(4, 4))
    once = prepare_integer(network(), QuantConfig(4, 4))
    assert torch.equal(twice(x), once(x))
    assert not torch.equal(once(x), prepare_integer(network(), QuantConfig(8, 8))(x))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(2, 2)), r"0\.weight is not the weight of a quant\.Scaled layer"),
        (nn.Sequential(linear([[1.0]]), nn.BatchNorm1d(1)), r"1\.weight is not the weight"),
        (nn.Sequential(linear([[1.0]]), IntegerOutput()), r"there is no quant\.IntegerInput"),
        (nn.Sequential(IntegerInput(), linear([[1.0]])), r"there is no quant\.IntegerOutput"),
        (
            nn.Sequential(IntegerInput(), Scaled(nn.Conv1d(1, 1, 1, bias=False)), IntegerOutput()),
            r"1\.layer\.weight is of a Conv1d; allowed in quant\.Scaled: Conv2d and Linear",
        ),
    ],
)
def test_what_has_no_integer_form_is_refused(model, said):
    with pytest.raises(ValueError, match=said):
        check_integer(model)
    with pytest.raises(ValueError, match=said):
        prepare_integer(model, QuantConfig(8))


def test_a_scaled_layer_has_a_power_of_two_and_no_bias():
    with pytest.raises(ValueError, match=r"alpha: 3\.0 is not allowed"):
        Scaled(nn.Linear(2, 2, bias=False), 3.0)
    with pytest.raises(ValueError, match="layer: it has a bias"):
        Scaled(nn.Linear(2, 2))


def test_the_same_network_is_trained_quantization_aware_too():
    net = prepare(network(), QuantConfig(4, 4))
    net(images(4, 5)[0]).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())
