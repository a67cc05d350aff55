"""Run records, written by the run record's own writer."""

import torch

from server_app.record import RunRecord
from strategies.prowd.distributions import WeightDistributions

COMMON = {
    "num-server-rounds": 4,
    "dataset": "digits",
    "bit-mix": "3:0.5,32:0.5",
    "output-dir": "anywhere",
    "learning-rate": 0.1,
}
LAYERS = {"conv.weight": (8, 9), "head.weight": (10, 8)}


def entry(strategy, number, average, seed=0, own=None, **changes):
    spread = 0.01 * seed
    accuracy = {"3": average - 0.1 + spread, "32": average + 0.1, "average": average + spread / 2}
    silent = strategy == "local"
    return {
        "round": number,
        "accuracy": {} if number % 2 else accuracy,
        "loss": {},
        "train_loss": 1.0,
        "uplink_bytes": {"3": 0 if silent else 100_000, "32": 0 if silent else 1_500_000},
        "downlink_bytes": {"3": 200_000, "32": 1_500_000},
        "seconds": {"round": 3.0, "train": 2.0, "aggregate": 0.25, "evaluate": 0.75},
        "clients": {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0},
        "left_out": {},
        "left_out_of_evaluation": {},
        strategy: own or {},
        **changes,
    }


def own_of_prowd(number):
    return {
        "mask-density-3": 0.75,
        "mask-density-by-layer-3": {"conv.weight": 0.9, "head.weight": 0.5},
        "reconstruction-loss": 0.5 / number,
        "distill-loss": -0.5,
    }


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    high = {name: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}
    low = {name: tensor.round() for name, tensor in high.items()}
    return WeightDistributions({3: low, 32: high}, LAYERS).to_record({3: high, 32: high})


def write_run(folder, strategy, seed, rounds=4, ends="completed", left_out=None, **settings):
    """Leave what a run leaves."""
    record = RunRecord(folder)
    own = {"prowd-align": True} if strategy == "prowd" else {}
    record.write_config({**COMMON, "strategy": strategy, "seed": seed, **own, **settings})
    base = {"prowd": 0.6, "fedavg": 0.5, "local": 0.4}[strategy]
    for number in range(1, rounds + 1):
        reports = own_of_prowd(number) if strategy == "prowd" else {}
        noted = weights(seed) if strategy == "prowd" and number % 2 == 0 else None
        accuracy = base + 0.05 * number
        line = entry(strategy, number, accuracy, seed, reports, left_out=left_out or {})
        record.append_round(line, noted)
    if ends:
        record.write_summary(*ends) if isinstance(ends, tuple) else record.write_summary(ends)
    record.close()
    return folder
