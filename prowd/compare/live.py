"""The runs of a comparison in the terminal: a table that lives, or plain lines where there is none.

`flwr` itself writes into each run's log, so that nothing else appears between.
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.clock import clock
from prowd.compare.plan import Experiment
from prowd.compare.progress import Progress, State, Watch, seconds_left
from prowd.compare.runs import INTERRUPTED, PlannedRun, execute, pending, unique

_STYLES = {
    State.WAITING: "dim",
    State.RUNNING: "bold",
    State.DONE: "green",
    State.FAILED: "bold red",
}
# What is left out first where a terminal has fewer lines than there are runs.
_WORTH = (State.RUNNING, State.FAILED, State.WAITING, State.DONE)
_SECONDS_BETWEEN_LOOKS = 1.0


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
    watch = Watch(all_runs, waiting)
    terminal = is_terminal() and bool(waiting)
    failures: dict[str, str] = {}
    stop, starting = threading.Event(), threading.Lock()

    def say(line: str) -> None:
        if not terminal:
            print(line, flush=True)

    def run_one(number: int, run: PlannedRun) -> None:
        name = f"[{number}/{len(waiting)}] {run.folder.name}"
        say(f"{name} ...")
        watch.begin(run)
        try:
            reason = execute(run, experiment.federation, stop, starting)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        if reason and reason != INTERRUPTED:
            failures[run.folder.name] = reason
        say(f"{name}: {ended(watch.end(run, reason))}")

    shown = _shown(experiment.title, watch, jobs) if terminal else nullcontext()
    with shown, ThreadPoolExecutor(jobs) as pool:
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


def is_terminal() -> bool:
    """Return whether a table can live on the standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")


def ended(run: Progress) -> str:
    """Return how a run ended, on one line."""
    if run.state is State.FAILED:
        return f"failed: {run.reason}"
    took = run.seconds + (run.around or 0.0)
    return f"done after {clock(took)} | {run.scores() or 'not evaluated'}"


def make_table(title: str, runs: Sequence[Progress], jobs: int, most: int | None = None) -> Table:
    """Return the table of all runs, or of the `most` that are worth most; in the plan's order."""
    ranked = sorted(range(len(runs)), key=lambda i: _WORTH.index(runs[i].state))
    chosen = [runs[i] for i in sorted(ranked[:most])]
    table = Table(
        title=Text(title), caption=_summed_up(runs, jobs), box=box.SIMPLE_HEAD, expand=True
    )
    table.add_column("run", ratio=4, overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("accuracy, or reason", ratio=5, overflow="fold")
    table.add_column("left", justify="right", no_wrap=True)
    for run in chosen:
        left = seconds_left([run], 1) if run.state is State.RUNNING else None
        table.add_row(
            Text(run.name),
            Text(run.state.value, _STYLES[run.state]),
            Text(f"{run.rounds}/{run.num_rounds}" if run.num_rounds else ""),
            Text(run.reason or run.scores()),
            Text("" if left is None else clock(left)),
        )
    return table


def fitting_table(title: str, runs: Sequence[Progress], jobs: int, console: Console) -> Table:
    """Return the table of as many runs as a terminal shows at once."""
    most = len(runs)
    while True:
        table = make_table(title, runs, jobs, most)
        # The cursor has a line of its own.
        above = len(console.render_lines(table, pad=False)) + 1 - console.size.height
        if above <= 0 or most == 1:
            return table
        most = max(1, most - above)


def _summed_up(runs: Sequence[Progress], jobs: int) -> Text:
    counts = Counter(run.state for run in runs)
    said = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    left = seconds_left(runs, jobs)
    going = counts[State.WAITING] + counts[State.RUNNING]
    return Text(f"{said}; about {clock(left)} left" if going and left is not None else said)


@contextmanager
def _shown(title: str, watch: Watch, jobs: int) -> Iterator[None]:
    """Keep the table up to date meanwhile; at the end it has every run."""
    console = Console(force_terminal=True)
    over = threading.Event()

    def fitting() -> Table:
        return fitting_table(title, watch.now(), jobs, console)

    with Live(fitting(), console=console, auto_refresh=False) as live:
        looking = threading.Thread(target=_look, args=(live, fitting, over), daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()
            live.update(make_table(title, watch.now(), jobs), refresh=True)


def _look(live: Live, table: Callable[[], Table], over: threading.Event) -> None:
    while not over.wait(_SECONDS_BETWEEN_LOOKS):
        live.update(table(), refresh=True)
