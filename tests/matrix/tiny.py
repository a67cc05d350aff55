"""A user's own model of 249 weights: a convolution, BatchNorm, a grouped one, a linear layer."""

from torch import nn

# What low-bit clients quantize: the weights of its convolutions and of its linear layer.
ON_GRID = ("0.weight", "4.weight", "7.weight")


def network(channels: int, size: int, num_classes: int) -> nn.Module:
    """Make the model."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * (size // 4) ** 2, num_classes),
    )
