"""VGG-7 for integer training: ternary weights, clipped activations, no bias.

WAGE's network (arXiv:1802.04680, 4.1), narrower, and with pooling after the first, third and fifth
convolution in place of the second, fourth and sixth, which saves half of the arithmetic. With
BatchNorm a layer's output has mean 0 and deviation 0.4, so that the clip at 1 lies at 2.5
deviations; without it, as in the paper, each layer's scale alpha keeps it in range.
"""

import re

from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import SettingsError
from quant import (
    INITIAL_RANGE,
    IntegerActivation,
    IntegerInput,
    IntegerOutput,
    Scaled,
    shared_scale,
)

_CONVOLUTIONS = (16, 16, 32, 32, 96, 96)
_HIDDEN = 192
_DEVIATION = 0.4
# Of `task.data.to_input`'s -2..2.
_INPUT_FACTOR = 0.5
_LARGEST_WIDTH = 64
_NAME = re.compile(r"vgg7(?P<plain>-nobn)?(-x(?P<width>\d+(\.\d+)?))?")
NAMES = "vgg7 or vgg7-nobn, with a factor on its channels as in vgg7-x0.5"


class Block(nn.Module):
    """A layer and what follows it: pooling, normalization and the clipped ReLU.

    Parameters
    ----------
    layer : nn.Conv2d or nn.Linear
        Without a bias.
    normalized : bool
        Whether BatchNorm follows, without parameters of its own.
    pooled : bool
        Whether each 2 x 2 pixels become one, their largest.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, normalized: bool, pooled: bool) -> None:
        super().__init__()
        fan_in = layer.weight[0].numel()
        self.scaled = Scaled(layer, 1.0 if normalized else shared_scale(fan_in))
        self.pooled = pooled
        self.norm: nn.Module | None = None
        if normalized:
            kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
            self.norm = kind(layer.weight.shape[0], affine=False)
        self.activation = IntegerActivation()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scaled(x)
        if self.pooled:
            y = F.max_pool2d(y, 2)
        if self.norm is not None:
            y = self.norm(y) * _DEVIATION
        activated: Tensor = self.activation(y)
        return activated


class VGG7(nn.Module):
    """Six 3x3 convolutions and two linear layers.

    Parameters
    ----------
    channels, size, num_classes : int
        Of the images, and length of the logits.
    width : float
        Factor on 16, 16, 32, 32, 96 and 96 channels and 192 hidden units.
    normalized : bool
        Whether BatchNorm follows each layer but the last.
    """

    def __init__(
        self, channels: int, size: int, num_classes: int, width: float, normalized: bool
    ) -> None:
        super().__init__()
        self.input = IntegerInput(_INPUT_FACTOR)
        blocks = []
        for place, wide in enumerate(_CONVOLUTIONS):
            conv = nn.Conv2d(channels, _times(wide, width), 3, 1, 1, bias=False)
            blocks.append(Block(conv, normalized, pooled=place % 2 == 0))
            channels = conv.out_channels
        self.convolutions = nn.Sequential(*blocks)
        hidden = nn.Linear(channels * (size // 8) ** 2, _times(_HIDDEN, width), bias=False)
        self.hidden = Block(hidden, normalized, pooled=False)
        head = nn.Linear(hidden.out_features, num_classes, bias=False)
        self.head = Scaled(head, shared_scale(head.in_features))
        self.output = IntegerOutput()
        for weight in self.parameters():
            nn.init.uniform_(weight, -INITIAL_RANGE, INITIAL_RANGE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolutions(self.input(x))
        logits: Tensor = self.output(self.head(self.hidden(x.flatten(1))))
        return logits


def vgg7_named(name: str, channels: int, size: int, num_classes: int) -> VGG7:
    """Make the network of a name, as ``vgg7``, ``vgg7-nobn``, ``vgg7-x2`` or ``vgg7-nobn-x0.5``.

    Raises
    ------
    SettingsError
        If there is no such name, or the images are too small.
    """
    match = _NAME.fullmatch(name)
    width = float(match["width"] or 1) if match else 0.0
    if match is None or not 0 < width <= _LARGEST_WIDTH:
        raise SettingsError(
            f"model: {name!r}; allowed: {NAMES}, above 0 and up to {_LARGEST_WIDTH}"
        )
    if size < 8:
        raise SettingsError(
            f"model: {name!r} halves its images three times; {size} pixels a side are too few; "
            "set image-size to 8 or more"
        )
    return VGG7(channels, size, num_classes, width, normalized=not match["plain"])


def _times(channels: int, width: float) -> int:
    return max(1, round(channels * width))
