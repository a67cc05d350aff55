import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import SettingsError
from core.settings import Settings
from quant import federated_state, load_state
from task.data.dataset import Pixels
from task.model_checks import check_repeatable
from task.models import MODELS, build_model
from task.trial import check_at_width


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def block(wide_in, wide):
    """Two 3x3 convolutions, two BatchNorms; where the width changes, a 1x1 one with BatchNorm."""
    shortcut = wide_in * wide + 2 * wide if wide_in != wide else 0
    return 9 * wide_in * wide + 9 * wide * wide + 4 * wide + shortcut


def residual_network(blocks, channels, classes):
    total = 9 * channels * 16 + 2 * 16
    total += blocks * block(16, 16)
    total += block(16, 32) + (blocks - 1) * block(32, 32)
    total += block(32, 64) + (blocks - 1) * block(64, 64)
    return total + 64 * classes + classes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3)])
def test_residual_networks_have_the_parameters_of_the_formula(name, blocks, channels, classes):
    model = build_model(name, channels, 32, classes, 0)
    assert num_parameters(model) == residual_network(blocks, channels, classes)


def test_residual_networks_have_the_published_sizes():
    # resnet8: 78042, as in MLPerf Tiny. resnet20: 0.27M (He et al., table 6), which is 269722 with
    # parameter-free shortcuts, and two projections with BatchNorm: 16*32 + 64 + 32*64 + 128.
    assert num_parameters(build_model("resnet8", 3, 32, 10, 0)) == 78_042
    assert num_parameters(build_model("resnet20", 3, 32, 10, 0)) == 269_722 + 2_752


@pytest.mark.parametrize("channels", [1, 3])
def test_cnn_has_the_parameters_counted_by_hand(channels):
    convolutions = (9 * channels * 32 + 32) + (9 * 32 * 64 + 64)
    linear = (64 * 4 * 4 * 128 + 128) + (128 * 10 + 10)
    assert num_parameters(build_model("cnn", channels, 28, 10, 0)) == convolutions + linear


@pytest.mark.parametrize("size", [8, 28, 32, 64, 224])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_forward_gives_finite_logits_that_depend_on_the_image(name, channels, size):
    model = build_model(name, channels, size, 7, 0).train()
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_resnet18_takes_either_number_of_channels(channels):
    model = build_model("resnet18", channels, 28, 10, 0)
    assert model(torch.zeros(2, channels, 28, 28)).shape == (2, 10)
    # 11689512 in torchvision's table, with 1000 classes of 512 + 1 and 3 input channels of 64 x 49.
    fewer = 990 * 513 + (3 - channels) * 64 * 49
    assert num_parameters(model) == 11_689_512 - fewer


def message_of(*arguments):
    with pytest.raises(SettingsError) as caught:
        build_model(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "name", ["resnet9", "", "ResNet8", "fasterrcnn_resnet50_fpn", "raft_small", "__init__"]
)
def test_unknown_model_is_refused_with_what_is_allowed(name):
    message = message_of(name, 1, 8, 10, 0)
    allowed = "resnet8, resnet20, cnn, vit, crnn, vgg7, a torchvision"
    assert message.startswith(f"model: {name!r}; allowed: {allowed}")


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121"])
def test_model_that_does_not_fit_the_size_is_refused(name):
    message = message_of(name, 1, 8, 10, 0)
    assert message.startswith(f"model: {name!r} does not take 1x8x8 images (")
    assert "set image-size" in message


@pytest.mark.parametrize("name", [*MODELS, "squeezenet1_1"])
def test_seed_decides_the_weights(name):
    first = build_model(name, 1, 28, 10, 5).state_dict()
    again = build_model(name, 1, 28, 10, 5).state_dict()
    other = build_model(name, 1, 28, 10, 6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if first[key].ndim >= 2]
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["resnet8", "squeezenet1_1"])
def test_global_generator_is_left_as_it_was(name):
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    build_model(name, 1, 28, 10, 5)
    assert torch.equal(torch.rand(4), expected)
    # Nor does it matter where the generator stood.
    here = build_model(name, 1, 28, 10, 5).state_dict()
    torch.manual_seed(12)
    there = build_model(name, 1, 28, 10, 5).state_dict()
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_trying_a_model_leaves_its_statistics_fresh():
    model = build_model("resnet8", 1, 8, 10, 0)
    assert torch.equal(model.bn.running_mean, torch.zeros(16))
    assert torch.equal(model.bn.running_var, torch.ones(16))
    assert int(model.bn.num_batches_tracked) == 0


SMALL_NET = """
import numpy, torch
from torch import nn

def net(channels, size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, num_classes))

def lazy(channels, size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def numpys(channels, size, num_classes):
    model = net(channels, size, num_classes)
    model[1].bias.data.fill_(float(numpy.random.default_rng().normal()))
    return model

KEPT = net(1, 8, 10)
def kept(channels, size, num_classes):
    return KEPT

def wrapped(channels, size, num_classes):
    return nn.Sequential(KEPT)

def other_arguments(channels):
    return KEPT

def failing(channels, size, num_classes):
    raise ValueError("no good\\nat all")

def no_module(channels, size, num_classes):
    return "net"

def another_size(channels, size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(1, num_classes))

def expanded(channels, size, num_classes):
    model = net(channels, size, num_classes)
    model[1].weight = nn.Parameter(torch.rand(1, size * size * channels).expand(num_classes, -1))
    return model

def expanded_buffer(channels, size, num_classes):
    model = net(channels, size, num_classes)
    model.register_buffer("mask", torch.ones(1).expand(3))
    return model

def another_length(channels, size, num_classes):
    return net(channels, size, num_classes + 1)

def one_for_all(channels, size, num_classes):
    return nn.Sequential(net(channels, size, num_classes), Mean())

class Mean(nn.Module):
    def forward(self, x):
        return x.mean(0, keepdim=True)

class Pair(nn.Module):
    def forward(self, x):
        return x, x

def pair(channels, size, num_classes):
    return Pair()

five = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's; returns the notation of a name in it."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SMALL_NET)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda factory: f"{name}:{factory}"
    sys.modules.pop(name, None)


@pytest.mark.parametrize("factory", ["net", "lazy"])
def test_a_factory_of_the_users_own_makes_the_model_under_the_seed(own, factory):
    model = build_model(own(factory), 3, 4, 7, 5)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 7)
    torch.manual_seed(1)
    again, other = (build_model(own(factory), 3, 4, 7, seed) for seed in (5, 6))
    check_repeatable(model, again, own(factory))
    assert not torch.equal(model[1].weight, other[1].weight)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("numpys", "gives other weights under the same seed"),
        ("kept", "returns what it returned before; it must make a new module"),
        ("wrapped", "returns what it returned before; it must make a new module"),
    ],
)
def test_a_factory_that_does_not_repeat_itself_is_refused(own, factory, reason):
    with pytest.raises(SettingsError, match=reason):
        check_repeatable(*(build_model(own(factory), 1, 8, 10, 0) for _ in range(2)), own(factory))


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("missing", "has no 'missing'"),
        ("five", "is a int; allowed: a function of channels, size and num_classes that returns a"),
        ("other_arguments", "fails for channels=1, size=8, num_classes=10: TypeError: other_"),
        ("failing", "fails for channels=1, size=8, num_classes=10: ValueError: no good"),
        ("no_module", "returns a str; it must be a torch.nn.Module"),
        ("another_size", "does not take 1x8x8 images: RuntimeError: mat1 and mat2 shapes cannot"),
        ("another_length", "gives logits [2, 11] for 2 images; it must be [2, 10]"),
        ("one_for_all", "gives logits [1, 10] for 2 images; it must be [2, 10]"),
        ("pair", "gives a tuple, not logits"),
        ("expanded", "1.weight is expanded: values of its share one place in memory"),
        ("expanded_buffer", "mask is expanded: values of its share one place in memory"),
    ],
)
def test_what_a_factory_gets_wrong_is_named(own, factory, reason):
    message = message_of(own(factory), 1, 8, 10, 0)
    assert message.startswith("model: ")
    assert own("")[:-1] in message
    assert reason in message
    # It has no effect on what is wrong in a model of the user's own.
    assert "image-size" not in message


class Masked(nn.Sequential):
    """A constant that is not finite, and a state that is no tensor."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.register_buffer("mask", torch.tensor([[0.0, float("-inf")]]))

    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_not_all_finite_weights_is_repeatable_and_can_be_loaded():
    model, again = Masked(), Masked()
    again.load_state_dict(model.state_dict())
    check_repeatable(model, again, "x")
    load_state(again, {n: t + 1 for n, t in federated_state(model).items()})
    assert torch.equal(again[1].bias, model[1].bias + 1)
    assert torch.equal(again.mask, model.mask)


def test_a_state_dict_keeps_the_versions_that_torchvision_reads():
    model = build_model("mnasnet0_5", 3, 32, 10, 0)
    load_state(model, federated_state(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.half(), r"0\.weight is torch\.float16; allowed: torch\.float32"),
        (lambda m: m.double(), r"0\.weight is torch\.float64; allowed: torch\.float32"),
        (lambda m: m[0].bias.data.fill_(float("nan")), "0.bias is not finite before any training"),
    ],
)
def test_weights_that_cannot_be_averaged_are_refused_by_name(change, said, monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    change(model)
    monkeypatch.setitem(MODELS, "changed", lambda channels, size, classes: model)
    with pytest.raises(SettingsError, match=f"model: 'changed': {said}"):
        build_model("changed", 1, 8, 10, 0)


_NUMBERS = itertools.count()


class Around(nn.Module):
    """Uses a layer's weight without the layer."""

    def __init__(self):
        super().__init__()
        self.used, self.around = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x):
        return nn.functional.linear(self.used(x.flatten(1)), self.around.weight)


class AroundToo(Around):
    """Calls the layer as well, the first time."""

    def forward(self, x):
        return nn.functional.linear(self.around(self.used(x.flatten(1))), self.around.weight)


class AroundInEvaluation(Around):
    """As a fused kernel does."""

    def forward(self, x):
        used = self.used(x.flatten(1))
        return self.around(used) if self.training else super().forward(x)


class ByForward(Around):
    """Goes past the hooks of its layers, but through them."""

    def forward(self, x):
        return self.around.forward(self.used.forward(x.flatten(1)))


class AnyLogits(ByForward):
    def forward(self, x):
        return super().forward(x) + next(_NUMBERS)


class Evaluated(nn.Sequential):
    """Cannot be trained."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if self.training:
            raise RuntimeError("evaluation only")
        return super().forward(x)


def test_a_model_is_tried_at_its_width():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    check_at_width(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Settings(), 4, Pixels(pixels))
    with pytest.raises(SettingsError, match=r"computes with around\.weight outside of its layer"):
        check_at_width(Around(), Settings(), 4, Pixels(pixels))
    for kind in (AroundToo, AroundInEvaluation):
        with pytest.raises(SettingsError, match=r"computes with around\.weight outside of its"):
            check_at_width(kind(), Settings(), 4, Pixels(pixels))
    for kind in (ByForward, AnyLogits):
        check_at_width(kind(), Settings(), 4, Pixels(pixels))
    said = "cannot be trained at 4 bits: RuntimeError: evaluation only"
    with pytest.raises(SettingsError, match=said):
        check_at_width(Evaluated(), Settings(), 4, Pixels(pixels))
