"""A task: what is learned, from which data, and how its success is measured.

`Task` is all that client and server ask of a problem. The built-in ones (`task.tasks`) are written
on it and nothing else; one of the user's own is named by ``task="package.module:Class"``::

    class Wearables(Task):
        def model(self, seed):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv1d(6, 16, 5), nn.ReLU(), ...)

        def train_data(self, node):
            return tensors_of(node.data_path)  # Inputs and targets.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.errors import SettingsError
from core.options import Options as OwnOptions
from core.seeds import DataStream, data_generator
from core.settings import Settings
from task.examples import (
    NO_INPUTS,
    DatasetExamples,
    Examples,
    Inputs,
    Measures,
    TensorExamples,
    TensorInputs,
)

# Tensors of inputs and targets; a map-style dataset of pairs; or examples themselves.
Data = tuple[Tensor, Tensor] | Dataset[Any] | Examples
# What server and devices must agree on: sent by the server, and compared by each device.
Facts = Mapping[str, str | int | float | list[str]]


@dataclass(frozen=True)
class Node:
    """The device whose data is asked for.

    Attributes
    ----------
    partition_id, num_partitions : int
        Its part of common data, of how many, as in simulation; -1 and 0 of a device that has data
        of its own.
    data_path : str
        Where that lies on the device: ``data-path`` of its node-config; empty if it has none.
    """

    partition_id: int = -1
    num_partitions: int = 0
    data_path: str = ""


class Task(Measures, ABC):
    """What is learned. `model` and `train_data` must be written; the rest has defaults.

    Those of loss, metrics and batches are `task.examples.Measures`.

    Parameters
    ----------
    settings : Settings
        Of the run.
    options : Options, optional
        The task's own settings (``task-options``), of its class `Options`.
    facts : mapping, optional
        On a device: what `facts` returned on the server.

    Examples
    --------
    >>> class Parity(Task):
    ...     def model(self, seed):
    ...         return nn.Linear(4, 2)
    ...     def train_data(self, node):
    ...         bits = torch.randint(2, (64, 4))
    ...         return bits.float(), bits.sum(1) % 2
    >>> len(Parity(Settings()).examples(Node(0, 2)))
    64
    """

    # Class of the task's own settings.
    Options: type[OwnOptions] = OwnOptions
    # Of that class, which a subclass may narrow for its type checker.
    options: Any
    # Of the first of the metrics: which way is better, and the smallest and largest that there is.
    higher_is_better = True
    metric_range: tuple[float, float] = (0.0, 1.0)
    # What an exported model calls its input.
    input_name = "inputs"

    @property
    def loss_range(self) -> tuple[float, float]:
        """Smallest and largest mean loss that a device can report; one that is beyond is cut.

        Of the default loss, a cross-entropy, up to ten thousand logits between the true class and
        another: a device that gets there has diverged. Of one of the task's own, any number.
        """
        return (0.0, 1e4) if type(self).loss is Measures.loss else (-inf, inf)

    def __init__(
        self, settings: Settings, options: OwnOptions | None = None, facts: Facts | None = None
    ) -> None:
        self.settings = settings
        self.options = self.Options() if options is None else options
        self.given = facts

    # --- to be written ---------------------------------------------------------------------------

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return a new network, with the same initial weights under one seed."""

    @abstractmethod
    def train_data(self, node: Node) -> Data:
        """Return the training examples of a device.

        Raises
        ------
        SettingsError
            If there are none, or they cannot be used: the device cannot take part, with this line.
        """

    # --- with defaults ---------------------------------------------------------------------------

    def test_data(self) -> Data | None:
        """Return held-out examples on the server; None: devices evaluate."""
        return None

    def local_test_data(self, node: Node) -> Data | None:
        """Return what a device evaluates on.

        None: a share of its `train_data` (``local-test-share``), which it then never trains on.
        """
        return None

    def has_local_test_data(self, node: Node) -> bool:
        """Return whether `local_test_data` gives any; a task may know without making it."""
        return self.local_test_data(node) is not None

    def server_inputs(self) -> Inputs | Tensor | None:
        """Return unlabelled inputs on the server, to calibrate and distil with; None: neither."""
        return None

    def example_inputs(self) -> Any:
        """Return two inputs as the network takes them, by which a model is exported; None: none."""
        for inputs in (self.unlabelled, self._test_examples):
            found = inputs()
            if found is not None and len(found) > 1:
                return found.inputs(slice(2))
        return None

    def facts(self) -> Facts:
        """Return what server and devices must agree on, which each device is told (`given`)."""
        return {}

    def describe(self) -> Iterator[tuple[int, str]]:
        """Yield log levels and lines that say what the server has read."""
        yield from ()

    def fingerprint(self) -> str:
        """Return a short text that differs where the data on the server does."""
        data = self.test_data()
        if data is None:
            return "no data on the server"
        examples, crc = self.as_examples(data), 0
        if isinstance(examples, TensorExamples):
            for tensor in examples.data:
                crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), crc)
        return f"{len(examples)} examples, CRC {crc:08x}"

    def most_examples(self) -> int | None:
        """Return how many examples a part of common data can have at most; None: any number."""
        return None

    def partition_size(self, partition_id: int, num_partitions: int) -> int | None:
        """Return how many examples a part of common data has; None where the server has none.

        A device that declares more is refused. It may raise a `SettingsError`: there is no such
        part.
        """
        return None

    # --- not to be overridden --------------------------------------------------------------------

    def as_examples(self, data: Data) -> Examples:
        """Return data as examples with this task's loss and metrics."""
        if isinstance(data, Examples):
            return data
        kind = type(self).__name__
        if isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data):
            if len(data) != 2 or len(data[0]) != len(data[1]):
                lengths = " and ".join(str(len(part)) for part in data)
                raise SettingsError(
                    f"task: {kind} gives tensors of {lengths} examples; allowed: inputs and as "
                    "many targets"
                )
            return TensorExamples((data[0], data[1]), self)
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise SettingsError(
                f"task: {kind} gives a {type(data).__name__} as data; allowed: two tensors, or a "
                "torch Dataset with a length"
            )
        count = len(cast(Sized, data))
        return DatasetExamples(cast("Dataset[Any]", data), np.arange(count), self)

    def unlabelled(self) -> Inputs:
        """Return the server's inputs; none where it has none."""
        inputs = self.server_inputs()
        if inputs is None:
            return NO_INPUTS
        if not isinstance(inputs, (Inputs, Tensor)):
            raise SettingsError(
                f"task: {type(self).__name__}.server_inputs gives a {type(inputs).__name__}; "
                "allowed: a tensor, Inputs, or None"
            )
        return inputs if isinstance(inputs, Inputs) else TensorInputs(inputs, self)

    def examples(self, node: Node) -> Examples:
        """Return what a device trains on; its own data in a random order, as files are sorted."""
        data = self.as_examples(self.train_data(node))
        if self.has_local_test_data(node):
            return self._shuffled(data) if node.data_path else data
        return self._shuffled(data.part(np.flatnonzero(~self._held_out(len(data)))))

    def local_test_examples(self, node: Node) -> Examples:
        """Return what a device evaluates on."""
        own = self.local_test_data(node)
        if own is not None:
            return self.as_examples(own)
        data = self.as_examples(self.train_data(node))
        return data.part(np.flatnonzero(self._held_out(len(data))))

    def _test_examples(self) -> Examples | None:
        data = self.test_data()
        return None if data is None else self.as_examples(data)

    def _held_out(self, count: int) -> np.ndarray:
        """Return which examples are held out: the same in every round, also where more came."""
        share = self.settings.local_test_share
        draws = data_generator(self.settings.seed, DataStream.LOCAL_TEST).random(count)
        held = draws < share
        if share and count > 1 and not held.any():
            held[draws.argmin()] = True
        if count > 1 and held.all():
            held[draws.argmax()] = False
        return held

    def _shuffled(self, data: Examples) -> Examples:
        order = data_generator(self.settings.seed, DataStream.LOCAL_ORDER).permutation(len(data))
        return data.part(order)
