"""The task `table`: a class from the columns of a CSV or Parquet file, by a small network."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from core.errors import SettingsError
from core.files import printable, reason, user_path
from core.options import Options, shown
from core.reference import in_one_line
from core.seeds import seed_torch
from core.settings import Settings
from task.data.dataset import load_dataset
from task.data.partition import random_part, random_sample, validation_part
from task.interface import Data, Facts, Node, Task

# One of so many rows is held out for the server's test set.
_TEST_EVERY = 5
_SERVER_ROWS = 256


class TableOptions(Options):
    """Settings of `TableTask` (``task-options``).

    >>> TableOptions(label="diagnosis").label
    'diagnosis'
    """

    label: str = Field("label", description="Column of the class.")
    columns: list[str] = Field(
        [], description="Columns that are learned from; none given: all the others."
    )
    classes: list[str] = Field(
        [], description="Values of the label, where the server has no table; with columns."
    )
    width: int = Field(64, ge=1, le=8192, description="Neurons of each of two hidden layers.")


@dataclass(frozen=True)
class Table:
    """Columns as they were read, and the class of each row by its name."""

    columns: tuple[str, ...]
    values: tuple[np.ndarray, ...]
    labels: tuple[str, ...]

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """Return some columns, float32 ``[rows, columns]``.

        Raises
        ------
        SettingsError
            If a value is no finite number; the line names its row and column.
        """
        found = np.empty((len(self.labels), len(names)), np.float32)
        for place, name in enumerate(names):
            column = self.values[self.columns.index(name)]
            if column.dtype.kind in "biuf":
                found[:, place] = column
            else:  # With a text among its numbers.
                found[:, place] = [_number(value) for value in column.tolist()]
            odd = np.flatnonzero(~np.isfinite(found[:, place]))
            if len(odd):
                value = shown(column.tolist()[odd[0]])
                raise SettingsError(
                    f"task: row {odd[0] + 1} of the table has {value} in column "
                    f"{name!r} ({len(odd)} rows like it); allowed: finite numbers, or columns of "
                    "task-options without it"
                )
        return found


class TableTask(Task):
    """Rows of numbers and their class.

    Common rows are those of the file ``data-dir``, or without it scikit-learn's digits as 64
    columns; a device may have a file of its own (``data-path``), with the server's columns in any
    order, and with some of its classes.

    Examples
    --------
    >>> task = TableTask(Settings(task="table"))
    >>> inputs, targets = task.train_data(Node(0, 10))
    >>> inputs.shape[1], int(targets.max())
    (64, 9)
    """

    Options = TableOptions
    input_name = "columns"

    def model(self, seed: int) -> nn.Module:
        columns, classes = self._shape()
        width = self.options.width
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            return nn.Sequential(
                # Columns have units of their own; these statistics travel with the model.
                nn.BatchNorm1d(len(columns)),
                nn.Linear(len(columns), width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, len(classes)),
            )

    def train_data(self, node: Node) -> Data:
        if node.data_path:
            return self._tensors(_read("data-path", node.data_path, self.options.label))
        inputs, targets = self._common(test=False)
        place, of = node.partition_id, node.num_partitions
        chosen = torch.from_numpy(random_part(self.settings, len(targets), place, of, "rows"))
        return inputs[chosen], targets[chosen]

    def test_data(self) -> Data | None:
        if not self._on_server:
            return None
        if not self.settings.validation_samples:
            return self._common(test=True)
        inputs, targets = self._common(test=False)
        chosen = torch.from_numpy(validation_part(self.settings, len(targets)))
        return inputs[chosen], targets[chosen]

    def local_test_data(self, node: Node) -> Data | None:
        # Of common rows every device has the test set.
        return None if node.data_path else self.test_data()

    def has_local_test_data(self, node: Node) -> bool:
        return not node.data_path and self._on_server

    def server_inputs(self) -> Tensor | None:
        if not self._on_server:
            return None
        inputs, _ = self._common(test=False)
        return inputs[torch.from_numpy(random_sample(self.settings, len(inputs), _SERVER_ROWS))]

    def example_inputs(self) -> Tensor:
        return torch.zeros(2, len(self._shape()[0]))

    def facts(self) -> Facts:
        options = self.options
        if not self._on_server:
            return {"columns": list(options.columns), "classes": list(options.classes)}
        table = self._table()
        columns = options.columns or [c for c in table.columns if c != options.label]
        classes = options.classes or sorted(set(table.labels))
        return {"columns": list(columns), "classes": list(classes)}

    def partition_size(self, partition_id: int, num_partitions: int) -> int | None:
        if not self._on_server:
            return None
        return len(self.examples(Node(partition_id, num_partitions)))

    @property
    def _on_server(self) -> bool:
        return bool(self.settings.data_dir) or not self.options.classes

    def _shape(self) -> tuple[list[str], list[str]]:
        """Return the columns and the classes: the server's."""
        facts = self.given or self.facts()
        columns, classes = facts.get("columns"), facts.get("classes")
        if not (isinstance(columns, list) and isinstance(classes, list)):
            raise SettingsError(f"task: the server says {dict(facts)}, which is no table")
        if not columns or len(classes) < 2:
            raise SettingsError(
                f"task-options: {len(columns)} columns and {len(classes)} classes; allowed: one "
                "column or more, and two classes or more"
            )
        return columns, classes

    def _table(self) -> Table:
        if self.settings.data_dir:
            return _read("data-dir", self.settings.data_dir, self.options.label)
        return _digits(self.options.label)

    def _common(self, test: bool) -> tuple[Tensor, Tensor]:
        inputs, targets = self._tensors(self._table())
        held = torch.arange(len(targets)) % _TEST_EVERY == _TEST_EVERY - 1
        return inputs[held == test], targets[held == test]

    def _tensors(self, table: Table) -> tuple[Tensor, Tensor]:
        """Return the server's columns in its order, and the places of the classes."""
        columns, classes = self._shape()
        if absent := [name for name in columns if name not in table.columns]:
            raise SettingsError(_odd("has no column", absent, table.columns))
        if unknown := sorted(set(table.labels) - set(classes)):
            raise SettingsError(
                _odd("has classes that the server does not have:", unknown, classes)
            )
        chosen = table.numbers(columns)
        places = torch.tensor([classes.index(label) for label in table.labels])
        return torch.from_numpy(chosen), places


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float, str)) else nan
    except ValueError:
        return nan


def _odd(what: str, names: Sequence[str], allowed: Sequence[str]) -> str:
    return f"task: the table {what} {', '.join(names[:5])}; allowed: {', '.join(allowed[:20])}"


@lru_cache(maxsize=4)
def _digits(label: str) -> Table:
    images = load_dataset(Settings(dataset="digits")).train
    values = tuple(images.pixels.reshape(len(images), -1).T)
    columns = tuple(f"pixel{i}" for i in range(len(values)))
    return Table(columns, values, tuple(map(str, images.labels.tolist())))


def _read(setting: str, path: str, label: str) -> Table:
    """Read a CSV or Parquet file, or the one of a folder."""
    return _read_file(setting, _file_in(setting, user_path(setting, path)), label)


@lru_cache(maxsize=4)
def _read_file(setting: str, place: Path, label: str) -> Table:
    import pandas as pd  # Half a second that only this needs.

    try:
        frame: Any = pd.read_parquet(place) if place.suffix == ".parquet" else pd.read_csv(place)
    except OSError as error:
        raise SettingsError(
            f"{setting}: {printable(place)} cannot be read: {reason(error)}"
        ) from None
    except Exception as error:  # A parser raises whatever it likes.
        raise SettingsError(
            f"{setting}: {printable(place)} is no table ({in_one_line(error)}); allowed: CSV in "
            "UTF-8, and Parquet"
        ) from None
    return _table_of(setting, place, frame, label)


def _file_in(setting: str, place: Path) -> Path:
    """Return the one table of a folder; anything else as it is."""
    if not place.is_dir():
        return place
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in (".csv", ".parquet"))
    if len(files) != 1:
        raise SettingsError(
            f"{setting}: {printable(place)} holds {len(files)} files *.csv and *.parquet; allowed: "
            "one, or the path of one"
        )
    return files[0]


def _table_of(setting: str, place: Path, frame: Any, label: str) -> Table:
    if label not in frame.columns:
        raise SettingsError(
            f"{setting}: {printable(place)} has no column {label!r} (task-options: label); its "
            f"columns are {', '.join(map(str, frame.columns[:20]))}"
        )
    if len(frame) < 2:
        raise SettingsError(
            f"{setting}: {printable(place)} has {len(frame)} rows; allowed: 2 or more"
        )
    if frame[label].isna().any():
        row = int(np.flatnonzero(frame[label].isna())[0]) + 1
        raise SettingsError(f"{setting}: {printable(place)} has no {label!r} in row {row}")
    columns = frame.drop(columns=label)
    values = tuple(columns[name].to_numpy() for name in columns)
    return Table(tuple(map(str, columns)), values, tuple(map(str, frame[label].tolist())))
