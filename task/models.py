"""Models of images by name: small ones of here, torchvision's, and the user's own."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import SettingsError
from core.reference import is_reference, load_reference, users_code
from core.seeds import seed_torch
from task.model_checks import check_logits, check_model, check_weights
from task.transformer import VisionTransformer
from task.vgg7 import vgg7_named


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around an identity or strided 1x1 shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network of ``6 n + 2`` layers for small images (arXiv:1512.03385, 4.2)."""

    def __init__(self, blocks: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers, width = [], 16
        for stage, stage_width in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(width, stage_width, stride))
                width = stage_width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        return cast(Tensor, self.head(x.mean(dim=(2, 3))))


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, without normalization."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 1, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(64 * 16, 128)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.pool(F.relu(self.conv2(x)))
        return cast(Tensor, self.head(F.relu(self.hidden(x.flatten(1)))))


class RowCRNN(nn.Module):
    """An image's rows as the steps of a signal: two Conv1d, a GRU, and a head on its last state."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels * size, 64, 3, 1, 1)
        self.conv2 = nn.Conv1d(64, 64, 3, 2, 1)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 3).flatten(1, 2)  # A row's pixels are its features.
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        steps, _ = self.gru(x.transpose(1, 2))
        return cast(Tensor, self.head(steps[:, -1]))


# Of channels, pixels a side and classes.
MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet8": lambda channels, _, classes: CifarResNet(1, channels, classes),
    "resnet20": lambda channels, _, classes: CifarResNet(3, channels, classes),
    "cnn": lambda channels, _, classes: SmallCNN(channels, classes),
    "vit": VisionTransformer,
    "crnn": RowCRNN,
}


def build_model(name: str, channels: int, size: int, num_classes: int, seed: int) -> nn.Module:
    """Make a freshly initialized model.

    Parameters
    ----------
    name : str
        A key of `MODELS`, a name of `task.vgg7.vgg7_named`, any classifier that
        ``torchvision.models.get_model`` knows, or ``"package.module:factory"`` with
        ``factory(channels, size, num_classes) -> nn.Module``.
    channels, size : int
        Channels (1 or 3) and pixels a side of the images.
    num_classes : int
        Length of the logits.
    seed : int
        Seeds the initial weights; torch's own generator is left as it was.

    Raises
    ------
    SettingsError
        If there is no such model or it does not take images of this size.
    """
    with torch.random.fork_rng(devices=[]):
        # Before the seed: an import may draw random numbers, and only the first one does.
        factory = load_reference("model", name) if is_reference(name) else None
        seed_torch(seed)
        if name in MODELS:
            model = MODELS[name](channels, size, num_classes)
        elif name.startswith("vgg7"):
            model = vgg7_named(name, channels, size, num_classes)
        elif is_reference(name):
            model = _own_model(factory, name, channels, size, num_classes)
        else:
            model = _torchvision_model(name, channels, num_classes)
        # Under the seed too: a lazy layer makes its weights now.
        _try_model(model, name, channels, size, num_classes)
    return model


def _own_model(factory: object, name: str, channels: int, size: int, num_classes: int) -> nn.Module:
    if not callable(factory):
        raise SettingsError(
            f"model: {name!r} is a {type(factory).__name__}; allowed: a function of channels, "
            "size and num_classes that returns a torch.nn.Module"
        )
    given = f"channels={channels}, size={size}, num_classes={num_classes}"
    with users_code(f"model: {name!r} fails for {given}"):
        model = factory(channels, size, num_classes)
    if not isinstance(model, nn.Module):
        raise SettingsError(
            f"model: {name!r} returns a {type(model).__name__}; it must be a torch.nn.Module"
        )
    return model


def _torchvision_model(name: str, channels: int, num_classes: int) -> nn.Module:
    import torchvision  # Two seconds that the small models need not wait for.

    if name not in torchvision.models.list_models(module=torchvision.models):
        known = ", ".join([*MODELS, "vgg7"])
        raise SettingsError(
            f"model: {name!r}; allowed: {known}, a torchvision classifier's name, or "
            "package.module:factory"
        )
    # Auxiliary heads would get no loss; and torchvision warns without an explicit init_weights.
    two = name in ("googlenet", "inception_v3")
    extra = {"aux_logits": False, "init_weights": True} if two else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    path, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != channels:
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], _with_channels(first, channels))
    return cast(nn.Module, model)


def _with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    shape: dict[str, Any] = {
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
    }
    return nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **shape)


def _try_model(model: nn.Module, name: str, channels: int, size: int, num_classes: int) -> None:
    check_weights(model, name)
    # Two images, as one alone would hide a mix-up of images and channels.
    images = torch.zeros(2, channels, size, size)
    model.eval()
    # What a model of the user's own needs is not known here, and may be mended in it.
    advice = "" if is_reference(name) else "; set image-size if it needs others"
    refused = f"model: {name!r} does not take {channels}x{size}x{size} images"
    with users_code(refused, advice), torch.no_grad():
        logits = model(images)
    check_logits(logits, len(images), num_classes, name)
    check_model(model, name)  # Its lazy layers have their weights now.
