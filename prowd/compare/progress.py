"""What the runs of a comparison are doing, and how long they may still take."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from statistics import mean

from core.mix import width_name
from prowd.compare.runs import PlannedRun
from prowd.records import read_record


class State(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """One run as it stands.

    Attributes
    ----------
    name : str
        Of its folder.
    state : State
        Where it stands.
    reason : str
        Why it failed.
    rounds, num_rounds : int
        Done, and asked for; the latter 0 where it is not known yet.
    seconds : float
        Time that these rounds took.
    accuracy : mapping of str to float
        Of the last round that was evaluated, in 0..1, by width and "average".
    around : float or None
        Time that a run of this session took besides: Flower's start, and the loading of data.
    """

    name: str
    state: State
    reason: str = ""
    rounds: int = 0
    num_rounds: int = 0
    seconds: float = 0.0
    accuracy: Mapping[str, float] = field(default_factory=dict)
    around: float | None = None

    def scores(self) -> str:
        """Return the accuracies, the average first."""
        ranked = sorted(self.accuracy, key=lambda width: width != "average")
        return " ".join(f"{width_name(width)} {self.accuracy[width]:.2%}" for width in ranked)


class Watch:
    """Knows of every run how it stands; runs begin and end in any thread.

    Parameters
    ----------
    runs : sequence of PlannedRun
        All of them.
    waiting : sequence of PlannedRun
        Those that have not completed.
    """

    def __init__(self, runs: Sequence[PlannedRun], waiting: Sequence[PlannedRun]) -> None:
        self._lock = threading.Lock()
        self._progress = {run.folder: _read(run, State.DONE) for run in runs}
        for run in waiting:
            self._progress[run.folder] = Progress(
                run.folder.name, State.WAITING, num_rounds=_asked(run)
            )
        self._running: dict[Path, PlannedRun] = {}
        self._began: dict[Path, float] = {}

    def begin(self, run: PlannedRun) -> None:
        """Note that a run begins."""
        with self._lock:
            self._running[run.folder] = run
            self._began[run.folder] = time.monotonic()

    def end(self, run: PlannedRun, reason: str) -> Progress:
        """Note that a run has ended, and why it failed if it did; return how it stands."""
        ended = _read(run, State.FAILED if reason else State.DONE, reason)
        with self._lock:
            took = time.monotonic() - self._began[run.folder]
            ended = replace(ended, around=max(0.0, took - ended.seconds))
            del self._running[run.folder]
            self._progress[run.folder] = ended
        return ended

    def now(self) -> list[Progress]:
        """Return how every run stands, in the order of the plan."""
        with self._lock:
            running, progress = list(self._running.values()), dict(self._progress)
        progress |= {run.folder: _read(run, State.RUNNING) for run in running}
        return list(progress.values())


def seconds_left(runs: Sequence[Progress], jobs: int) -> float | None:
    """Estimate from finished rounds how long the runs take that are not done; None: not known yet.

    A run's own rounds tell how long its next ones take; of one that has none, those of all do, and
    it begins as those began that have ended.
    """
    finished = sum(run.rounds for run in runs)
    if not finished:
        return None
    usual = sum(run.seconds for run in runs) / finished
    most = max(run.num_rounds for run in runs)
    around = [run.around for run in runs if run.around is not None and run.rounds]
    start = mean(around) if around else 0.0

    def left(run: Progress) -> float:
        rounds = (run.num_rounds or most) - run.rounds
        if run.rounds:
            return run.seconds / run.rounds * rounds
        return start + usual * rounds

    lefts = [left(run) for run in runs if run.state in (State.WAITING, State.RUNNING)]
    return max([sum(lefts) / jobs, *lefts], default=0.0)


def _asked(run: PlannedRun) -> int:
    """Return for how many rounds a run is asked; 0 if that is left to the default."""
    asked = run.settings.get("num-server-rounds")
    return asked if isinstance(asked, int) else 0


def _read(run: PlannedRun, state: State, reason: str = "") -> Progress:
    record = read_record(run.folder, weights=False)
    num_rounds = _asked(run) or record.num_rounds
    known = Progress(run.folder.name, state, reason, num_rounds=num_rounds)
    return replace(
        known,
        rounds=len(record.rounds),
        seconds=sum(entry.seconds.get("round", 0.0) for entry in record.rounds),
        accuracy=next((e.accuracy for e in reversed(record.rounds) if e.accuracy), {}),
    )
