"""Models of some 200 weights: a convolution, BatchNorm, a grouped convolution, a linear layer."""

from torch import nn

from quant import INITIAL_RANGE, IntegerActivation, IntegerInput, IntegerOutput, Scaled

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


# And of the one for integer training, which has no other weights.
INTEGER_ON_GRID = ("1.layer.weight", "5.layer.weight", "8.layer.weight")


def integer_network(channels: int, size: int, num_classes: int) -> nn.Module:
    """Make a model for integer training."""
    model = nn.Sequential(
        IntegerInput(0.5),
        Scaled(nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False)),
        nn.BatchNorm2d(4, affine=False),
        IntegerActivation(),
        nn.MaxPool2d(2),
        Scaled(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), 2.0),
        IntegerActivation(),
        nn.Flatten(),
        Scaled(nn.Linear(4 * (size // 4) ** 2, num_classes, bias=False), 4.0),
        IntegerOutput(),
    )
    for weight in model.parameters():
        nn.init.uniform_(weight, -INITIAL_RANGE, INITIAL_RANGE)
    return model
