"""Weights that several layers hold, rows that take no part, and what attention computes with."""

import copy

import pytest
import torch
from layer_cases import TOKENS, Tied, numbers
from torch import nn
from torch.nn import functional as F

from quant import (
    QuantConfig,
    StrictAdamW,
    StrictSGD,
    calibrated_rounding,
    dequantize,
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
    set_scales,
    spec_of,
    tensors_of,
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


@pytest.mark.parametrize("kind", [Tied, HeadFirst])
def test_calibrated_rounding_rounds_for_inputs_what_it_can_and_all_else_to_nearest(kind):
    torch.manual_seed(0)
    model = prepare(kind(), QuantConfig(3))
    shared = "embed.weight" if kind is Tied else "head.weight"
    before = {n: held.parameter.detach().clone() for n, held in layers_by_weight(model)}
    scales, tokens = weight_scales(model), torch.arange(9)
    rounded = calibrated_rounding(model, lambda m: m(tokens))
    assert rounded.keys() == scales.keys()
    # It has no inputs in the embedding, and those of the head would not be right for both.
    nearest = quantize_nearest(before[shared], scales[shared], 3)
    assert torch.equal(rounded[shared].codes, nearest)
    x = dequantize(nearest, scales[shared])
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


def test_attention_of_which_the_last_projection_alone_is_quantized():
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Own(4, 12)])
    model[1].weight = model[0].in_proj_weight
    assert quantizable_weights(model) == ["0.out_proj.weight"]
    x, expected = [numbers(3, 2, 4)] * 3, copy.deepcopy(model)
    load_state(expected, quantize_model(expected, 2).dequantize())
    prepare(model, QuantConfig(2))
    assert torch.equal(model[0](*x)[0], expected[0](*x)[0])
    assert not torch.equal(model[0].out_proj.weight, expected[0].out_proj.weight)


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
