"""Loss and metrics of a model on examples."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from core.devices import device_of
from core.errors import SettingsError
from core.seeds import drawn_under
from task.examples import Examples, MetricSums, values_of

# Small enough for the cache: twice as fast as 500 on a CPU.
_BATCH = 100
# A GPU is busy with more only; of larger examples, with fewer.
_BATCH_ON_GPU, _MOST_VALUES_ON_GPU = 1000, 2**22


@dataclass(frozen=True)
class Score:
    """Means over `num_examples` examples.

    Attributes
    ----------
    loss : float
        Mean loss.
    accuracy : float
        The first of the task's metrics: by default the share of right answers, 0 to 1.
    num_examples : int
        Examples.
    metrics : mapping of str to float
        All of its metrics.
    """

    loss: float
    accuracy: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, loss: float, sums: MetricSums, num_examples: int) -> "Score":
        """Make it of a loss and of metrics that were added up."""
        means = sums.means()
        return cls(loss, next(iter(means.values())), num_examples, means)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, seed: int = 0) -> Score:
    """Return loss and metrics of a model on examples, where the model is.

    The seed is of what a model draws that draws random numbers in evaluation too.
    """
    with drawn_under(seed):
        return _evaluate(model, examples)


def _evaluate(model: nn.Module, examples: Examples) -> Score:
    model.eval()
    device = device_of(model)
    size, count = _BATCH, len(examples)
    if not count:
        raise SettingsError(
            "local-test-share: there are no examples to evaluate on; allowed: a larger share, more "
            "examples, or test data of the task's own"
        )
    if device.type != "cpu":
        fitting = _MOST_VALUES_ON_GPU // max(values_of(examples.inputs(slice(1))), 1)
        size = max(size, min(fitting, _BATCH_ON_GPU))
    loss, sums = 0.0, MetricSums()
    for start in range(0, count, size):
        end = min(start + size, count)
        # A slice, which copies nothing.
        inputs, targets = examples.batch(slice(start, end), device)
        outputs = model(inputs)
        loss += float(examples.loss(outputs, targets)) * (end - start)
        sums.add(examples.metrics(outputs, targets))
    return Score.of(loss / count, sums, count)
