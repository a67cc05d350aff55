"""Models of images by name: small ones of here, torchvision's, and the user's own."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import SettingsError
from core.files import is_utf8, printable
from core.reference import in_one_line, is_reference, load_reference
from core.seeds import seed_torch
from quant import LARGEST_VALUE, federated_state, is_finite
from task.transformer import VisionTransformer
from task.vgg7 import vgg7_named

# What a checkpoint holds and an update brings back, rounded to float32.
_BUFFER_TYPES = (torch.float16, torch.float32, torch.float64)
# As a payload states the length of a name in two bytes.
_LONGEST_NAME = 2**16 - 1


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


def check_repeatable(model: nn.Module, again: nn.Module, name: str) -> None:
    """Refuse a factory that gives one module twice, or under one seed other weights.

    Raises
    ------
    SettingsError
        If `model` and `again`, built alike, share their memory or are not alike.
    """
    first, second = federated_state(model), federated_state(again)
    if model is again or _memory(first) & _memory(second):
        raise SettingsError(
            f"model: {name!r} returns what it returned before; it must make a new module"
        )
    alike = first.keys() == second.keys() and all(
        first[n].shape == second[n].shape and torch.equal(first[n], second[n]) for n in first
    )
    if not alike:
        raise SettingsError(
            f"model: {name!r} gives other weights under the same seed; they must depend on torch's "
            "random numbers alone"
        )


def check_model(model: object, name: str) -> None:
    """Refuse what is no model, or cannot be trained, sent and averaged.

    Raises
    ------
    SettingsError
        One line that names the tensor.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"task: {name!r} gives a {type(model).__name__}; allowed: an nn.Module")
    _check_weights(model, name)
    _check_sent(model, name)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise SettingsError(f"model: {name!r} has no weight that is trained; allowed: one or more")


def _memory(state: dict[str, Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in state.values() if tensor.numel()}


def _check_weights(model: nn.Module, name: str) -> None:
    """Refuse what cannot be sent and averaged: weights not float32, not finite, nowhere, sparse."""
    sent = model.state_dict()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SettingsError(f"model: {name!r}: {key} is on meta; allowed: weights in memory")
        if key in sent and tensor.layout != torch.strided:
            raise SettingsError(f"model: {name!r}: {key} is {tensor.layout}; allowed: dense")
        if key in sent and _is_expanded(tensor):
            raise SettingsError(
                f"model: {name!r}: {key} is expanded: values of its share one place in memory, "
                "which no weights can be loaded into; allowed: memory of its own, as of clone()"
            )
    for key, weight in model.named_parameters():
        if isinstance(weight, nn.parameter.UninitializedParameter):
            continue
        if weight.dtype != torch.float32:
            raise SettingsError(f"model: {name!r}: {key} is {weight.dtype}; allowed: torch.float32")
        if not is_finite(weight.detach()):
            raise SettingsError(f"model: {name!r}: {key} is not finite before any training")


def _is_expanded(tensor: Tensor) -> bool:
    if nn.parameter.is_lazy(cast(Any, tensor)) or tensor.layout != torch.strided:
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(size > 1 and not step for size, step in pairs)


def _check_sent(model: nn.Module, name: str) -> None:
    """Refuse what no payload or checkpoint holds, of a model whose lazy layers have been called."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(cast(Any, tensor)):
            raise SettingsError(
                f"model: {name!r}: {key} has no shape, as its lazy layer takes no part in the "
                "forward pass"
            )
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if tensor.dtype not in _BUFFER_TYPES:
                allowed = ", ".join(map(str, _BUFFER_TYPES))
                raise SettingsError(f"model: {name!r}: {key} is {tensor.dtype}; allowed: {allowed}")
            if not is_utf8(key) or len(key.encode()) > _LONGEST_NAME:
                raise SettingsError(
                    f"model: {name!r}: {printable(key)[:60]} cannot be a tensor's name; allowed: "
                    f"UTF-8 of {_LONGEST_NAME} bytes at most"
                )
    for key, tensor in federated_state(model).items():
        if tensor.numel() and (largest := float(tensor.abs().max())) > LARGEST_VALUE:
            raise SettingsError(
                f"model: {name!r}: {key} holds {largest:g} before any training; allowed: up to "
                f"{LARGEST_VALUE:g}"
            )


def _own_model(factory: object, name: str, channels: int, size: int, num_classes: int) -> nn.Module:
    if not callable(factory):
        raise SettingsError(
            f"model: {name!r} is a {type(factory).__name__}; allowed: a function of channels, "
            "size and num_classes that returns a torch.nn.Module"
        )
    try:
        model = factory(channels, size, num_classes)
    except Exception as error:  # Whatever the user's code raises.
        given = f"channels={channels}, size={size}, num_classes={num_classes}"
        raise SettingsError(f"model: {name!r} fails for {given}: {in_one_line(error)}") from None
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
    _check_weights(model, name)
    # Two images, as one alone would hide a mix-up of images and channels.
    images = torch.zeros(2, channels, size, size)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:  # Whatever the user's code raises.
        # What a model of the user's own needs is not known here, and may be mended in it.
        advice = "" if is_reference(name) else "; set image-size if it needs others"
        raise SettingsError(
            f"model: {name!r} does not take {channels}x{size}x{size} images "
            f"({in_one_line(error)}){advice}"
        ) from None
    _check_weights(model, name)  # A lazy layer has its weights now.
    _check_sent(model, name)
    _check_logits(logits, len(images), num_classes, name)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise SettingsError(f"model: {name!r} has no weight that is trained; allowed: one or more")


def _check_logits(logits: object, images: int, num_classes: int, name: str) -> None:
    """Refuse what a model gives if it is not a dense float tensor, one row an image."""
    what = f"model: {name!r} gives"
    if not isinstance(logits, Tensor):
        raise SettingsError(f"{what} a {type(logits).__name__}, not logits")
    if logits.shape != (images, num_classes):
        raise SettingsError(
            f"{what} logits {list(logits.shape)} for {images} images; "
            f"it must be {[images, num_classes]}"
        )
    if logits.is_meta or logits.layout != torch.strided or not logits.is_floating_point():
        kind = f"{logits.layout} of {logits.dtype}" + (" on meta" if logits.is_meta else "")
        raise SettingsError(f"{what} logits that are {kind}; allowed: dense, floating-point")
