"""Runs that are killed with signal 9 and resumed until they are done, beside one left in peace.

A program of its own: ``python killing.py FOLDER``, with the project and its tests on PYTHONPATH.
It reads jobs as JSON: by name, a number of kills and a run configuration. It writes
``FOLDER/<name>/whole`` and ``.../broken``, and prints the attempts of the broken run by name. The
imports, which take most of a short run, happen once: each attempt is a process forked from this
one, which runs nothing itself.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401
from federation import ClientAppNode, SimulatedGrid
from flwr.app import Context, RecordDict

import client_app.app  # noqa: F401
import server_app.app
import server_app.rounds
import server_app.run
from core.settings import Settings
from server_app.checkpoint import read_checkpoint
from task.data.dataset import load_dataset

CLIENTS = 4


@dataclass(frozen=True)
class Fault:
    """Where a process is killed.

    Attributes
    ----------
    phase : int
        In this round; 0: before the first one that it runs.
    seconds : float or None
        So long after the phase has begun, or at its end if that is sooner.
    call : int
        Or at this one, from 1, of the phase's calls that put a file in its place.
    """

    phase: int
    seconds: float | None = None
    call: int = 0


@dataclass(frozen=True)
class Attempt:
    """What became of a process: the phase to die in, the rounds done before it, its exit code."""

    phase: int | None
    after: int
    code: int


def run(config: dict) -> None:
    """The real ServerApp and ClientApps, in this process."""
    nodes = {50 + i: ClientAppNode(i, CLIENTS, config) for i in range(CLIENTS)}
    server_app.app.main(SimulatedGrid(nodes), Context(1, 0, {}, RecordDict(), config))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_phases(begin: Callable[[int | None], None]) -> None:
    """Have a function called now with 0, with each round as it begins, and after the last."""
    run_round, run_rounds = server_app.rounds._run_round, server_app.run.run_rounds

    def watched_round(grid, strategy, settings, server_round, *more):
        begin(server_round)
        return run_round(grid, strategy, settings, server_round, *more)

    def watched_rounds(*arguments):
        run_rounds(*arguments)
        begin(None)

    server_app.rounds._run_round, server_app.run.run_rounds = watched_round, watched_rounds
    begin(0)


def on_calls(called: Callable[[], None]) -> None:
    """Have a function called before those of `os` that `write_atomic` makes."""

    def watched(original):
        def call(*arguments):
            called()
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, watched(getattr(os, name)))


def measure(file: Path) -> None:
    """Write seconds and calls of each phase of this process."""
    phases: list[list[float]] = []
    began = time.monotonic()

    def begin(phase):
        nonlocal began
        now = time.monotonic()
        if phases:
            phases[-1][0] = now - began
        if phase is None:
            file.write_text(json.dumps(phases))
        phases.append([0.0, 0])
        began = now

    def called():
        phases[-1][1] += 1

    on_phases(begin)
    on_calls(called)


def suffer(fault: Fault, begun: int) -> None:
    """Die as the fault says; tell through a descriptor that its phase has begun."""
    suffering, calls = False, 0

    def begin(phase):
        nonlocal suffering
        if suffering:
            die()  # The phase is over.
        if phase == fault.phase:
            suffering = True
            os.write(begun, b"!")

    def called():
        nonlocal calls
        calls += suffering
        if suffering and calls == fault.call:
            die()

    on_phases(begin)
    on_calls(called)


def attempt(config: dict, log: Path, prepare: Callable[[int], None], seconds=None) -> int:
    """Run in a process of its own; return its exit code.

    `prepare` is called in it, with a descriptor; so many seconds after it wrote there, the process
    is killed.
    """
    begun, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            prepare(tell)
            run(config)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(tell)
    if seconds is not None and os.read(begun, 1):
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.close(begun)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def draw_phases(rng: random.Random, kills: int, rounds: int) -> list[int]:
    """Return the phases to die in: one start, and different rounds in their order.

    In their order, so that every one of these rounds is still to come, wherever within the one
    before it the process died.
    """
    phases = sorted(rng.sample(range(1, rounds + 1), kills - 1))
    phases.insert(rng.randint(0, kills - 1), 0)
    return phases


def draw_fault(rng: random.Random, phase: int, seconds: float, calls: int) -> Fault:
    """Draw a moment of a phase, or a call: before a file is on the disk, or has its new name."""
    if rng.random() < 0.5:
        return Fault(phase, seconds=rng.uniform(0, seconds))
    return Fault(phase, call=rng.randint(1, calls))


def kill_and_resume(folder: Path, kills: int, config: dict) -> list[dict]:
    """Do one job; return the attempts of the broken run."""
    folder.mkdir()
    config |= {"output-dir": str(folder)}
    load_dataset(Settings.of_run(config))
    measured = folder / "phases.json"
    whole = {**config, "run-name": "whole"}
    if code := attempt(whole, folder / "whole.log", lambda _: measure(measured)):
        return [asdict(Attempt(None, 0, code))]
    lengths = json.loads(measured.read_text())
    rng = random.Random(folder.name)
    broken = folder / "broken"
    attempts = []
    for phase in [*draw_phases(rng, kills, config["num-server-rounds"]), None]:
        done, now = 0, {**config, "run-name": "broken"}
        if (broken / "checkpoint" / "last.safetensors").exists():
            done, now = read_checkpoint(broken).server_round, {**config, "resume": str(broken)}
        elif broken.exists():
            # Killed before the first round: there is nothing to resume.
            broken.rename(folder / f"unbegun{len(attempts)}")
        if phase is None:
            code = attempt(now, folder / "broken.log", lambda _: None)
        else:
            fault = draw_fault(rng, phase, *lengths[phase])
            code = attempt(now, folder / "broken.log", partial(suffer, fault), fault.seconds)
        attempts.append(asdict(Attempt(phase, done, code)))
    return attempts


if __name__ == "__main__":
    target = Path(sys.argv[1])
    jobs = json.load(sys.stdin)
    print(json.dumps({name: kill_and_resume(target / name, *job) for name, job in jobs.items()}))
