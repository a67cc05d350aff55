"""Runs of an experiment through `flwr run`, resumable run by run."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.plan import Experiment, Setting
from experiments.records import read_summary
from task.errors import SettingsError

PROJECT = Path(__file__).parents[1]
# Why a run ended that was stopped.
INTERRUPTED = "interrupted"

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 60


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


def planned_runs(
    experiment: Experiment, output_dir: Path, overrides: dict[str, Setting]
) -> list[PlannedRun]:
    """List the runs: everything under the first seed, then under the next.

    A system that overrides what tells two scenarios apart runs once for both: the runs of equal
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
    if not (PROJECT / "pyproject.toml").is_file():
        raise SettingsError(f"{PROJECT} is no checkout of prowd; install it with pip install -e .")
    settings = {**run.settings, "output-dir": str(run.folder.parent), "run-name": run.folder.name}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    command = [flwr_program(), "run", str(PROJECT), "--stream", "--run-config", config]
    command += ["--federation-config", federation] if federation else []
    log = run.folder.parent / f"{run.folder.name}.log"
    with ExitStack() as until_taken:
        until_taken.enter_context(starting)
        if stop.is_set():
            return INTERRUPTED
        if run.folder.exists():
            if _is_written(run.folder):
                return f"another process is writing {run.folder}"
            _move_aside(run.folder)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        # Others may start as soon as Flower has this one.
        if stopped := _follow(command, log, run.folder, stop, until_taken.close):
            return stopped
    if run.completed:
        return ""
    # flwr's exit code is 0 for a failed run too; the run's own record knows.
    return read_summary(run.folder).reason or f"{_last_line(log)} ({log})"


def _follow(
    command: Sequence[str],
    log: Path,
    folder: Path,
    stop: threading.Event,
    when_taken: Callable[[], None],
) -> str:
    """Run `flwr run` to its end; return how it was stopped, empty if it was not."""
    # In a session of its own, so that Ctrl-C does not end it before its run is stopped.
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        taken = False
        try:
            while process.poll() is None:
                if stop.wait(_SECONDS_BETWEEN_LOOKS):
                    return _stop(process, log, folder)
                if not taken and _run_id(log):
                    taken = True
                    when_taken()
        except BaseException:
            _stop(process, log, folder)
            raise
    return ""


def flwr_program() -> str:
    """Return the `flwr` beside this Python, or else the one on the PATH."""
    return shutil.which("flwr", path=str(Path(sys.executable).parent)) or "flwr"


def unique(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs, of each folder the first."""
    first: dict[Path, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.folder, run)
    return list(first.values())


def pending(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that have not completed, each folder once."""
    return [run for run in unique(runs) if not run.completed]


def _stop(process: subprocess.Popen, log: Path, folder: Path) -> str:
    """End a run, which goes on where `flwr run` alone is ended; return how that went."""
    _wait_until(lambda: process.poll() is not None or bool(_run_id(log)))
    run_id = _run_id(log)
    stopped = not run_id
    if run_id:
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [flwr_program(), "stop", run_id],
                capture_output=True,
                check=False,
                timeout=_SECONDS_TO_STOP,
            )
            stopped = done.returncode == 0
    process.terminate()
    # So that the same run can begin anew at once.
    if stopped and _wait_until(lambda: not folder.exists() or not _is_written(folder)):
        return INTERRUPTED
    return f"{INTERRUPTED}, and may still run: flwr stop {run_id}"


def _run_id(log: Path) -> str:
    """Return the number that Flower gave the run, empty before."""
    found = re.search(r"started run (\d+)", log.read_text(errors="replace"))
    return found[1] if found else ""


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_STOP
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def _last_line(log: Path) -> str:
    """Return what flwr said last; it frames its errors."""
    lines = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", "", log.read_text(errors="replace")).splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "flwr said nothing"


def _is_written(folder: Path) -> bool:
    from server_app.record import locked  # Takes seconds to import.

    try:
        with locked(folder):
            return False
    except SettingsError:
        return True


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.broken{number}")).exists():
        number += 1
    folder.rename(aside)
