"""Examples: what a network learns from, is evaluated on, or is calibrated with, batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

# Of a metric over some examples: what it sums up to, and over how many of them.
Metrics = Mapping[str, tuple[float, int]]
Indices = np.ndarray | slice


class Inputs(ABC):
    """Unlabelled examples: what calibrates a network, or passes through it."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def inputs(self, index: Indices, device: torch.device | None = None) -> Any:
        """Return a batch as the network takes it, on a device; the CPU by default."""

    def spread(self, count: int) -> np.ndarray:
        """Return the places of so many examples from all over, as they may be sorted by class."""
        return np.linspace(0, len(self) - 1, min(len(self), count)).astype(int)


class Measures:
    """What is asked of a network's outputs, and how a batch is made; a `Task` has its own."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss over a batch; by default the cross-entropy of logits."""
        return cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> Metrics:
        """Return sums over a batch, each with its count, so that they add up over batches.

        The first is the headline. By default it is the share of right answers.
        """
        return {"accuracy": right_answers(outputs, targets)}

    def to_input(self, inputs: Any) -> Any:
        """Return a batch of inputs as the network takes it; by default as it is."""
        return inputs

    def collate(self, examples: list[Any]) -> Any:
        """Return a batch of inputs and one of targets, from examples of a dataset."""
        return default_collate(examples)


class Examples(Inputs):
    """Labelled examples, and what is asked of a network's outputs for them."""

    measures: Measures = Measures()

    @abstractmethod
    def batch(self, index: Indices, device: torch.device | None = None) -> tuple[Any, Any]:
        """Return a batch as the network takes it, and its targets, on a device."""

    @abstractmethod
    def part(self, index: np.ndarray) -> "Examples":
        """Return some of them."""

    def inputs(self, index: Indices, device: torch.device | None = None) -> Any:
        return self.batch(index, device)[0]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.measures.loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> Metrics:
        """Return sums over a batch, each with its count."""
        return self.measures.metrics(outputs, targets)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits ``[n, ..., classes]`` and targets ``[n, ...]``."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def right_answers(outputs: Tensor, targets: Tensor) -> tuple[float, int]:
    """Return how many of the targets have the largest logit, and how many there are.

    >>> right_answers(torch.tensor([[0.1, 2.0], [3.0, 1.0]]), torch.tensor([1, 1]))
    (1.0, 2)
    """
    # The largest of logits with a NaN is the NaN, which is no answer.
    right = (outputs.argmax(-1) == targets) & ~outputs.isnan().any(-1)
    return float(right.sum()), targets.numel()


def values_of(value: Any) -> int:
    """Return how many numbers tensors hold, also in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return value.numel()
    parts = value.values() if isinstance(value, Mapping) else value
    return sum(map(values_of, parts)) if isinstance(value, (Mapping, list, tuple)) else 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a network's outputs, also in lists, tuples and mappings.

    >>> [t.shape[0] for t in tensors_in({"classes": torch.ones(2), "boxes": (torch.ones(3), None)})]
    [2, 3]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def to_device(value: Any, device: torch.device | None) -> Any:
    """Return tensors, also in lists, tuples and mappings, on a device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(part, device) for part in value)
    return value


@dataclass(frozen=True)
class TensorExamples(Examples):
    """Examples in memory.

    Attributes
    ----------
    data : tuple of Tensor
        Inputs and targets, as many of both; the first dimension is the example's.
    measures : Measures
        Of the task.

    Examples
    --------
    >>> examples = TensorExamples((torch.eye(3), torch.tensor([0, 1, 2])))
    >>> examples.batch(slice(1))
    (tensor([[1., 0., 0.]]), tensor([0]))
    """

    data: tuple[Tensor, Tensor]
    measures: Measures = field(default_factory=Measures)

    def __len__(self) -> int:
        return len(self.data[1])

    def batch(self, index: Indices, device: torch.device | None = None) -> tuple[Any, Any]:
        inputs, targets = (tensor[_indices(index)].to(device) for tensor in self.data)
        return self.measures.to_input(inputs), targets

    def part(self, index: np.ndarray) -> "TensorExamples":
        inputs, targets = (tensor[_indices(index)] for tensor in self.data)
        return TensorExamples((inputs, targets), self.measures)


@dataclass(frozen=True)
class TensorInputs(Inputs):
    """Unlabelled examples in memory.

    >>> TensorInputs(torch.eye(3)).inputs(slice(1))
    tensor([[1., 0., 0.]])
    """

    data: Tensor
    measures: Measures = field(default_factory=Measures)

    def __len__(self) -> int:
        return len(self.data)

    def inputs(self, index: Indices, device: torch.device | None = None) -> Any:
        return self.measures.to_input(self.data[_indices(index)].to(device))


@dataclass(frozen=True)
class DatasetExamples(Examples):
    """Examples of a map-style `torch.utils.data.Dataset` of pairs, read when they are needed.

    Attributes
    ----------
    data : Dataset
        It gives pairs of an input and a target.
    index : ndarray
        Which of them these are.
    measures : Measures
        Of the task.

    Examples
    --------
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 2]))
    >>> DatasetExamples(data, np.arange(3)).batch(slice(1))
    (tensor([[1., 0., 0.]]), tensor([0]))
    """

    data: Dataset[Any]
    index: np.ndarray
    measures: Measures = field(default_factory=Measures)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Indices, device: torch.device | None = None) -> tuple[Any, Any]:
        pairs = [self.data[int(i)] for i in self.index[index]]
        inputs, targets = self.measures.collate(pairs)
        return self.measures.to_input(to_device(inputs, device)), to_device(targets, device)

    def part(self, index: np.ndarray) -> "DatasetExamples":
        return DatasetExamples(self.data, self.index[index], self.measures)


# Of a server that has none.
NO_INPUTS = TensorInputs(torch.empty(0))


def _indices(index: Indices) -> slice | Tensor:
    return index if isinstance(index, slice) else torch.from_numpy(index)


class MetricSums:
    """Metrics of many batches, added up.

    >>> sums = MetricSums()
    >>> sums.add({"accuracy": (1.0, 2)})
    >>> sums.add({"accuracy": (2.0, 2)})
    >>> sums.means()
    {'accuracy': 0.75}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add those of a batch."""
        for name, (value, count) in metrics.items():
            before, number = self._sums.get(name, (0.0, 0))
            self._sums[name] = before + float(value), number + int(count)

    def means(self) -> dict[str, float]:
        """Return the mean of each; NaN where nothing was counted."""
        return {n: value / count if count else nan for n, (value, count) in self._sums.items()}
