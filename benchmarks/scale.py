"""The server with ten, a hundred and a thousand clients: seconds for each, and memory."""

import multiprocessing
import time
from itertools import combinations
from pathlib import Path

import torch
from flwr.app import ConfigRecord

from benchmarks.grid import quietly, reporting_grid, run_round, weights_of
from benchmarks.measure import Figure, ratio, report
from exchange.states import to_arrays
from quant import federated_state
from strategies import STRATEGIES, StrategyContext
from task.models import build_model

_COUNTS, _REPEATS, _FLAT = (10, 100, 1000), 5, 1.15
# Models in float32 that a server may hold beside the packed replies, however many these are. In a
# first round ProWD makes its dequantizer too.
_MODELS = 24.0


def main() -> None:
    """Run whole rounds of the server, its clients answering at once."""
    quietly()
    figures: list[Figure] = []
    for name in ("fedavg", "prowd"):
        seconds, models = {}, {}
        for count in _COUNTS:
            # A process each, with memory of its own.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds[count], models[count] = pool.apply(_rounds, (name, count))
        for few, count in combinations(_COUNTS, 2):
            label = f"{name}, seconds a client, {count} clients against {few}"
            figures.append(ratio(label, seconds[count], seconds[few], _FLAT))
        for count in _COUNTS:
            label = f"{name}, models in memory beside {count} packed replies"
            figures.append(Figure(label, models[count], _MODELS))
    report("scale", figures)


def _rounds(name: str, count: int) -> tuple[list[float], float]:
    """Return the seconds a client took in each round, and how many models the server held."""
    torch.set_num_threads(1)
    model = federated_state(build_model("resnet20", 3, 16, 10, seed=0))
    arrays, size = to_arrays(model), sum(4 * tensor.numel() for tensor in model.values())
    grid = reporting_grid(model, [4, 32] * (count // 2), coded=True)
    seconds, models = [], 0.0
    for turn in range(_REPEATS + 1):
        strategy = STRATEGIES[name](context=StrategyContext(quantized=weights_of(model)))
        strategy.configure_train(1, arrays, ConfigRecord(), grid)  # the nodes are gathered
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        began = time.perf_counter()
        run_round(strategy, arrays, grid)
        if turn:
            seconds.append((time.perf_counter() - began) / count)
        else:  # Later rounds take what earlier ones gave back.
            replies = sum(strategy.round_log.uplink_bytes.values())
            models = (_memory("VmHWM") - before - replies) / size
    return seconds, models


def _memory(kind: str) -> int:
    """Bytes that the process holds, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
