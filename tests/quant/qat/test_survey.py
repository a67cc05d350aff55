"""Which weights are on a grid: shared ones, layers of one's own, and why the others are not."""

import copy

import pytest
import torch
from layer_cases import TOKENS, Tied, numbers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from quant import (
    LayerRule,
    QuantConfig,
    QuantLayer,
    StrictAdamW,
    StrictSGD,
    calibrate_activations,
    calibrated_rounding,
    dequantize,
    fake_quantize,
    federated_state,
    fit_scale,
    layers_by_weight,
    load_state,
    prepare,
    quantizable_weights,
    quantize_model,
    quantize_nearest,
    quantized_layers,
    refit_scales,
    register_layer,
    set_scales,
    spec_of,
    tensors_of,
    unsupported_layers,
    weight_scales,
)
from quant.qat.rounding import round_to_moments


def tied(seed=0):
    torch.manual_seed(seed)
    return Tied()


class HeadFirst(Tied):
    """The same, with the linear layer as the first that has the weight."""

    def __init__(self):
        nn.Module.__init__(self)
        self.head = nn.Linear(4, 9, bias=False)
        self.mix = nn.Linear(4, 4)
        self.embed = nn.Embedding(9, 4)
        self.embed.weight = self.head.weight


# Shared weights -----------------------------------------------------------------------------------


def test_a_shared_weight_has_one_name_one_scale_and_one_grid():
    model = tied()
    assert {"embed.weight", "head.weight"} <= model.state_dict().keys()
    names = ["embed.weight", "mix.weight", "mix.bias"]
    assert list(federated_state(model)) == list(tensors_of(model, names)) == names
    assert quantizable_weights(model) == names[:2]
    assert spec_of(model).shapes.keys() == set(names)
    prepare(model, QuantConfig(4))
    assert [name for name, _ in quantized_layers(model)] == ["embed", "mix", "head"]
    assert [name for name, _ in layers_by_weight(model)] == list(weight_scales(model)) == names[:2]
    update = quantize_model(model, 4)
    assert update.spec.shapes.keys() == set(names)
    values = update.quantized["embed.weight"].dequantize()
    for layer in (model.embed, model.head):
        assert torch.equal(layer.quantized_weight(), values)
        assert layer.scale() is model.embed.weight_scale


@pytest.mark.parametrize("kind", [Tied, HeadFirst])
def test_whatever_gives_a_shared_weight_new_values_or_scales_does_it_in_both_layers(kind):
    torch.manual_seed(0)
    model, other = kind(), kind()
    first = "embed.weight" if kind is Tied else "head.weight"
    prepare(model, QuantConfig(8))

    def fits(scale):
        held = [model.embed.scale(), model.head.scale(), weight_scales(model)[first]]
        return all(torch.equal(one, scale) for one in held)

    set_scales(model, {first: torch.full((9,), 0.5)})
    assert fits(torch.full((9,), 0.5))
    refit_scales(model)
    assert fits(fit_scale(model.embed.weight, 8))
    # By one name, as it is sent, and by both, as torch saves it.
    load_state(model, federated_state(other))
    assert torch.equal(model.head.weight, other.head.weight)
    assert model.head.weight is model.embed.weight
    assert fits(fit_scale(other.head.weight, 8))
    model.load_state_dict({n: 3 * t for n, t in other.state_dict().items()})
    assert fits(fit_scale(3 * other.head.weight, 8))
    model.head.reset_parameters()
    assert fits(fit_scale(model.embed.weight, 8))
    copied = copy.deepcopy(model)
    set_scales(copied, {first: torch.ones(9)})
    assert copied.head.scale().tolist() == copied.embed.scale().tolist() == [1] * 9
    assert fits(fit_scale(model.embed.weight, 8))


def test_both_uses_of_a_shared_weight_count_for_its_gradient():
    model = prepare(tied(), QuantConfig(6))
    weight = model.embed.quantized_weight().detach().requires_grad_()
    hidden = F.embedding(TOKENS, weight, 0) @ model.mix.quantized_weight().T + model.mix.bias
    (hidden.relu() @ weight.T).square().sum().backward()
    model(TOKENS).square().sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, weight.grad)
    assert model.head.weight.grad is model.embed.weight.grad


def test_a_weight_that_was_shared_after_or_is_no_longer_is_named():
    model = prepare(tied(), QuantConfig(4))
    model.head.weight = nn.Parameter(torch.ones(9, 4))
    assert torch.equal(model.head.scale(), fit_scale(torch.ones(9, 4), 4))
    assert list(weight_scales(model)) == ["embed.weight", "mix.weight", "head.weight"]
    model = prepare(tied(), QuantConfig(4))
    model.embed.weight = nn.Parameter(torch.ones(9, 4))
    with pytest.raises(ValueError, match=r"its weight tied, parametrized or given another"):
        weight_scales(model)
    assert list(weight_scales(prepare(model, QuantConfig(3)))) == [
        "embed.weight",
        "mix.weight",
        "head.weight",
    ]
    # The part of a model in which a weight is that of a layer outside.
    model = tied()
    prepare(model.embed, QuantConfig(4))
    with pytest.raises(ValueError, match=r"^embed\.weight: its layer was prepared, and its weight"):
        weight_scales(model)


def test_a_layer_under_two_names_is_one_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model.append(model[0])
    assert quantizable_weights(model) == ["0.weight", "2.weight"]
    assert list(federated_state(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    other = copy.deepcopy(model)
    nn.init.ones_(other[0].weight)
    load_state(model, federated_state(other))
    assert torch.equal(model[3].weight, torch.ones(3, 3))


def test_one_layer_may_hold_a_weight_twice():
    attention = nn.MultiheadAttention(4, 2, kdim=4, vdim=3)
    attention.k_proj_weight = attention.q_proj_weight
    names = ["q_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert quantizable_weights(attention) == names
    x = (numbers(3, 2, 4), numbers(5, 2, 4), numbers(5, 2, 3))
    expected = copy.deepcopy(attention)
    load_state(expected, quantize_model(expected, 3).dequantize())
    prepare(attention, QuantConfig(3))
    assert torch.equal(attention(*x)[0], expected(*x)[0])


def test_calibrated_rounding_rounds_for_inputs_what_it_can_and_all_else_to_nearest():
    model = prepare(tied(), QuantConfig(3))
    before = {n: held.parameter.detach().clone() for n, held in layers_by_weight(model)}
    scales, tokens = weight_scales(model), torch.arange(9)
    rounded = calibrated_rounding(model, lambda m: m(tokens))
    assert rounded.keys() == scales.keys()
    # It has no inputs in the embedding, and those of the head would not be right for both.
    nearest = quantize_nearest(before["embed.weight"], scales["embed.weight"], 3)
    assert torch.equal(rounded["embed.weight"].codes, nearest)
    x = dequantize(nearest, scales["embed.weight"])
    codes = round_to_moments(before["mix.weight"], scales["mix.weight"], 3, (x.mT @ x)[None])
    assert torch.equal(rounded["mix.weight"].codes, codes)
    for name, tensor in rounded.items():
        assert torch.equal(model.get_parameter(name), tensor.dequantize())


def test_calibrated_rounding_takes_all_of_attention():
    model = prepare(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), QuantConfig(3))
    rounded = calibrated_rounding(model, lambda m: m(numbers(2, 5, 4)))
    assert rounded.keys() == set(quantizable_weights(model))
    assert torch.equal(
        model.self_attn.out_proj.weight, rounded["self_attn.out_proj.weight"].dequantize()
    )


# Embeddings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StrictSGD, StrictAdamW])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_rows_that_no_index_looks_up_stay_as_they_are(kind, bits):
    """The quotient of a level by its scale is off by a last bit in one of nine cases."""
    torch.manual_seed(0)
    model = prepare(nn.Embedding(400, 50, padding_idx=3), QuantConfig(bits, gradient_bits=8))
    scales, noise = weight_scales(model), torch.Generator().manual_seed(0)
    optimizer = kind(model.named_parameters(), scales, bits, generator=noise, lr=0.5)
    start, touched = model.weight.detach().clone(), torch.tensor([1, 399])
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.tensor([1, 3, 399])).square().sum().backward()
        optimizer.step()
    untouched = torch.ones(400, dtype=torch.bool)
    untouched[touched] = False
    assert torch.equal(model.weight[untouched], start[untouched])
    assert not model.weight[3].any()
    assert (model.weight[touched] != start[touched]).any(dim=1).all()


def test_untouched_rows_of_latent_weights_stay_as_they_are():
    model = prepare(nn.Embedding(9, 4), QuantConfig(3))
    start = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    model(torch.tensor([2, 5])).square().sum().backward()
    optimizer.step()
    assert (model.weight != start).any(dim=1).tolist() == [i in (2, 5) for i in range(9)]


# Attention ----------------------------------------------------------------------------------------


def test_torchs_fused_attention_gets_the_weights_on_their_grids(monkeypatch):
    seen = []

    def fused(*args):
        seen.append(args)
        return args[0], None

    monkeypatch.setattr(torch, "_native_multi_head_attention", fused)
    attention = prepare(nn.MultiheadAttention(4, 2, batch_first=True), QuantConfig(2)).eval()
    with torch.no_grad():
        attention(*[numbers(2, 5, 4)] * 3)
    ((*_, in_weight, _, out_weight, _, _, _, _, _),) = seen
    assert torch.equal(in_weight, attention.quantized_weight("in_proj_weight"))
    assert torch.equal(out_weight, attention.out_proj.quantized_weight())
    assert not torch.equal(in_weight, attention.in_proj_weight)


# Layers of one's own ------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two weights, of which one is no Linear's; a bias and a gain."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(numbers(4, 3))
        self.table = nn.Parameter(numbers(3, 4, 2))
        self.gain = nn.Parameter(torch.ones(3))
        self.inner = nn.Linear(3, 2)

    def forward(self, x, factor=1.0):
        y = F.linear(x, self.kernel.T, self.gain) * factor
        return {"y": self.inner(y), "more": [y @ self.table.sum(2)]}


@pytest.fixture
def _mixed(monkeypatch):
    monkeypatch.setattr("quant.qat.rules._RULES", dict(_registry()))
    register_layer(Mixed, LayerRule(["kernel", "table"]))


def _registry():
    from quant.qat import rules

    return rules._RULES


@pytest.mark.usefixtures("_mixed")
def test_a_registered_layer_is_quantized_by_the_names_of_its_weights():
    model, x = nn.Sequential(Mixed()), numbers(5, 4)
    expected = copy.deepcopy(model)
    load_state(expected, quantize_model(model, 3).dequantize())
    names = ["0.kernel", "0.table", "0.inner.weight"]
    assert quantizable_weights(model) == names
    assert unsupported_layers(model) == []
    prepare(model, QuantConfig(3))
    assert list(weight_scales(model)) == names
    assert model[0].kernel_scale.shape == (4,)
    own, want = model(x), expected(x)
    assert torch.equal(own["y"], want["y"])
    assert torch.equal(own["more"][0], want["more"][0])
    again = copy.deepcopy(model)[0](x=x, factor=2.0)
    assert torch.equal(again["y"], expected[0](x, 2.0)["y"])
    calibrate_activations(prepare(model, QuantConfig(3, 4)), lambda m: m[0](x=x))
    assert model[0].input_grid is not None


@pytest.mark.usefixtures("_mixed")
def test_a_registered_layer_may_compute_in_its_own_way():
    class QuantMixed(QuantLayer, Mixed):
        def forward(self, x):
            return self.quantized_input(x) @ self.quantized_weight("kernel")

    register_layer(Mixed, LayerRule(lambda layer: ["kernel"], layer=QuantMixed))
    model, x = Mixed(), numbers(5, 4)
    assert unsupported_layers(model) == [
        "the model (Mixed): table stays float32: the rule of its layer does not name it"
    ]
    prepare(model, QuantConfig(3))
    assert type(model) is QuantMixed
    assert torch.equal(model(x), x @ fake_quantize(model.kernel, fit_scale(model.kernel, 3), 3))


@pytest.mark.parametrize(
    ("kind", "rule", "words"),
    [
        (3, LayerRule(["w"]), "kind: 3 is not allowed: it should be a type of nn.Module"),
        (Mixed, ["w"], r"rule: \['w'\] is not allowed: it should be a LayerRule"),
        (Mixed, LayerRule(["w"], nn.Linear), "rule: Linear is not allowed as its layer"),
        (QuantLayer, LayerRule(["w"]), "kind: QuantLayer is quantization-aware"),
    ],
)
def test_what_is_no_rule_is_refused(kind, rule, words):
    before = dict(_registry())
    with pytest.raises(ValueError, match=words):
        register_layer(kind, rule)
    assert _registry() == before


def test_weights_are_names():
    with pytest.raises(ValueError, match="weights: 'kernel' is not allowed"):
        LayerRule("kernel")


# What stays float32 -------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    pass


class OwnAttention(nn.MultiheadAttention):
    pass


def own_forward():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


def shared_with_own():
    model = nn.ModuleList([nn.Linear(2, 2), OwnLinear(2, 2)])
    model[0].weight = model[1].weight
    return model


def in_one_memory():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[0].weight = nn.Parameter(model[1].weight.detach().T)
    return model


def positions():
    model = nn.Module()
    model.position = nn.Parameter(torch.zeros(1, 4, 2))
    return model


SUBCLASS = "OwnLinear is a subclass of Linear, whose forward pass may be another"
REGISTER = "(quant.register_layer)"
MEMORY = "weight stays float32: another parameter lies in its memory"


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (
            lambda: OwnLinear(2, 2),
            [f"the model (OwnLinear): weight stays float32: {SUBCLASS} {REGISTER}"],
        ),
        (
            lambda: nn.Sequential(own_forward()),
            ["0 (Linear): weight stays float32: the layer was given a forward pass of its own"],
        ),
        (
            shared_with_own,
            [
                "0 (Linear): weight stays float32: it is 1.weight too, where it stays float32: "
                f"{SUBCLASS} {REGISTER}",
                f"1 (OwnLinear): weight stays float32: {SUBCLASS} {REGISTER}",
            ],
        ),
        (in_one_memory, [f"0 (Linear): {MEMORY}", f"1 (Linear): {MEMORY}"]),
        (
            lambda: nn.Sequential(
                nn.Embedding(3, 2, max_norm=1.0), nn.EmbeddingBag(3, 2, sparse=True)
            ),
            [
                "0 (Embedding): weight stays float32: max_norm changes it in the forward pass",
                "1 (EmbeddingBag): weight stays float32: its gradient is sparse",
            ],
        ),
        (
            lambda: OwnAttention(4, 1),
            [
                "the model (OwnAttention): in_proj_weight stays float32: OwnAttention is a "
                f"subclass of MultiheadAttention, whose forward pass may be another {REGISTER}",
                "out_proj (NonDynamicallyQuantizableLinear): weight stays float32: it is part of "
                "no MultiheadAttention that has a rule",
            ],
        ),
        (
            positions,
            [f"the model (Module): position stays float32: Module has no rule {REGISTER}"],
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            [
                "0 (LazyLinear): weight stays float32: LazyLinear is a subclass of Linear, whose "
                f"forward pass may be another {REGISTER}"
            ],
        ),
        (lambda: nn.Sequential(nn.LayerNorm((2, 2)), nn.BatchNorm1d(3), nn.PReLU(3)), []),
        (lambda: nn.MultiheadAttention(4, 1, add_bias_kv=True), []),
    ],
)
def test_every_layer_that_stays_float32_is_named_with_the_reason(make, lines):
    model = make()
    assert unsupported_layers(model) == lines
    named = {line.split(" ")[0] for line in lines}
    for name, parameter in model.named_parameters():
        if parameter.__class__ is nn.Parameter and parameter.ndim > 1 and "bias_" not in name:
            layer = name.rpartition(".")[0] or "the"
            on_grid = name in quantizable_weights(model)
            assert on_grid != (layer in named or "LayerNorm" in str(model))


def test_a_parametrized_weight_is_named():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 2))
    assert quantizable_weights(model) == ["1.weight"]
    assert unsupported_layers(model) == [
        "0.parametrizations.weight (ParametrizationList): original0, original1 stay float32: "
        "a parametrization computes with it"
    ]


def test_a_weight_without_values_is_refused_by_name_and_nothing_changes():
    model = nn.Sequential(nn.GRU(2, 2), nn.Embedding(0, 3))
    kinds = [type(m) for m in model]
    with pytest.raises(ValueError, match=r"1\.weight has no values: its shape is \[0, 3\]"):
        prepare(model, QuantConfig(4))
    assert [type(m) for m in model] == kinds
