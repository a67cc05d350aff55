import pytest
import torch
from torch import nn

from quant import StrictAdamW, StrictSGD, absmax_scale, largest_code
from quant.qat.activations import fake_quantize_gradient


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter(values):
    return nn.Parameter(torch.tensor(values))


def strict(weight, scale, bits=8, seed=0, **options):
    options = {"lr": 0.1, **options}
    return StrictSGD([("w", weight)], {"w": scale}, bits, generator=generator(seed), **options)


def codes_of(weight, scale):
    """Codes in float64; they are whole numbers if the weight is on the grid."""
    return weight.detach().double() / scale.double()[:, None]


def test_weights_are_brought_onto_the_grid_at_once():
    # Scale 0.5, 3 bits: quotients 0.6, -1.4, 2.5 (tie to even) and 9 (clipped at 3).
    weight, bias = parameter([[0.3, -0.7, 1.25, 4.5]]), parameter([0.3])
    named = [("w", weight), ("b", bias)]
    StrictSGD(named, {"w": torch.tensor([0.5])}, 3, generator=generator(), lr=0.1)
    assert weight.tolist() == [[0.5, -0.5, 1.0, 1.5]]
    assert bias.item() == pytest.approx(0.3)


def test_a_step_of_whole_levels_by_hand():
    # lr 0.25: steps 1, -1, 0 and 1.5, that is 2, -2, 0 and 3 levels of 0.5; no rounding is left.
    weight, bias = parameter([[1.5, -0.5, 0.5, -1.0]]), parameter([0.3])
    named = [("w", weight), ("b", bias)]
    optimizer = StrictSGD(named, {"w": torch.tensor([0.5])}, 4, generator=generator(), lr=0.25)
    weight.grad = torch.tensor([[4.0, -4.0, 0.0, 6.0]])
    bias.grad = torch.tensor([0.4])
    optimizer.step()
    assert weight.tolist() == [[0.5, 0.5, 0.5, -2.5]]
    # The bias is off any grid: 0.3 - 0.25 * 0.4.
    assert bias.item() == pytest.approx(0.2)


def test_momentum_and_weight_decay_by_hand():
    # Decay 0.25 adds w / 4 to the gradient; lr 1, scale 0.5.
    # Step 1: g = 1 + 0.25 * 4 = 2, w = 4 - 2 = 2.
    # Step 2: g = 0.5 + 0.25 * 2 = 1, buffer = 0.5 * 2 + 1 = 2, w = 0.
    weight = parameter([[4.0]])
    optimizer = strict(weight, torch.tensor([0.5]), lr=1.0, momentum=0.5, weight_decay=0.25)
    weight.grad = torch.tensor([[1.0]])
    optimizer.step()
    assert weight.item() == 2
    weight.grad = torch.tensor([[0.5]])
    optimizer.step()
    assert weight.item() == 0


def test_a_step_beyond_the_grid_ends_on_its_last_level():
    weight = parameter([[1.0, -1.0]])
    optimizer = strict(weight, torch.tensor([0.5]), bits=3, lr=1.0)
    weight.grad = torch.tensor([[-100.0, 100.0]])
    optimizer.step()
    assert weight.tolist() == [[1.5, -1.5]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("gradient_bits", [32, 8])
def test_weights_stay_on_the_grid_while_a_model_trains(bits, gradient_bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    scales = {f"{i}.weight": absmax_scale(model[i].weight, bits) for i in (0, 2)}
    optimizer = StrictSGD(
        model.named_parameters(),
        scales,
        bits,
        gradient_bits=gradient_bits,
        generator=generator(),
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-3,
    )
    x, labels = torch.randn(40, 6), torch.arange(40) % 3
    before = [model[i].weight.clone() for i in (0, 2)]
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        for i in (0, 2):
            codes = codes_of(model[i].weight, scales[f"{i}.weight"])
            # A float32 product is within a relative 2**-24 of its code.
            assert ((codes - codes.round()).abs() <= codes.abs() * 2**-23).all()
            assert codes.abs().max() <= largest_code(bits) + 0.01
    assert all((model[i].weight != old).any() for i, old in zip((0, 2), before, strict=True))


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("step", [0.02, -0.3])
def test_a_step_below_a_level_moves_by_its_size_on_average(bits, step):
    # Every weight moves down one level with probability `step`: the mean of n has the deviation
    # sqrt(step (1 - step) / n). lr * gradient = step levels of 0.25.
    count = 200_000
    weight = nn.Parameter(torch.full((1, count), 0.25))
    optimizer = strict(weight, torch.tensor([0.25]), bits, lr=0.5)
    weight.grad = torch.full_like(weight, step * 0.25 / 0.5)
    optimizer.step()
    moved = (0.25 - weight.detach().double()) / 0.25
    deviation = (abs(step) * (1 - abs(step)) / count) ** 0.5
    assert abs(moved.mean().item() - step) < 5 * deviation
    assert set(moved.unique().tolist()) == {0.0, 1.0 if step > 0 else -1.0}


def test_many_small_steps_add_up():
    # 100 steps of 0.05 levels: 5 levels on average, each weight with variance 100 * 0.05 * 0.95.
    weight = nn.Parameter(torch.zeros(1, 20_000))
    optimizer = strict(weight, torch.tensor([1.0]), bits=8, lr=0.05)
    for _ in range(100):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    assert abs(weight.mean().item() - 5) < 5 * (4.75 / 20_000) ** 0.5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_without_a_gradient_nothing_moves(bits):
    # The weights are on the grid of a power-of-two scale: there is nothing to round.
    limit = largest_code(bits)
    weight = nn.Parameter(torch.linspace(-limit, limit, 20_001).round()[None] * 0.125)
    before = weight.detach().clone()
    optimizer = strict(weight, torch.tensor([0.125]), bits)
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert int((weight != before).sum()) == 0


def run(seed):
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(4, 50))
    optimizer = strict(weight, absmax_scale(weight, 4), bits=4, seed=seed, momentum=0.9)
    for _ in range(10):
        weight.grad = torch.randn(4, 50)
        optimizer.step()
    return weight.detach()


def test_same_seed_same_weights():
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_weight_gradients_are_quantized():
    # 2 bits: levels -4, 0, 4; 1 goes to 4 in a quarter of all cases, -3 to -4 in three of four.
    # lr 1, scale 1: whole levels.
    count = 10_000
    weight, bias = nn.Parameter(torch.full((1, 2 * count + 1), 5.0)), parameter([5.0])
    named = [("w", weight), ("b", bias)]
    scales = {"w": torch.tensor([1.0])}
    optimizer = StrictSGD(named, scales, 8, gradient_bits=2, generator=generator(), lr=1.0)
    gradient = torch.tensor([1.0] * count + [-3.0] * count + [4.0])
    weight.grad, bias.grad = gradient[None], torch.tensor([1.9])
    optimizer.step()
    ones, threes, largest = weight.detach()[0].split([count, count, 1])
    assert largest.item() == 1
    deviation = 4 * (0.25 * 0.75 / count) ** 0.5
    for values, levels, mean in ((ones, {1, 5}, 4), (threes, {5, 9}, 8)):
        assert set(values.tolist()) == levels
        assert abs(values.mean().item() - mean) < 5 * deviation
    assert bias.item() == pytest.approx(3.1)


@pytest.mark.parametrize("gradient_bits", [32, 2])
def test_a_closure_gives_the_same_step(gradient_bits):
    x = torch.tensor([[4.0, 1.9, -2.1]])

    def after(with_closure):
        weight = parameter([[5.0, 5.0, 5.0]])
        scale = torch.tensor([1.0])
        optimizer = strict(weight, scale, gradient_bits=gradient_bits, lr=1.0)

        def closure():
            optimizer.zero_grad()
            loss = (weight * x).sum()
            loss.backward()
            return loss

        if with_closure:
            assert optimizer.step(closure).item() == pytest.approx(19.0)
        else:
            closure()
            optimizer.step()
        return weight.tolist()

    assert after(True) == after(False)


def test_the_gradient_grid_is_that_of_the_errors():
    # 200 weights whose steps are whole levels: lr 1 and scale equal to the gradient's own step.
    gradient = torch.randn(1, 200, generator=generator(5))
    gradient *= 7 / gradient.abs().max()
    weight = nn.Parameter(torch.zeros(1, 200))
    optimizer = strict(weight, torch.tensor([1.0]), gradient_bits=4, lr=1.0, seed=3)
    weight.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(weight, -fake_quantize_gradient(gradient, 4, generator(3)).round())


def test_adamw_by_hand():
    # The first step is lr in the gradient's direction whatever its size, the decay lr * 0.5 * w:
    # 4 - 0.5 * 0.5 * 4 - 0.5 = 2.5 and -2 + 0.5 * 0.5 * 2 + 0.5 = -1, levels of 0.5.
    weight, bias = parameter([[4.0, -2.0]]), parameter([0.3])
    named = [("w", weight), ("b", bias)]
    scales, options = {"w": torch.tensor([0.5])}, {"lr": 0.5, "eps": 1e-12}
    optimizer = StrictAdamW(named, scales, 8, generator=generator(), weight_decay=0.5, **options)
    weight.grad, bias.grad = torch.tensor([[1e-3, -20.0]]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.5, -1.0]]), rtol=0, atol=1e-6)
    assert bias.item() == pytest.approx(0.3 - 0.25 * 0.3 - 0.5)


def test_small_steps_of_adamw_move_weights_by_their_size_on_average():
    # 100 steps of 0.05 levels each, as the gradient is always the same: 5 levels.
    weight = nn.Parameter(torch.zeros(1, 20_000))
    scales = {"w": torch.tensor([1.0])}
    optimizer = StrictAdamW([("w", weight)], scales, 8, generator=generator(), lr=0.05)
    for _ in range(100):
        weight.grad = torch.full_like(weight, -3.0)
        optimizer.step()
    assert abs(weight.mean().item() - 5) < 5 * (4.75 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: 1.0 is not allowed: it should be a number >= 0, < 1"),
        ({"betas": (0.9, -1.0)}, r"betas\[1\]: -1.0 is not allowed"),
        ({"eps": 0.0}, "eps: 0.0 is not allowed: it should be a number > 0"),
        ({"lr": 0.0}, "lr: 0.0 is not allowed"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0 is not allowed"),
    ],
)
def test_strict_adamw_refuses_in_one_line(options, words):
    named = [("w", parameter([[1.0]]))]
    with pytest.raises(ValueError, match=words):
        StrictAdamW(named, {}, 4, **{"lr": 0.1, "generator": generator(), **options})
