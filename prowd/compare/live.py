"""The runs of a comparison in the terminal: a line a run that is kept up to date.

Where there is no terminal, a line is printed when a run begins, and one when it ends. `flwr` itself
writes into each run's log, so that nothing else appears between.
"""

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from core.clock import clock
from core.mix import width_name
from prowd.compare.plan import Experiment
from prowd.compare.runs import INTERRUPTED, PlannedRun, execute, pending, unique
from prowd.records import read_record

# The states of a run, what is worth most first: a terminal shows as many lines as it has. The line
# of all runs has none.
_STYLES = {"": "none", "running": "bold", "failed": "bold red", "waiting": "dim", "done": "green"}


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended.

    Attributes
    ----------
    failures : dict of str to str
        By name of the run, why it failed.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    failures: dict[str, str]
    interrupted: bool


def run_all(experiment: Experiment, runs: Sequence[PlannedRun], jobs: int) -> Outcome:
    """Run what has not completed and show how it goes.

    Parameters
    ----------
    experiment : Experiment
        Its title and federation.
    runs : sequence of PlannedRun
        All runs.
    jobs : int
        Runs at a time.
    """
    waiting, all_runs = pending(runs), unique(runs)
    print(f"{experiment.title}: {len(all_runs) - len(waiting)} of {len(all_runs)} runs are done")
    board = Board(experiment.title, all_runs, waiting)
    # Rich takes any file for a terminal where FORCE_COLOR is set.
    terminal = sys.stdout.isatty() and not board.live.console.is_dumb_terminal and bool(waiting)
    failures: dict[str, str] = {}
    stop, starting = threading.Event(), threading.Lock()

    def say(line: str) -> None:
        if not terminal:
            print(line, flush=True)

    def run_one(number: int, run: PlannedRun) -> None:
        name = f"[{number}/{len(waiting)}] {run.folder.name}"
        say(f"{name} ...")
        began = time.monotonic()
        board.begin(run)
        try:
            reason = execute(run, experiment.federation, stop, starting)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        if reason and reason != INTERRUPTED:
            failures[run.folder.name] = reason
        said = board.end(run, reason)
        if not reason:
            said = f"after {clock(time.monotonic() - began)} | {said or 'not evaluated'}"
        say(f"{name}: {'failed:' if reason else 'done'} {said}")

    with board.live if terminal else nullcontext(), ThreadPoolExecutor(jobs) as pool:
        going = [pool.submit(run_one, number, run) for number, run in enumerate(waiting, 1)]
        try:
            for one in going:
                one.result()
        except BaseException as error:
            stop.set()
            say("stopping ...")
            pool.shutdown(cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
    return Outcome(failures, interrupted=stop.is_set())


class Board:
    """A line a run: where it stands, its round, accuracy or why it failed, and the time left.

    Runs begin and end in any thread.

    Parameters
    ----------
    title : str
        What is compared: the name of the line of all runs.
    runs, waiting : sequence of PlannedRun
        All of them, and those that have not completed.
    """

    def __init__(
        self, title: str, runs: Sequence[PlannedRun], waiting: Sequence[PlannedRun]
    ) -> None:
        self._lock = threading.RLock()
        self._running: list[PlannedRun] = []
        # From all rounds of a run: one may take minutes.
        console = Console()
        self._progress = Progress(
            *_columns(), console=console, expand=True, speed_estimate_period=math.inf
        )
        self._all = self._add(title, sum(run.num_rounds for run in waiting))
        self._of = {run.folder: self._add(run.folder.name, run.num_rounds) for run in runs}
        self._waiting = [self._of[run.folder] for run in waiting]
        for run in runs:
            if run not in waiting:
                self._note(run, "done")
        self._progress.start_task(self._all.id)
        self.live = Live(get_renderable=self._table, console=console, refresh_per_second=1)

    def _add(self, name: str, rounds: int) -> Task:
        self._progress.add_task(name, start=False, total=rounds, rounds=rounds)
        task = self._progress.tasks[-1]
        task.fields |= {"state": "waiting", "style": _STYLES["waiting"], "said": ""}
        return task

    def begin(self, run: PlannedRun) -> None:
        """Note that a run begins."""
        with self._lock:
            self._progress.start_task(self._of[run.folder].id)
            self._running.append(run)

    def end(self, run: PlannedRun, reason: str) -> str:
        """Note that a run has ended, and why it failed if it did; return that or its accuracy."""
        with self._lock:
            self._running.remove(run)
            return self._note(run, "failed" if reason else "done", reason)

    def _table(self) -> Table:
        """Return all lines; what matters less comes last, where a terminal may cut it off."""
        ranks = list(_STYLES)
        with self._lock:
            for run in self._running:
                self._note(run, "running")
            self._note_all()
            tasks = sorted(self._progress.tasks, key=lambda task: ranks.index(task.fields["state"]))
            table = self._progress.make_tasks_table(tasks)
        table.show_header = True
        return table

    def _note(self, run: PlannedRun, state: str, reason: str = "") -> str:
        rounds, task = read_record(run.folder, weights=False).rounds, self._of[run.folder]
        said = reason or scores(next((e.accuracy for e in reversed(rounds) if e.accuracy), {}))
        style = _STYLES[state]
        self._progress.update(task.id, completed=len(rounds), state=state, style=style, said=said)
        if reason:
            task.total = None  # No time is left.
        return said

    def _note_all(self) -> None:
        counts = Counter(task.fields["state"] for task in self._of.values())
        said = ", ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state])
        completed = sum(task.completed for task in self._waiting)
        self._progress.update(
            self._all.id, completed=completed, state="", style=_STYLES[""], said=said
        )
        # A run that failed has no more rounds.
        self._all.total = sum(
            task.completed if task.total is None else task.total for task in self._waiting
        )


def _columns() -> Iterator[ProgressColumn]:
    def text(field: str, head: str, markup: bool = False, **column: Any) -> TextColumn:
        return TextColumn(field, markup=markup, table_column=Column(head, **column))

    slim: Any = {"justify": "right", "no_wrap": True}
    yield text("{task.description}", "run", ratio=4, overflow="fold")
    yield text("[{task.fields[style]}]{task.fields[state]}", "", markup=True, no_wrap=True)
    yield text("{task.completed}/{task.fields[rounds]}", "round", **slim)
    yield text("{task.fields[said]}", "accuracy, or reason", ratio=5, overflow="fold")
    yield TimeRemainingColumn(compact=True, table_column=Column("left", **slim))


def scores(accuracy: Mapping[str, float]) -> str:
    """Write the accuracies of a round, the average first."""
    ranked = sorted(accuracy, key=lambda width: width != "average")
    return " ".join(f"{width_name(width)} {accuracy[width]:.2%}" for width in ranked)
