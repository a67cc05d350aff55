"""The run record: what a run leaves behind; its checkpoint is `server_app.checkpoint`'s."""

import json
import os
import platform
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from core.errors import SettingsError
from core.files import printable, read_regular, reason, user_path, write_atomic
from core.run_record import CONFIG, MODEL, ROUNDS, SUMMARY, WEIGHTS
from server_app.board import Board
from server_app.folder import RunExistsError, make_folder, read_json, writing
from server_app.plain import to_json
from server_app.unused import UnusedRounds

_PACKAGES = ("prowd", "flwr", "torch", "torchvision", "numpy", "pydantic", "ray", "flwr-datasets")


class RunEnded(Exception):
    """How the run ended has been written already, in another thread."""


class RunRecord:
    """Folder of one run.

    Parameters
    ----------
    folder : Path
        Made here and must not exist, but for a run that is resumed.
    resumed_after : int, optional
        Resume in this folder after so many rounds; later ones are dropped, as they will come again.
    seconds : float
        Time that those rounds took.

    Attributes
    ----------
    short_rounds : int
        Rounds so far that continued without a client that was asked.
    dropped_rounds : int
        Rounds so far whose result was dropped.
    spent : list of mapping
        What each round with differential privacy has written of it (`server_app.account`).
    unused : UnusedRounds
        The rounds since the last one whose result was used.
    round_begun : int
        The last round that was begun; 0 before the first.

    Raises
    ------
    RunExistsError
        If the folder exists.
    SettingsError
        If it cannot be made; or, to resume, if rounds or settings are missing.
    """

    def __init__(
        self, folder: Path, resumed_after: int | None = None, seconds: float = 0.0
    ) -> None:
        self.folder = folder
        if resumed_after is None:
            make_folder(folder)
        self._metrics: dict[str, list[float]] = {}
        self._best_of: Callable[[list[float]], float] = max
        self._last: dict[str, Any] = {}
        self._uplink = self._downlink = 0
        self.short_rounds = self.dropped_rounds = 0
        self.unused = UnusedRounds()
        self.spent: list[Mapping[str, Any]] = []
        self.round_begun = 0
        self._ended = False
        self._lock = threading.RLock()
        self._started = datetime.now().astimezone()
        self._seconds_before = seconds
        self._board = Board(folder / "tensorboard", resumed_after)
        self._config_before: dict[str, Any] = {}
        self._resumed_after = resumed_after
        if resumed_after is not None:
            # Read before anything is rewritten.
            self._config_before = read_json(folder / CONFIG)
            self._recount(resumed_after)
        self.write_summary("running")

    @property
    def seconds(self) -> float:
        """Time that the run has taken; what a crash lost is left out."""
        passed = datetime.now().astimezone() - self._started
        return self._seconds_before + passed.total_seconds()

    def write_config(
        self, settings: Mapping[str, object], chosen: Mapping[str, str] | None = None
    ) -> None:
        """Write every setting as validated, what the strategy chose, and what it runs on.

        All of it before each resume stays.
        """
        if (chosen or {}).get("better") == "lower":
            self._best_of = min
        date = self._started.isoformat(timespec="seconds")
        config: dict[str, Any] = {
            "settings": dict(settings),
            "chosen": dict(chosen or {}),
            "date": date,
            "versions": {"python": platform.python_version(), **versions()},
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        }
        if self._resumed_after is not None:
            before = dict(self._config_before)
            earlier = before.pop("earlier", [])
            config |= {"resumed_after": self._resumed_after, "earlier": [*earlier, before]}
        self._write_json(CONFIG, config)

    def append_round(
        self,
        entry: Mapping[str, object],
        weights: Mapping[str, object] | None = None,
        totals: Mapping[str, float] | None = None,
    ) -> None:
        """Append one round to rounds.jsonl and to TensorBoard.

        Parameters
        ----------
        entry : mapping
            The round.
        weights : mapping, optional
            Its `WeightDistributions` (`strategies.prowd`), for weights.jsonl and TensorBoard.
        totals : mapping, optional
            What TensorBoard shows besides, by its tag.

        Raises
        ------
        RunEnded
            If it has been written how the run ended.
        """
        self._refuse_if_ended()
        # Before anything is written: what a strategy reports may be what no file can hold.
        # Only what is the strategy's own can be so, which stands under its name.
        written = {key: to_json(value, f"strategy: {key}") for key, value in entry.items()}
        if weights:
            seen = {"round": entry["round"], **weights}
            self._append(WEIGHTS, to_json(seen, WEIGHTS))
        self._append(ROUNDS, written)
        self._count(written)
        with writing(self.folder / "tensorboard"):
            self._board.add_round(written, weights or {}, totals or {})

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        """Write the float32 global model."""
        # Each of its own memory: the file holds none that layers share.
        tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        self._write(MODEL, save(tensors))

    def write_summary(self, status: str, reason: str = "") -> None:
        """Write how the run stands: running, completed or failed, and why.

        Raises
        ------
        RunEnded
            If it has ended: what ended it first is what is written.
        """
        with self._lock:
            self._refuse_if_ended()
            self._write_json(SUMMARY, self._summary(status, reason))
            self._ended = status != "running"

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise RunEnded

    def _summary(self, status: str, reason: str) -> dict[str, Any]:
        best = {width: self._best_of(values) for width, values in self._metrics.items()}
        return {
            "status": status,
            "reason": reason,
            "rounds": self._last.get("round", 0),
            "accuracy": {"final": self._last.get("accuracy") or {}, "best": best},
            "loss": {"final": self._last.get("loss") or {}},
            "uplink_bytes": self._uplink,
            "downlink_bytes": self._downlink,
            "seconds": self.seconds,
            **({"privacy": self.spent[-1]} if self.spent else {}),
        }

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        self._board.close()

    def _recount(self, rounds: int) -> None:
        """Count the rounds of the checkpoint again, and drop what was written after it."""
        path = self.folder / ROUNDS
        try:
            lines = read_regular(path).decode().splitlines()[:rounds] if rounds else []
            entries = [json.loads(line) for line in lines]
            if [entry["round"] for entry in entries] != list(range(1, rounds + 1)):
                raise ValueError("a round is missing")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SettingsError(
                f"resume: {printable(path)} does not hold the {rounds} rounds of the checkpoint: "
                f"{reason(error)}"
            ) from None
        for entry in entries:
            self._count(entry)
        self._write(ROUNDS, "".join(f"{line}\n" for line in lines).encode())
        weights = self.folder / WEIGHTS
        if weights.exists():
            with writing(weights):
                kept = [line for line in read_regular(weights).splitlines() if _is_of(line, rounds)]
            self._write(WEIGHTS, b"".join(line + b"\n" for line in kept))

    def _count(self, entry: Mapping[str, Any]) -> None:
        self._uplink += sum(entry["uplink_bytes"].values())
        self._downlink += sum(entry["downlink_bytes"].values())
        self.short_rounds += bool(entry.get("left_out"))
        self.dropped_rounds += bool(entry.get("dropped"))
        self.unused.add(entry)
        if "privacy" in entry:
            self.spent.append(entry["privacy"])
        self._last = dict(entry)
        for width, value in (entry.get("accuracy") or {}).items():
            if value is not None and isfinite(value):
                self._metrics.setdefault(width, []).append(value)

    def _append(self, name: str, entry: object) -> None:
        path = self.folder / name
        with writing(path), open(path, "a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        text = json.dumps(to_json(content, name), indent=2, allow_nan=False) + "\n"
        self._write(name, text.encode())

    def _write(self, name: str, data: bytes) -> None:
        with writing(self.folder / name):
            write_atomic(self.folder / name, data)


def open_record(output_dir: str, run_name: str, strategy: str, dataset: str) -> RunRecord:
    """Make the record of a run under its name or, without one, under strategy, data and time."""
    base = user_path("output-dir", output_dir)
    if run_name:
        return RunRecord(base / run_name)
    stem = f"{strategy}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        try:
            return RunRecord(base / (stem if attempt == 1 else f"{stem}-{attempt}"))
        except RunExistsError:
            continue  # Two runs may begin in one second.
    raise SettingsError(f"output-dir: {printable(base)} holds a hundred runs of this second")


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of prowd and of what it runs on, by package."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _is_of(line: bytes, rounds: int) -> bool:
    """Whether a line holds one of the first rounds; one that was torn does not."""
    try:
        return bool(json.loads(line)["round"] <= rounds)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
