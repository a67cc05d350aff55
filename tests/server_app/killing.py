"""Runs that are killed with signal 9 and resumed until they are done, beside one left in peace.

A program of its own: ``python killing.py FOLDER``, with the project and its tests on PYTHONPATH.
It reads jobs as JSON: by name, a number of kills and a run configuration. It writes
``FOLDER/<name>/whole`` and ``.../broken``, and prints the exit codes of the broken run's processes
by name. The imports, which take most of a short run, happen once: each attempt is a process forked
from this one, which runs nothing itself.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import flwr_datasets.partitioner  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

import client_app.app  # noqa: F401
import server_app.app
import server_app.run
from task.data import load_dataset
from task.settings import Settings

CLIENTS = 4
# This process stands in for that of a simulation.
server_app.run.in_simulation = lambda: True


def run(config: dict) -> None:
    """The real ServerApp and ClientApps, in this process."""
    nodes = {50 + i: ClientAppNode(i, CLIENTS, config) for i in range(CLIENTS)}
    server_app.app.main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))


def kill_at_call(name: str, count: int) -> None:
    """Die at a certain call of a function of `os`, which `write_atomic` makes."""
    original = getattr(os, name)
    left = [count]

    def counting(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, counting)


def attempt(config: dict, log: Path, seconds: float | None = None, call=None) -> int:
    """Run in a process of its own, killed after a time or at a call; return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if call:
                kill_at_call(*call)
            run(config)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(folder: Path, kills: int, config: dict) -> list[int]:
    """Do one job; return the exit codes of the broken run's processes."""
    folder.mkdir()
    config |= {"output-dir": str(folder)}
    load_dataset(Settings.of_run(config))
    began = time.monotonic()
    code = attempt({**config, "run-name": "whole"}, folder / "whole.log")
    took = time.monotonic() - began
    if code:
        return [code]
    rng = random.Random(folder.name)
    codes = []
    broken = folder / "broken"
    while codes[-1:] != [0] and len(codes) < 10 * kills:
        if (broken / "checkpoint" / "last.safetensors").exists():
            now = {**config, "resume": str(broken)}
        else:
            # Killed before the first round: there is nothing to go on with.
            broken.exists() and broken.rename(folder / f"unbegun{len(codes)}")
            now = {**config, "run-name": "broken"}
        if len(codes) >= kills:
            fault = {}
        elif len(codes) % 3 == 2:
            # Somewhere in the writing of a file: before it is on the disk, or before its new name.
            fault = {"call": (rng.choice(["fsync", "replace"]), rng.randint(1, 15))}
        else:
            fault = {"seconds": rng.uniform(0, 0.4 * took)}
        codes.append(attempt(now, folder / "broken.log", **fault))
    return codes


if __name__ == "__main__":
    target = Path(sys.argv[1])
    jobs = json.load(sys.stdin)
    print(json.dumps({name: kill_and_resume(target / name, *job) for name, job in jobs.items()}))
