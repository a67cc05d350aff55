"""Runs that are killed with signal 9 and resumed until they are done, beside one left in peace.

``python tests/server_app/killing.py FOLDER SEED KILLS RUN_CONFIG.json`` writes ``FOLDER/whole`` and
``FOLDER/broken`` and prints the exit codes of the broken run's processes. The imports, which take
most of a short run, happen once: each attempt is a process forked from this one, which never runs
anything itself.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch.utils.tensorboard  # noqa: F401
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

import server_app.app
from task.data import load_dataset
from task.settings import Settings

CLIENTS = 4
SECONDS_OF_RANDOM_KILLS = 1.2


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


def main(folder: Path, seed: int, kills: int, config: dict) -> list[int]:
    config |= {"output-dir": str(folder)}
    load_dataset(Settings.of_run(config))
    code = attempt({**config, "run-name": "whole"}, folder / "whole.log")
    if code:
        return [code]
    rng = random.Random(seed)
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
            fault = {"call": (rng.choice(["fsync", "replace"]), rng.randint(1, 12))}
        else:
            fault = {"seconds": rng.uniform(0.05, SECONDS_OF_RANDOM_KILLS)}
        codes.append(attempt(now, folder / "broken.log", **fault))
    return codes


if __name__ == "__main__":
    target, seed, kills, config = sys.argv[1:]
    print(json.dumps(main(Path(target), int(seed), int(kills), json.loads(config))))
