"""What may not be lost without a word: non-finite values, and which weights have a grid."""

import io

import pytest
import torch
from specs import to_bits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from quant import (
    NonFiniteError,
    QuantConfig,
    ScaleError,
    StrictSGD,
    UpdateSpec,
    calibrate_activations,
    calibrated_rounding,
    decode,
    encode,
    fake_quantize,
    fit_scale,
    load_state,
    prepare,
    quantizable_weights,
    quantize_difference,
    quantize_model,
    quantize_nearest,
    quantize_state,
    quantize_stochastic,
    quantized_layers,
    refit_scales,
    set_scales,
    spec_of,
    weight_scales,
)
from quant.qat.activations import fit_activation_grid, put_on_grid
from quant.qat.rounding import round_to_moments

NON_FINITE = pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
ONE = torch.ones(1)


@NON_FINITE
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_rounding_refuses_what_is_not_finite(bad, bits):
    w, generator = torch.tensor([[bad, 1.0]]), torch.Generator().manual_seed(0)
    with pytest.raises(NonFiniteError, match="w: the weight is not finite: 1 of 2 values, as"):
        quantize_state({"w": w}, bits, {"w": ONE})
    with pytest.raises(NonFiniteError, match="w: the weight is not finite"):
        quantize_difference({"w": w}, bits, generator, ["w"])
    for refused in (
        lambda: quantize_nearest(w, ONE, bits),
        lambda: quantize_stochastic(w, ONE, bits, generator),
        lambda: quantize_nearest(torch.ones(1, 2), torch.tensor([bad]), bits),
        lambda: fit_scale(w, bits),
        lambda: fit_activation_grid(w, bits),
    ):
        with pytest.raises(NonFiniteError):
            refused()
    # Within a network they come out as what they are, and end up in the loss.
    assert fake_quantize(w, ONE, bits).isnan().all()
    grid = fit_activation_grid(torch.ones(3), bits)
    assert put_on_grid(w, grid).isnan().all()


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (0.0, "a scale is 0; allowed are positive numbers"),
        (-1.0, "a scale is -1; allowed are positive numbers"),
        (1e-45, "the inverse of the scale is not finite"),
    ],
)
def test_a_scale_that_cannot_be_divided_by_is_refused(scale, reason):
    w, tiny = torch.ones(1, 2), torch.tensor([scale])
    for refused in (
        lambda: quantize_nearest(w, tiny, 8),
        lambda: quantize_stochastic(w, tiny, 8, torch.Generator()),
        lambda: round_to_moments(w, tiny, 8, torch.eye(2)[None]),
    ):
        with pytest.raises((NonFiniteError, ScaleError), match=reason):
            refused()


@NON_FINITE
def test_calibrated_rounding_refuses_scales_and_moments_too(bad):
    w = torch.ones(1, 2)
    with pytest.raises(NonFiniteError, match="the scale is not finite"):
        round_to_moments(w, torch.tensor([bad]), 4, torch.eye(2)[None])
    with pytest.raises(NonFiniteError, match="the second moments of the inputs is not finite"):
        round_to_moments(w, ONE, 4, torch.full((1, 2, 2), bad))
    model = prepare(nn.Linear(2, 1), QuantConfig(4))
    with pytest.raises(NonFiniteError, match=r"^weight: the second moments"):
        calibrated_rounding(model, lambda m: m(torch.full((1, 2), 1e30)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ordinary_values_of_half_precision_are_no_nan(dtype):
    """As under autocast; their sum overflows in float16."""
    x = torch.full((2, 50_000), 2.0, dtype=dtype)
    assert put_on_grid(x, fit_activation_grid(torch.full((3,), 2.0), 8)).eq(2).all()
    assert put_on_grid(x * float("nan"), fit_activation_grid(x.float(), 8)).isnan().all()


def test_statistics_that_are_not_finite_are_no_constants():
    norm = nn.BatchNorm1d(2)
    norm.running_var[0] = float("nan")
    assert "0.running_var" in spec_of(nn.Sequential(norm)).shapes
    with pytest.raises(ValueError, match="an update must be finite"):
        encode(quantize_model(nn.Sequential(norm), 8))


def test_large_finite_values_are_rounded_though_their_sum_overflows():
    w = torch.full((1, 4), 3e38)
    assert quantize_nearest(w, torch.tensor([3e38]), 4).tolist() == [[1, 1, 1, 1]]


@NON_FINITE
def test_a_strict_step_refuses_a_gradient_by_name(bad):
    model = prepare(nn.Sequential(nn.Linear(2, 1)), QuantConfig(4))
    generator = torch.Generator().manual_seed(0)
    named, scales = model.named_parameters(), weight_scales(model)
    optimizer = StrictSGD(named, scales, 4, generator=generator, lr=0.1)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.tensor([[bad, 1.0]])
    with pytest.raises(NonFiniteError, match=r"0\.weight: the gradient is not finite"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_strict_step_refuses_what_is_not_finite_off_the_grid_too():
    model = prepare(nn.Sequential(nn.Linear(2, 1)), QuantConfig(4))
    named, generator = model.named_parameters(), torch.Generator().manual_seed(0)
    optimizer = StrictSGD(named, weight_scales(model), 4, generator=generator, lr=1e30)
    before = model[0].bias.detach().clone()
    model[0].bias.grad = torch.tensor([float("nan")])
    with pytest.raises(NonFiniteError, match=r"0\.bias: the gradient is not finite"):
        optimizer.step()
    assert torch.equal(model[0].bias, before)
    model[0].bias.grad = torch.tensor([1e30])
    with pytest.raises(NonFiniteError, match=r"0\.bias: the parameter is not finite"):
        optimizer.step()


def test_calibration_names_the_layer_that_is_reached_by_nan():
    model = prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), QuantConfig(4, 4))
    x = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(NonFiniteError, match=r"^0: the input is not finite"):
        calibrate_activations(model, lambda m: m(x))
    with pytest.raises(NonFiniteError, match=r"^0\.weight: the input of its layer"):
        calibrated_rounding(model, lambda m: m(x))


class Everything(nn.Module):
    """One of each: what has a grid, what has none, and what is no weight at all."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.conv1d = nn.Conv1d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.conv = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)
        self.register_buffer("table", torch.full((3, 4), 0.3))
        self.register_buffer("mask", torch.tensor([[0.0, float("-inf")]]))
        self.register_buffer("seen", torch.tensor(0))

    def get_extra_state(self):
        return {"not": "a tensor"}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        x, _ = self.lstm(self.embed(x) + self.table[0])
        x = self.conv1d(x.mT)[..., None]
        return self.head(self.conv(self.up(x)).mean(dim=(2, 3)))


def test_only_layers_that_are_prepared_have_codes_and_all_else_arrives_as_it_is():
    torch.manual_seed(0)
    model, tokens = Everything(), torch.arange(8).reshape(2, 4)
    spec = spec_of(model)
    recurrent = {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    others = {f"{name}.weight" for name in ("embed", "conv1d", "up", "conv", "head")}
    assert spec.on_grid == recurrent | others
    assert {"mask", "seen", "_extra_state"}.isdisjoint(spec.shapes)
    prepare(model, QuantConfig(3))
    update = quantize_state(
        {n: t for n, t in model.state_dict().items() if n in spec.shapes}, 3, weight_scales(model)
    )
    assert update.quantized.keys() == spec.on_grid
    assert update.floats.keys() == spec.shapes.keys() - spec.on_grid
    received = prepare(Everything(), QuantConfig(3))
    load_state(received, decode(encode(update), spec, 3).dequantize())
    set_scales(received, update.scales)
    assert torch.equal(received.eval()(tokens), model.eval()(tokens))


def test_a_subclass_and_a_weight_that_one_holds_too_stay_float32():
    class Own(nn.Linear):
        pass

    tied = nn.Sequential(nn.Embedding(3, 2), Own(2, 3), nn.Linear(3, 3), Own(1, 1))
    tied[1].weight = tied[0].weight
    assert quantizable_weights(tied) == ["2.weight"]
    prepare(tied, QuantConfig(4))
    assert [name for name, _ in quantized_layers(tied)] == ["2"]
    assert quantize_model(tied, 4).quantized.keys() == {"2.weight"}


def test_a_forward_of_its_own_and_memory_that_is_shared_stay_float32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    usual = model[0].forward
    model[0].forward = lambda x: usual(x) * 2
    # Two parameters, whose scales would lie along either dimension of one memory.
    model[2].weight = nn.Parameter(model[1].weight.detach().t())
    x, expected = torch.rand(3, 2), None
    assert quantizable_weights(model) == ["3.weight"]
    with torch.no_grad():
        expected = model[:3](x)
        assert torch.equal(prepare(model, QuantConfig(2))[:3](x), expected)
    on_meta = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("meta")
    assert quantizable_weights(on_meta) == ["0.weight", "1.weight"]


def test_scales_that_no_layer_can_have_are_refused_by_name():
    model = prepare(nn.Sequential(nn.Linear(2, 3)), QuantConfig(4))
    before = model[0].weight_scale
    for scales, said in (
        ({"_orig_mod.0.weight": torch.ones(3)}, "_orig_mod.0.weight: there is no layer"),
        (
            {"0.weight": torch.ones(2)},
            r"0.weight: a scale of shape \[2\]; allowed: ",
        ),
        ({"0.weight": torch.zeros(3)}, "a number above 0 for each of 3 channels"),
        ({"0.weight": torch.full((3,), float("inf"))}, "0.weight: the scale is not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            set_scales(model, scales)
    assert torch.equal(model[0].weight_scale, before)
    set_scales(model, {"0.weight": torch.ones(3, dtype=torch.float64)})
    assert model(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("change", ["tie", "parametrize", "forward"])
def test_a_prepared_weight_that_lost_its_grid_is_named(change):
    model = prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), QuantConfig(4))
    if change == "tie":
        model[1].weight = model[0].weight
    elif change == "parametrize":
        parametrizations.weight_norm(model[0])
    else:
        model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"0\.weight: its layer was prepared, and its weight tied"):
        weight_scales(model)


def test_what_is_to_be_quantized_must_be_there_and_scales_must_be_given():
    with pytest.raises(ValueError, match="x is to be quantized, but there is no such tensor"):
        quantize_state({"w": torch.ones(2, 2)}, 4, {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="x is to be quantized, but is one number"):
        UpdateSpec({"x": ()}, {"x"})
    with pytest.raises(ValueError, match="scales is None; at 4 bits"):
        quantize_state({"w": torch.ones(2, 2)}, 4)
    assert quantize_state({"w": torch.ones(2, 2)}, 4, {}).floats.keys() == {"w"}


def test_a_transformer_computes_with_its_quantized_weights_in_evaluation_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1
    )
    x = torch.randn(2, 3, 8)
    prepare(encoder, QuantConfig(2))
    layer = encoder.layers[0]
    with torch.no_grad():
        y = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        weights = [
            fake_quantize(m.weight, m.weight_scale, 2) for m in (layer.linear1, layer.linear2)
        ]
        hidden = F.relu(F.linear(y, weights[0], layer.linear1.bias))
        expected = layer.norm2(y + F.linear(hidden, weights[1], layer.linear2.bias))
        assert torch.allclose(encoder.eval()(x), expected, atol=1e-5)
        padding = torch.tensor([[False, False, True], [False, False, False]])
        padded = encoder(x, src_key_padding_mask=padding)
        assert torch.allclose(padded[1], expected[1], atol=1e-5)


def test_a_second_prepare_takes_effect():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.rand(5, 4)
    prepare(model, QuantConfig(8, 8))
    calibrate_activations(model, lambda m: m(x))
    again = prepare(nn.Sequential(nn.Linear(4, 3)), QuantConfig(2, 4))
    prepare(model, QuantConfig(2, 4))
    load_state(again, model.state_dict())
    assert torch.equal(model(x), again(x))
    assert model[0].input_grid is None
    # Loaded weights make other activations, which the grid would clip.
    calibrate_activations(model, lambda m: m(x))
    load_state(model, {n: 100 * t for n, t in model.state_dict().items()})
    assert model[0].input_grid is None


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)]
)
def test_another_type_is_refused_before_and_after_prepare(convert):
    with pytest.raises(TypeError, match=r"computes in torch\.float32"):
        convert(prepare(nn.Linear(2, 2), QuantConfig(4)))
    with pytest.raises(ValueError, match=r"0\.weight: .* cannot be torch\."):
        prepare(convert(nn.Sequential(nn.Linear(2, 2))), QuantConfig(4))
    prepare(nn.Linear(2, 2), QuantConfig(4)).to("cpu").float()


def test_weights_that_are_loaded_have_a_scale_that_fits_them():
    model = prepare(nn.Linear(4, 3), QuantConfig(8))
    larger = {"weight": torch.randn(3, 4) * 100, "bias": torch.zeros(3)}
    model.load_state_dict(larger)
    assert torch.equal(model.weight_scale, fit_scale(larger["weight"], 8))
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)


@pytest.mark.parametrize("change", ["assign", "reset", "init"])
def test_other_weights_have_a_scale_that_fits_them(change):
    model = prepare(nn.Sequential(nn.Linear(2, 2)), QuantConfig(8, 8))
    calibrate_activations(model, lambda m: m(torch.rand(3, 2)))
    set_scales(model, {"0.weight": torch.full((2,), 1e-4)})
    if change == "assign":
        model[0].weight = nn.Parameter(torch.tensor([[5.0, 1.0], [0.5, 2.0]]))
    elif change == "reset":
        model[0].reset_parameters()
    else:  # As a step of an optimizer, which keeps the grid; `prepare` says what to call.
        nn.init.constant_(model[0].weight, 3.0)
        refit_scales(model)
    assert torch.equal(model[0].weight_scale, fit_scale(model[0].weight, 8))
    assert (model[0].input_grid is None) == (change != "init")
    assert torch.allclose(model[0].quantized_weight(), model[0].weight, atol=0.02)


def test_a_new_weight_of_another_type_is_refused():
    model = prepare(nn.Linear(2, 2), QuantConfig(8))
    before = model.weight
    with pytest.raises(TypeError, match=r"its weight cannot be torch\.float64"):
        model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    assert model.weight is before


def test_a_prepared_model_is_quantized_on_the_grid_that_it_computes_on():
    model = prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), QuantConfig(4))
    set_scales(model, {"0.weight": torch.tensor([0.5, 0.25])})
    update = quantize_model(model, 4)
    assert update.scales["0.weight"].tolist() == [0.5, 0.25]
    assert torch.equal(update.dequantize()["0.weight"], model[0].quantized_weight())
    assert torch.equal(update.scales["1.weight"], fit_scale(model[1].weight, 4))
    # At another width there is no such grid.
    assert torch.equal(quantize_model(model, 8).scales["0.weight"], fit_scale(model[0].weight, 8))
    assert not quantize_model(model, 32).quantized


def test_layers_take_their_input_by_keyword():
    class ByKeyword(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](input=x))

    model = ByKeyword(nn.Conv2d(1, 2, 1), nn.Linear(3, 2))
    x, expected = torch.rand(2, 1, 3, 3), None
    expected = nn.Sequential(*model)(x)
    assert torch.equal(model(x), expected)
    prepare(model, QuantConfig(8, 8))
    calibrate_activations(model, lambda m: m(x))
    assert all(layer.input_grid for layer in model)
    assert calibrated_rounding(model, lambda m: m(x)).keys() == {"0.weight", "1.weight"}


def test_toy_states_of_tests_are_those_of_layers():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    one, other = to_bits(model.state_dict(), 4), quantize_model(model, 4)
    assert encode(one) == encode(other)
