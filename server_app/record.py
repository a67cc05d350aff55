"""The run record: the only writer of what a run leaves behind."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from task.errors import SettingsError

_PACKAGES = ("prowd", "flwr", "torch", "torchvision", "numpy", "pydantic", "ray", "flwr-datasets")


class RunExistsError(SettingsError):
    """There is a run of this name already."""


class RunRecord:
    """Folder of one run.

    Parameters
    ----------
    folder : Path
        Made here; must not exist.

    Raises
    ------
    RunExistsError
        If the folder exists.
    SettingsError
        If it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(
                f"run-name: {folder} exists already; choose another name or leave it empty"
            ) from None
        except OSError as error:
            raise SettingsError(f"output-dir: {folder} cannot be made: {error}") from None
        self._best: dict[str, float] = {}
        self._last: dict[str, object] = {}
        self._uplink = self._downlink = 0
        self._started = datetime.now().astimezone()
        self._board = None
        self.write_summary("running")

    def write_config(self, settings: Mapping[str, object]) -> None:
        """Write every setting as validated, and what it runs on."""
        self._write_json(
            "config.json",
            {
                "settings": dict(settings),
                "date": self._started.isoformat(timespec="seconds"),
                "versions": {"python": platform.python_version(), **_versions()},
                "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            },
        )

    def append_round(self, entry: Mapping[str, object]) -> None:
        """Append one round to rounds.jsonl and to TensorBoard."""
        with open(self.folder / "rounds.jsonl", "a") as file:
            file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
        self._uplink += sum(entry["uplink_bytes"].values())
        self._downlink += sum(entry["downlink_bytes"].values())
        self._last = dict(entry)
        accuracy = entry.get("accuracy") or {}
        for width, value in accuracy.items():
            self._best[width] = max(value, self._best.get(width, 0.0))
        self._to_board(entry)

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        """Write the float32 global model."""
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        partial = self.folder / "model.safetensors.part"
        save_file(tensors, partial)
        os.replace(partial, self.folder / "model.safetensors")

    def write_summary(self, status: str, reason: str = "") -> None:
        """Write how the run stands: running, completed or failed, and why."""
        summary = {
            "status": status,
            "reason": reason,
            "rounds": self._last.get("round", 0),
            "accuracy": {"final": self._last.get("accuracy") or {}, "best": self._best},
            "loss": {"final": self._last.get("loss") or {}},
            "uplink_bytes": self._uplink,
            "downlink_bytes": self._downlink,
            "seconds": (datetime.now().astimezone() - self._started).total_seconds(),
        }
        self._write_json("summary.json", summary)
        if status != "running" and self._board is not None:
            self._board.close()

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        partial = self.folder / f"{name}.part"
        partial.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
        os.replace(partial, self.folder / name)

    def _to_board(self, entry: Mapping[str, object]) -> None:
        if self._board is None:
            # Here, because its import takes seconds that a refused run need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        step = entry["round"]
        for tag, value in _flatten(entry):
            if tag != "round":
                self._board.add_scalar(tag, value, step)
        self._board.flush()


def open_record(output_dir: str, run_name: str, strategy: str, dataset: str) -> RunRecord:
    """Make the record of a run under its name or, without one, under strategy, data and time."""
    base = Path(output_dir).expanduser()
    if run_name:
        return RunRecord(base / run_name)
    stem = f"{strategy}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        try:
            return RunRecord(base / (stem if attempt == 1 else f"{stem}-{attempt}"))
        except RunExistsError:
            continue  # Two runs may begin in one second.
    raise SettingsError(f"output-dir: {base} holds a hundred runs of this second")


def _finite(value: object) -> object:
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flatten(entry: Mapping[str, object], prefix: str = ""):
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value
