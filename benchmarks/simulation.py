"""A round in Flower's simulation against a bare loop, plain Flower, and what ProWD adds to it."""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.federation import ALL_FLOAT32, CLIENTS, FEDERATION, SETTINGS
from benchmarks.grid import quietly, reporting_grid, run_round
from benchmarks.measure import Figure, ratio, report, side_by_side
from benchmarks.plain_flower import network, seconds_of_rounds
from core.settings import Settings
from exchange.states import to_arrays
from prowd.compare.plan import Setting
from prowd.compare.runs import PlannedRun, execute
from prowd.records import read_record
from quant import FLOAT_BITS, federated_state, quantizable_weights
from server_app.build import read_settings
from server_app.run import Run, prepare
from strategies import FedAvg, MixedPrecisionStrategy, StrategyContext
from task.at_width import ready_to_evaluate
from task.data.dataset import Images, Pixels
from task.data.partition import client_images, server_pixels
from task.hyperparameters import LocalTraining
from task.training import train

_OVERHEAD, _AHEAD, _SHARE = 1.25, 1.0, 0.10
_FINETUNE_EVERY = 5
# The paper's, which by default keep everything.
_MASKS: dict[str, Setting] = {"prowd-mask-at-most": 0.5, "prowd-mask-at-least": 0.0}
_IMAGES = 50_000
_REPEATS = 3
# Runs of each side, as what else a machine does changes from minute to minute.
_TURNS = 2


def main() -> None:
    """Run four rounds by `flwr run`, and the same clients' training without Flower."""
    quietly()
    settings = Settings.of_run(SETTINGS)
    simulated = _seconds_of_rounds(SETTINGS)
    bare = [_bare(settings) for _ in simulated]
    figures = [ratio("a round by flwr run, against a bare loop", simulated, bare, _OVERHEAD)]
    figures.append(_against_plain_flower())
    report("simulation", [*figures, *_shares(settings)])


def _seconds_of_rounds(settings: Mapping[str, Setting]) -> list[float]:
    """Seconds from the end of one round of a real run to that of the next, without evaluation.

    So that all is counted: the first round, in which workers load their data, is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = PlannedRun("", "", 0, Path(folder) / "run", dict(settings))
        if reason := execute(run, FEDERATION, threading.Event(), threading.Lock()):
            raise RuntimeError(reason)
        rounds = read_record(run.folder, weights=False).rounds[1:]
        events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
        ends = [event.wall_time for event in events.Scalars("seconds/round")]
    whole = [end - began for began, end in pairwise(ends)]
    return [s - entry.seconds["evaluate"] for s, entry in zip(whole, rounds, strict=True)]


def _bare(settings: Settings) -> float:
    """Seconds that the training of all clients takes, one process a core."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        # Each process has loaded its data and trained a client, as Flower's workers have.
        pool.starmap(_train_client, [(settings, i) for i in range(cores)], chunksize=1)
        began = time.perf_counter()
        pool.starmap(_train_client, [(settings, i) for i in range(CLIENTS)], chunksize=1)
        return time.perf_counter() - began


def _images_of(settings: Settings, partition: int) -> Images:
    return client_images(settings, partition, CLIENTS)


def _train_client(settings: Settings, partition: int) -> None:
    _train_on(_images_of(settings, partition), settings, partition)


def _train_on(images: Images, settings: Settings, partition: int) -> None:
    torch.set_num_threads(settings.client_threads)
    bits = 4 if partition < CLIENTS // 2 else FLOAT_BITS
    config = LocalTraining.of(settings, bits, 1, 0.0)
    train(network(), images, config, seed=0)


def _whole_round(settings: Settings) -> float:
    """Seconds of a round's training without Flower: that of a client of each width, for all."""
    cores = len(os.sched_getaffinity(0))
    low, high = 0, CLIENTS - 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.starmap(_images_of, [(settings, i) for i in range(cores)], chunksize=1)
        # As many at a time as cores, as in a round.
        each = pool.starmap(_seconds_of_client, [(settings, i) for i in (low, high)] * cores)
    return CLIENTS / cores * fmean(each)


def _seconds_of_client(settings: Settings, partition: int) -> float:
    images = _images_of(settings, partition)
    began = time.perf_counter()
    _train_on(images, settings, partition)
    return time.perf_counter() - began


def _against_plain_flower() -> Figure:
    ours, theirs = [], []
    for _ in range(_TURNS):
        ours += _seconds_of_rounds(ALL_FLOAT32)
        theirs += seconds_of_rounds()
    return ratio("a round of Float32 clients, against plain Flower's FedAvg", ours, theirs, _AHEAD)


def _shares(settings: Settings) -> list[Figure]:
    """What ProWD adds to a round, in shares of its training on as many images as CIFAR-10 has."""
    trained = _whole_round(settings.model_copy(update={"samples_per_client": _IMAGES // CLIENTS}))
    torch.set_num_threads(settings.server_threads)
    context = StrategyContext(quantized=quantizable_weights(network()))
    plain = _server_seconds(lambda: FedAvg(context=context))
    added = _server_seconds(lambda: _prepared(_MASKS).strategy) - plain
    blocks = {**_MASKS, "prowd-finetune-every": _FINETUNE_EVERY}
    tuned = _server_seconds(lambda: _prepared(blocks).strategy) - plain
    with_blocks = added + (tuned - added) / _FINETUNE_EVERY
    calibration = _calibration_seconds(settings)
    return [
        Figure(f"{name}, of a round's training", seconds / trained, _SHARE, repeats=_REPEATS)
        for name, seconds in (
            ("rounding, dequantizer, drift and masks", added),
            ("with trained blocks, tuned every fifth round", with_blocks),
            ("and calibrated for an evaluation every round", with_blocks + calibration),
        )
    ]


def _prepared(own: Mapping[str, Setting]) -> Run:
    return prepare(Path(), *read_settings({**SETTINGS, **own}))


def _server_seconds(make: Callable[[], MixedPrecisionStrategy]) -> float:
    """Seconds of the server's part of a first round, of a new strategy each time."""
    model = federated_state(network())
    grid = reporting_grid(model, [4, FLOAT_BITS] * (CLIENTS // 2), coded=True)
    seconds = []
    for _ in range(_REPEATS + 1):
        strategy = make()
        began = time.perf_counter()
        run_round(strategy, to_arrays(model), grid)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def _calibration_seconds(settings: Settings) -> float:
    """By how much longer it takes to make both widths ready to evaluate with calibration."""
    buffer = Pixels(server_pixels(settings))

    def ready(calibrated: bool) -> None:
        chosen = settings.model_copy(update={"calibrate_normalization": calibrated})
        for bits in (4, FLOAT_BITS):
            ready_to_evaluate(network(), chosen, bits, {}, buffer)

    ways = {name: partial(ready, name == "with") for name in ("with", "without")}
    seconds = side_by_side(ways, _REPEATS)
    return median(seconds["with"]) - median(seconds["without"])
