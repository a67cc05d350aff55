"""Runs of an experiment through `flwr run`, resumable run by run."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from core.errors import SettingsError
from core.files import is_locked
from core.settings import Settings
from prowd.compare.plan import Experiment, Setting
from prowd.records import read_summary

PROJECT = Path(__file__).parents[2]
# Why a run ended that was stopped.
INTERRUPTED = "interrupted"

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_STREAMS = 1.0
_SECONDS_TO_STOP = 60
_FLWR = (sys.executable, "-m", "prowd.compare.patient_flwr")
# Ray gives its own processes 30 seconds to start, which a loaded machine may miss.
_TOO_SLOW, _MOST_STARTS = "timed out during startup", 3
# Flower's words for a run that has not ended.
_GOING_ON = ("pending", "starting", "running")


@dataclass(frozen=True)
class PlannedRun:
    """One system in one scenario under one seed.

    Attributes
    ----------
    scenario, system : str
        Names in the experiment file.
    seed : int
        Its seed.
    folder : Path
        Its run record.
    settings : dict
        Everything that is set for it.
    """

    scenario: str
    system: str
    seed: int
    folder: Path
    settings: dict[str, Setting]

    @property
    def completed(self) -> bool:
        """Whether the run is done and need not be run again."""
        return read_summary(self.folder).status == "completed"

    @property
    def num_rounds(self) -> int:
        """How many rounds it is asked for."""
        default = Settings.model_fields["num_server_rounds"].default
        asked = self.settings.get("num-server-rounds", default)
        return asked if isinstance(asked, int) else 0


def planned_runs(
    experiment: Experiment, output_dir: Path, overrides: dict[str, Setting]
) -> list[PlannedRun]:
    """List the runs: everything under the first seed, then under the next.

    A system that overrides what distinguishes two scenarios runs once for both: the runs of equal
    settings share one folder.
    """
    runs: list[PlannedRun] = []
    folders: dict[str, Path] = {}
    for seed in experiment.seeds:
        for scenario, federation in experiment.scenarios.items():
            for system, own in experiment.systems.items():
                settings = {**experiment.settings, **federation, **own, **overrides, "seed": seed}
                name = output_dir / f"{scenario}-{system}-seed{seed}"
                folder = folders.setdefault(json.dumps(settings, sort_keys=True), name)
                runs.append(PlannedRun(scenario, system, seed, folder, settings))
    return runs


def execute(
    run: PlannedRun, federation: str, stop: threading.Event, starting: threading.Lock
) -> str:
    """Run one through `flwr run` and return why it failed, empty if it completed.

    What an earlier, broken attempt left is moved aside, not deleted. Once `stop` is set, the run
    is stopped, as it is if waiting for it is. `starting` is held until Flower has taken the run:
    the first one starts the local SuperLink, and a second one beside it would try that too.
    """
    for _ in range(_MOST_STARTS):
        reason = _execute(run, federation, stop, starting)
        if _TOO_SLOW not in reason:
            break
    return reason


def _execute(
    run: PlannedRun, federation: str, stop: threading.Event, starting: threading.Lock
) -> str:
    if not (PROJECT / "pyproject.toml").is_file():
        raise SettingsError(f"{PROJECT} is no checkout of prowd; install it with pip install -e .")
    settings = {**run.settings, "output-dir": str(run.folder.parent), "run-name": run.folder.name}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    command = ["run", str(PROJECT), "--run-config", config]
    command += ["--federation-config", federation] if federation else []
    with starting:
        if stop.is_set():
            return INTERRUPTED
        if run.folder.exists():
            if is_locked(run.folder):
                return f"another process is writing {run.folder}"
            _move_aside(run.folder)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        started = ask_flower(*command)
    if not started.get("success"):
        return f"flwr run: {_complaint(started)}"
    run_id = str(started["run-id"])
    log = run.folder.parent / f"{run.folder.name}.log"
    with open(log, "w") as file:
        print(f"prowd: Flower's run {run_id}", file=file, flush=True)
        # Its stream ends with a connection too: then it begins again.
        while True:
            if stopped := _follow(run_id, file, run.folder, stop):
                return stopped
            summary = read_summary(run.folder)
            if summary.status == "completed":
                return ""
            if summary.status == "failed":
                return summary.reason
            status, details = _as_flower_sees_it(run_id)
            if status not in _GOING_ON:
                return f"Flower's status of it is {status}: {details} ({log})"
            stop.wait(_SECONDS_BETWEEN_STREAMS)


def _follow(run_id: str, log: TextIO, folder: Path, stop: threading.Event) -> str:
    """Write what a run logs, to its end; return how it was stopped, empty if it was not."""
    # In a session of its own, so that Ctrl-C does not end it before its run is stopped.
    with subprocess.Popen(
        [*_FLWR, "log", run_id, "--stream"],
        env=_environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            while process.poll() is None:
                if stop.wait(_SECONDS_BETWEEN_LOOKS):
                    return _stop(run_id, process, folder)
        except BaseException:
            _stop(run_id, process, folder)
            raise
    return ""


def ask_flower(*arguments: str, timeout: float | None = None) -> dict[str, Any]:
    """Call `flwr` and return what it answers in JSON: ``success``, and more or ``error-message``.

    Raises
    ------
    OSError
        If there is no `flwr`.
    subprocess.TimeoutExpired
        If it takes too long.
    """
    done = subprocess.run(
        [*_FLWR, *arguments, "--format", "json"],
        # Colours would be in the JSON.
        env={**_environment(), "NO_COLOR": "1", "FORCE_COLOR": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        start_new_session=True,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    said = (done.stdout + done.stderr).split()
    return {"success": False, "error-message": " ".join(said) or f"exit code {done.returncode}"}


def _complaint(answer: Mapping[str, Any]) -> str:
    return " ".join(str(answer.get("error-message", "no reason given")).split())


def _as_flower_sees_it(run_id: str) -> tuple[str, str]:
    """Return Flower's status of a run, and its details."""
    answer = ask_flower("ls", "--run-id", run_id)
    found = answer.get("runs") or [{}]
    status = str(found[0].get("status", "unknown"))
    return status, str(found[0].get("status-details", _complaint(answer)))


def _environment() -> dict[str, str]:
    """Return the environment in which Flower finds its other programs, beside this Python."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return {**os.environ, "PATH": os.pathsep.join(folders)}


def unique(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs, of each folder the first."""
    first: dict[Path, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.folder, run)
    return list(first.values())


def pending(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that have not completed, each folder once."""
    return [run for run in unique(runs) if not run.completed]


def _stop(run_id: str, process: subprocess.Popen[bytes], folder: Path) -> str:
    """End a run, which continues where what follows it is ended; return how that went."""
    stopped = False
    with suppress(subprocess.TimeoutExpired):
        stopped = bool(ask_flower("stop", run_id, timeout=_SECONDS_TO_STOP).get("success"))
    process.terminate()
    # So that the same run can begin again at once.
    if stopped and _wait_until(lambda: not folder.exists() or not is_locked(folder)):
        return INTERRUPTED
    return f"{INTERRUPTED}, and may still run: flwr stop {run_id}"


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_STOP
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.broken{number}")).exists():
        number += 1
    folder.rename(aside)
