import pytest
import torch
from torch import nn

from core.errors import SettingsError
from quant import Scaled, check_integer, federated_state, quantizable_weights
from task.models import build_model


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def alphas(model):
    return [module.alpha for module in model.modules() if isinstance(module, Scaled)]


def test_parameters_are_those_counted_by_hand():
    # 3x3 convolutions of 16-16-32-32-96-96 channels; 16 pixels a side become 2; 192 and 10.
    convolutions = 9 * (3 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 96 + 96 * 96)
    expected = convolutions + 96 * 4 * 192 + 192 * 10
    for name in ("vgg7", "vgg7-nobn", "vgg7-x1"):
        assert parameters(build_model(name, 3, 16, 10, 0)) == expected


@pytest.mark.parametrize(("name", "wide"), [("vgg7-x2", 32), ("vgg7-nobn-x0.5", 8)])
def test_a_factor_is_on_every_layer_but_the_last(name, wide):
    model = build_model(name, 1, 28, 7, 0)
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    channels = [wide, wide, 2 * wide, 2 * wide, 6 * wide, 6 * wide]
    before = [1, *channels[:-1]]
    assert shapes[:6] == [(n, m, 3, 3) for n, m in zip(channels, before, strict=True)]
    # 28, 14, 7 and 3 pixels.
    assert shapes[6:] == [(12 * wide, 6 * wide * 9), (7, 12 * wide)]


def test_every_weight_is_quantized_and_only_statistics_are_not():
    model = build_model("vgg7", 3, 16, 10, 0)
    check_integer(model)
    on_grid = set(quantizable_weights(model))
    assert on_grid == {name for name, _ in model.named_parameters()}
    rest = federated_state(model).keys() - on_grid
    assert len(rest) == 14
    assert all(name.endswith(("running_mean", "running_var")) for name in rest)
    assert not list(build_model("vgg7-nobn", 3, 16, 10, 0).buffers())


def test_scales_are_those_of_the_paper_without_batchnorm():
    # 2**round(log2(0.75 / sqrt(6 / n_in))) of 27, 144, 144, 288, 288, 864, 384 and 192 inputs:
    # log2 is 0.67, 1.88, 1.88, 2.38, 2.38, 3.17, 2.58 and 2.08.
    assert alphas(build_model("vgg7-nobn", 3, 16, 10, 0)) == [2, 4, 4, 4, 4, 8, 8, 4]
    assert alphas(build_model("vgg7", 3, 16, 10, 0)) == [1] * 7 + [4]


def test_initial_weights_fill_their_range():
    for weight in build_model("vgg7", 3, 16, 10, 0).parameters():
        assert 0.7 < weight.abs().max() <= 0.75
        assert weight.mean().abs() < 0.05


def test_batchnorm_leaves_a_deviation_of_two_fifths_and_little_is_clipped():
    model = build_model("vgg7", 3, 16, 10, 0).train()
    seen = []
    for module in model.modules():
        if type(module).__name__ == "IntegerActivation":
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 7
    for a in seen:
        assert a.std() == pytest.approx(0.4, abs=0.01)
        assert a.mean() == pytest.approx(0, abs=0.01)


def test_the_input_is_halved_and_pooled_three_times():
    model = build_model("vgg7-nobn", 1, 8, 10, 0)
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    first = []
    model.input.register_forward_hook(lambda _, args, y: first.append(y))
    x = torch.full((2, 1, 8, 8), -2.0)
    model(x)
    assert torch.equal(first[0], x / 2)
    assert sizes == [8, 4, 4, 2, 2, 1]


@pytest.mark.parametrize("name", ["vgg7-x0", "vgg7-x65", "vgg7-", "vgg7x2", "vgg7-bn", "vgg7-x-1"])
def test_an_unknown_variant_is_refused_with_what_is_allowed(name):
    with pytest.raises(SettingsError, match=f"model: '{name}'; allowed: vgg7 or vgg7-nobn"):
        build_model(name, 3, 16, 10, 0)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(SettingsError, match="4 pixels a side are too few; set image-size to 8"):
        build_model("vgg7", 1, 4, 10, 0)
