"""Which weights are on a grid: those of layers of one's own too; and why the others are not."""

import copy

import pytest
import torch
from layer_cases import numbers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from quant import (
    LayerRule,
    QuantConfig,
    QuantLayer,
    calibrate_activations,
    fake_quantize,
    fit_scale,
    load_state,
    prepare,
    quantizable_weights,
    quantize_model,
    register_layer,
    unsupported_layers,
    weight_scales,
)

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


def attention_with_own_forward():
    model = nn.ModuleList([nn.MultiheadAttention(4, 1)])
    model[0].forward = lambda *inputs: inputs
    return model


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
            attention_with_own_forward,
            [
                "0 (MultiheadAttention): in_proj_weight stays float32: the layer was given a "
                "forward pass of its own",
                "0.out_proj (NonDynamicallyQuantizableLinear): weight stays float32: it is part of "
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
