"""What low-bit training does to weights because of their level, measured on a finished run.

    python -m benchmarks.drift RUN_DIR --bits 3

Clients of both kinds train from the run's last model, each on its own part of the data. Their mean
movements are compared: as they are, and with the drift of each level taken out (`quant.alignment`).
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core.settings import Settings
from quant import (
    FLOAT_BITS,
    QuantizedTensor,
    align_levels,
    cosine,
    federated_state,
    load_state,
    quantizable_weights,
    quantize_model,
)
from quant.grid import per_channel
from task.data.dataset import load_dataset
from task.data.partition import client_images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

Moves = list[dict[str, Tensor]]


def movements(model: nn.Module, settings: Settings, bits: int, partitions: range, of: int) -> Moves:
    """Train one client a partition from a model, and return how far the weights moved."""
    start = federated_state(model)
    scales = None
    if bits != FLOAT_BITS:
        rounded = quantize_model(model, bits)
        scales = rounded.scales
        start = rounded.dequantize()
    moves = []
    for partition in partitions:
        client = copy.deepcopy(model)
        load_state(client, start)
        # The learning rate of the middle of the run.
        config = LocalTraining.of(settings, bits, settings.num_server_rounds // 2, 0.0)
        images = client_images(settings, partition, of)
        moved = train(client, images, config, partition, scales=scales).moved
        moves.append({name: moved[name] for name in quantizable_weights(model)})
        print(
            f"\r{bits}-bit clients trained: {len(moves)} of {len(partitions)}", end="", flush=True
        )
    print()
    return moves


def mean(moves: Moves) -> dict[str, Tensor]:
    """Return the mean movement."""
    return {name: torch.stack([m[name] for m in moves]).mean(0) for name in moves[0]}


def flat(move: dict[str, Tensor]) -> Tensor:
    """Return a movement as one vector."""
    return torch.cat([t.flatten() for t in move.values()])


def signal_cosine(first: Moves, second: Moves) -> float:
    """Cosine of what the clients of two kinds have in common, the noise of the means taken off."""
    means = [flat(mean(moves)) for moves in (first, second)]
    squares = [
        float(m.square().sum() - torch.stack([flat(x) for x in moves]).var(0).sum() / len(moves))
        for m, moves in zip(means, (first, second), strict=True)
    ]
    return float(means[0] @ means[1]) / math.sqrt(squares[0] * squares[1])


def aligned(
    low: dict[str, Tensor], high: dict[str, Tensor], start: dict[str, QuantizedTensor], bits: int
) -> dict[str, Tensor]:
    """Take the drift out of a low-bit movement, as ProWD does."""
    return {name: align_levels(m, start[name], bits, high[name])[0] for name, m in low.items()}


def by_level(moved: dict[str, Tensor], start: dict[str, QuantizedTensor]) -> dict[int, float]:
    """Mean movement, in steps, of the weights that start on each level."""
    steps = {n: m / per_channel(start[n].scale, m.ndim) for n, m in moved.items()}
    values, codes = flat(steps), torch.cat([start[n].codes.flatten() for n in moved])
    return {int(level): float(values[codes == level].mean()) for level in codes.unique()}


def main() -> None:
    """Read a run, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="record of a finished run with strict clients")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--clients", type=int, default=24, help="of each width")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads((given.run / "config.json").read_text())["settings"]
    # All images that a client gets: there are many clients.
    settings = Settings.of_run({**known, "samples-per-client": 0})
    data = load_dataset(settings)
    model = build_model(settings.model, data.channels, data.size, data.num_classes, settings.seed)
    load_state(model, load_file(given.run / "model.safetensors"))
    start = dict(quantize_model(model, given.bits).quantized)
    count = given.clients
    high = movements(model, settings, FLOAT_BITS, range(count), 2 * count)
    low = movements(model, settings, given.bits, range(count, 2 * count), 2 * count)
    print(f"cosine of the two kinds of clients' common movement: {signal_cosine(low, high):.2f}")
    print("level: mean movement in steps, low-bit and Float32")
    levels = [by_level(mean(moves), start) for moves in (low, high)]
    for level in levels[0]:
        print(f"{level:5d}: {levels[0][level]:6.2f} {levels[1][level]:6.2f}")
    pair, truth, eight = mean(high[:2]), flat(mean(high[2:])), mean(low[:8])
    print("cosine with the movement of the other Float32 clients")
    for name, move in (
        ("two Float32 clients", pair),
        (f"eight {given.bits}-bit clients", eight),
        ("the eight, aligned to the two", aligned(eight, pair, start, given.bits)),
    ):
        print(f"{name}: {cosine(flat(move), truth):.2f}")


if __name__ == "__main__":
    main()
