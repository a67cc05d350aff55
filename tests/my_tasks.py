"""Tasks as users write them, found by name as `my_tasks:Class`."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from core.errors import SettingsError
from core.options import Options
from task import Node, Task

WINDOW, CHANNELS, CLASSES = 12, 6, 3


def signals(count: int, seed: int):
    """Windows of a signal whose kind is which channel swings."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(CLASSES, (count,), generator=generator)
    noise = 0.2 * torch.randn(count, CHANNELS, WINDOW, generator=generator)
    noise[torch.arange(count), kinds] += torch.linspace(0, 6.28, WINDOW).sin()
    return noise, kinds


class SignalOptions(Options):
    """Settings of `Signals`."""

    width: int = 8


class Signals(Task):
    """A 6-channel signal: a Conv1d network on windows of it."""

    Options = SignalOptions

    def model(self, seed):
        torch.manual_seed(seed)
        width = self.options.width
        return nn.Sequential(
            nn.Conv1d(CHANNELS, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * WINDOW, CLASSES),
        )

    def train_data(self, node):
        if node.data_path:
            return tuple(torch.load(f"{node.data_path}/signals.pt"))
        return signals(60, node.partition_id)

    def test_data(self):
        return signals(90, seed=99)

    def server_inputs(self):
        return signals(32, seed=98)[0]


class OnDevices(Signals):
    """The same without a server that has data."""

    def test_data(self):
        return None

    def server_inputs(self):
        return None


class Pairs(Dataset):
    """A map-style dataset."""

    def __init__(self, count, seed):
        self.inputs, self.targets = signals(count, seed)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]


class Regression(Signals):
    """A loss and metrics of its own: how strongly the signal swings."""

    higher_is_better = False
    metric_range = (0.0, float("inf"))

    def model(self, seed):
        torch.manual_seed(seed)
        hidden = nn.Linear(CHANNELS * WINDOW, 16)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16, 1))

    def train_data(self, node):
        return Pairs(50, node.partition_id)

    def test_data(self):
        return Pairs(40, 99)

    def loss(self, outputs, targets):
        return F.mse_loss(outputs[:, 0], targets.float())

    def metrics(self, outputs, targets):
        errors = (outputs[:, 0] - targets).abs()
        return {"error": (float(errors.sum()), len(targets)), "worst": (float(errors.max()), 1)}


class Dictionary(Signals):
    """A network that gives two tensors by name, one of integers, and a loss that knows them."""

    def model(self, seed):
        class Heads(nn.Module):
            def __init__(self, body):
                super().__init__()
                self.body = body

            def forward(self, x):
                logits = self.body(x)
                return {"logits": logits, "guess": logits.argmax(1)}

        return Heads(super().model(seed))

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs["logits"], targets)

    def metrics(self, outputs, targets):
        return {"accuracy": (int((outputs["guess"] == targets).sum()), len(targets))}


class TwoTensors(Signals):
    """A tuple, of which the default loss makes nothing."""

    def model(self, seed):
        body = super().model(seed)
        body.append(Twice())
        return body


class Twice(nn.Module):
    """Gives what it gets two times."""

    def forward(self, x):
        return x, x


class Density(OnDevices):
    """A loss of its own that falls below zero, and one metric that is undefined on some devices."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets) - 10

    def metrics(self, outputs, targets):
        right = outputs.argmax(1) == targets
        second = targets == 1
        return {
            "accuracy": (int(right.sum()), len(targets)),
            "recall-1": (int((right & second).sum()), int(second.sum())),
            "perplexity": (float("inf"), 1),
        }


class Huge(Density):
    """A loss beyond that of any classifier."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets) * 1e9


class Raises(Signals):
    """Data that cannot be read."""

    def train_data(self, node: Node):
        raise OSError("the sensor is unplugged")


class Refuses(Signals):
    """One device that says why it cannot take part."""

    def train_data(self, node: Node):
        if node.partition_id == 1:
            raise SettingsError("sensor: it has recorded nothing yet")
        return super().train_data(node)


class Unfinished(Task):
    """No model, no data."""


class Unrepeatable(Signals):
    """Other weights each time."""

    def model(self, seed):
        torch.seed()
        return nn.Linear(3, 3)


class NoModel(Signals):
    """What is no module."""

    def model(self, seed):
        return "resnet"


class OtherShape(Signals):
    """Another model on devices than on the server, as after an update of one of the two."""

    def model(self, seed):
        torch.manual_seed(seed)
        width = 8 if self.given is None else 9
        hidden = nn.Linear(CHANNELS * WINDOW, width)
        return nn.Sequential(nn.Flatten(), hidden, nn.Linear(width, CLASSES))

    def facts(self):
        return {"window": WINDOW}


class NoMetrics(Signals):
    """Nothing is measured."""

    def metrics(self, outputs, targets):
        return {}


class Unreduced(Signals):
    """A loss an example."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")


class FloatLoss(Signals):
    """A loss without a gradient."""

    def loss(self, outputs, targets):
        return float(F.cross_entropy(outputs, targets))


class NestedFacts(Signals):
    """What Flower has no record of."""

    def facts(self):
        return {"shape": {"window": WINDOW}}


class NoTest(Signals):
    """A test set without examples."""

    def test_data(self):
        return signals(0, 1)


class OddRange(Signals):
    """The largest first."""

    metric_range = (1.0, 0.0)


class ListInputs(Signals):
    """Inputs in a list."""

    def server_inputs(self):
        return [signals(32, 1)[0]]


class Undefined(Signals):
    """A metric that is not defined on some data."""

    def metrics(self, outputs, targets):
        return {"auc": (float("nan"), 1)} if len(targets) > 8 else {"auc": (1.0, 1)}
