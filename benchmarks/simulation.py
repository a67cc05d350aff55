"""A round in Flower's simulation against a bare loop, and the share of it that ProWD adds."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord

from benchmarks.grid import reporting_grid
from benchmarks.measure import Figure, ratio, report
from experiments.plan import Setting
from experiments.runs import PlannedRun, execute
from quant import FLOAT_BITS
from server_app.run import prepare
from strategies import FedAvg
from strategies.states import to_arrays
from task.models import build_model
from task.partition import client_images
from task.settings import Settings
from task.training import LocalTraining, model_state, train

_CLIENTS, _ROUNDS = 20, 4
_OVERHEAD, _SHARE = 1.25, 0.10
_SETTINGS: dict[str, Setting] = {
    "strategy": "prowd",
    "dataset": "fashion-mnist",
    "image-size": 32,
    "model": "resnet20",
    "bit-mix": "4:0.5,32:0.5",
    "low-bit-training": "strict",
    "samples-per-client": 600,
    "num-server-rounds": _ROUNDS,
    "evaluate-every": _ROUNDS,
    "node-wait": 600,
}


def main() -> None:
    """Run four rounds by `flwr run`, and the same clients' training without Flower."""
    settings = Settings.of_run(_SETTINGS)
    rounds = _simulated()
    bare = [_bare(settings) for _ in rounds]
    simulated = [entry["seconds"]["train"] for entry in rounds]
    overhead = ratio("training by flwr run against a bare loop", simulated, bare, _OVERHEAD)
    added = _seconds_of(_prowd_round(settings)) - _seconds_of(_fedavg_round(settings))
    share = [added / seconds for seconds in simulated]
    middle = sorted(share)[len(share) // 2]
    label = "rounding, dequantizer, drift and masks, of a round's training"
    report("simulation", [overhead, Figure(label, middle, _SHARE, max(share) - min(share), 3)])


def _simulated() -> list[dict]:
    """Rounds of a real run but for the first, in which workers load their data."""
    federation = f"num-supernodes={_CLIENTS} client-resources-num-cpus=1"
    with tempfile.TemporaryDirectory() as folder:
        run = PlannedRun("", "", 0, Path(folder) / "run", _SETTINGS)
        if reason := execute(run, federation):
            raise RuntimeError(reason)
        lines = (run.folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def _bare(settings: Settings) -> float:
    """Seconds that the training of all clients takes, one process a core."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        # Each process loads its data beforehand.
        pool.starmap(_train_client, [(settings, i, 0) for i in range(cores)], chunksize=1)
        began = time.perf_counter()
        pool.starmap(_train_client, [(settings, i, None) for i in range(_CLIENTS)], chunksize=1)
        return time.perf_counter() - began


def _train_client(settings: Settings, partition: int, count: int | None) -> None:
    torch.set_num_threads(settings.client_threads)
    bits = 4 if partition < _CLIENTS // 2 else FLOAT_BITS
    images = client_images(settings, partition, _CLIENTS)
    if count is None:
        model = build_model(settings.model, 1, settings.image_size, 10, seed=0)
        train(model, images, LocalTraining.of(settings, bits, 1, 0.0), seed=0)


def _prowd_round(settings: Settings) -> Callable[[], None]:
    strategy = prepare(Path(), settings, {}).strategy
    return lambda: _server_round(strategy, settings)


def _fedavg_round(settings: Settings) -> Callable[[], None]:
    return lambda: _server_round(FedAvg(), settings)


def _server_round(strategy, settings: Settings) -> None:
    model = model_state(build_model(settings.model, 1, settings.image_size, 10, seed=0))
    grid = reporting_grid(model, [4, FLOAT_BITS] * (_CLIENTS // 2), coded=True)
    messages = strategy.configure_train(1, to_arrays(model), ConfigRecord(), grid)
    strategy.aggregate_train(1, grid.send_and_receive(messages))


def _seconds_of(call: Callable[[], None]) -> float:
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
