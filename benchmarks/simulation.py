"""A round in Flower's simulation against a bare loop, and the share of it that ProWD adds."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.grid import reporting_grid, run_round
from benchmarks.measure import ratio, report
from experiments.plan import Setting
from experiments.records import Round, read_record
from experiments.runs import PlannedRun, execute
from quant import FLOAT_BITS
from server_app.run import prepare
from strategies import FedAvg
from strategies.states import to_arrays
from task.data import Images
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
    simulated = [entry.seconds["train"] for entry in rounds]
    overhead = ratio("training by flwr run against a bare loop", simulated, bare, _OVERHEAD)
    added = [_added_seconds(settings)] * len(simulated)
    label = "rounding, dequantizer, drift and masks, of a round's training"
    report("simulation", [overhead, ratio(label, added, simulated, _SHARE)])


def _simulated() -> Sequence[Round]:
    """Rounds of a real run but for the first, in which workers load their data."""
    federation = f"num-supernodes={_CLIENTS} client-resources-num-cpus=1"
    with tempfile.TemporaryDirectory() as folder:
        run = PlannedRun("", "", 0, Path(folder) / "run", _SETTINGS)
        if reason := execute(run, federation):
            raise RuntimeError(reason)
        return read_record(run.folder, weights=False).rounds[1:]


def _bare(settings: Settings) -> float:
    """Seconds that the training of all clients takes, one process a core."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        # Each process loads its data beforehand.
        pool.starmap(_images_of, [(settings, i) for i in range(cores)], chunksize=1)
        began = time.perf_counter()
        pool.starmap(_train_client, [(settings, i) for i in range(_CLIENTS)], chunksize=1)
        return time.perf_counter() - began


def _images_of(settings: Settings, partition: int) -> Images:
    return client_images(settings, partition, _CLIENTS)


def _train_client(settings: Settings, partition: int) -> None:
    torch.set_num_threads(settings.client_threads)
    bits = 4 if partition < _CLIENTS // 2 else FLOAT_BITS
    config = LocalTraining.of(settings, bits, 1, 0.0)
    train(_model(settings), _images_of(settings, partition), config, seed=0)


def _model(settings: Settings) -> nn.Module:
    return build_model(settings.model, 1, settings.image_size, 10, seed=0)


def _added_seconds(settings: Settings) -> float:
    """By how much longer the server's part of a round takes than that of FedAvg."""
    model = model_state(_model(settings))
    grid = reporting_grid(model, [4, FLOAT_BITS] * (_CLIENTS // 2), coded=True)
    seconds = []
    for strategy in (prepare(Path(), settings, {}).strategy, FedAvg()):
        run_round(strategy, to_arrays(model), grid)
        began = time.perf_counter()
        run_round(strategy, to_arrays(model), grid)
        seconds.append(time.perf_counter() - began)
    return seconds[0] - seconds[1]
