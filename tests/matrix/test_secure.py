"""Secure aggregation across strategies, training and tasks; devices that drop out at each step."""

import gc

import numpy as np
import pytest
from federation import Recording, SimulatedGrid
from flwr.app import ConfigRecord, Error, Message, RecordDict
from matrix.cells import FLOAT32, Cell
from matrix.invariants import completes_with_everybody, is_finite, is_the_same_run
from matrix.running import run
from matrix.test_tasks import SMALL, TASKS

from core.errors import SettingsError
from exchange.protocol import UPDATE
from exchange.secure import KEYS, OPEN, REVEAL, SECURE, SHARES
from privacy.sum_grid import SumGrid
from privacy.words import unpack

WIDTHS = (4, 4, 4, 32, 32, 32)
SECURE_RUN = {"secure_aggregation": True, "batch_size": 12}
PROWD, FEDAVG = Cell("prowd", "calibrated", "strict", WIDTHS), Cell("fedavg", widths=WIDTHS)
DIFFERENCES = [
    Cell("fedcom", "calibrated", "strict", WIDTHS),
    Cell("fedpaq", "float32", "qat", WIDTHS),
    Cell("fedpaq", "float32", "integer", WIDTHS),
]
CELLS = [
    PROWD,
    FEDAVG,
    Cell("prowd", "float32", "qat", WIDTHS, "dithered"),
    Cell("fedavg", "nearest", "strict", (2, 2, 8, 8, 16, 16)),
    Cell("fedavg", "float32", "qat", WIDTHS, "stored"),
    Cell("fedavg", "float32", "integer", WIDTHS, "stored"),
    *DIFFERENCES,
    Cell("fedcom", "nearest", "qat", (2, 2, 8, 8, 16, 16), "dithered"),
    Cell("grouped-avg-asymmetric", "nearest", "strict", WIDTHS),
    Cell("flwr:FedAdam", "float32", "qat", WIDTHS),
]
REFUSED = {
    "local": {},
    "fedcomgate": {},
    "prowd-paper": {},
    "prowd": {"prowd_dequantize": "client"},
    "flwr:Krum": {"flwr_arguments": "num_malicious_nodes = 1"},
    "flwr:FedMedian": {"flwr_arguments": ""},
    "flwr:FedTrimmedAvg": {"flwr_arguments": "beta = 0.2"},
}


def model_of(trace):
    return (trace.folder / "model.safetensors").read_bytes()


def is_the_run_without_masks(cell, tmp_path, without_masks, **settings):
    settings = {**SECURE_RUN, "secure_min_group": 2, "rounds": 1, **settings}
    masked = run(cell, tmp_path / "masked", **settings)
    completes_with_everybody(masked)
    is_finite(masked)
    without_masks()
    assert model_of(masked) == model_of(run(cell, tmp_path / "bare", **settings))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_it_is_the_run_without_masks_bit_for_bit(cell, tmp_path, without_masks):
    is_the_run_without_masks(cell, tmp_path, without_masks)


@pytest.mark.parametrize(
    ("strategy", "training", "bits"),
    [("fedpaq", "qat", 2), ("fedcom", "strict", 5), ("fedcom", "integer", 16)],
)
def test_so_it_is_of_differences_at_a_width_of_their_own(
    strategy, training, bits, tmp_path, without_masks
):
    cell = Cell(strategy, "float32", training, WIDTHS)
    is_the_run_without_masks(cell, tmp_path, without_masks, **{f"{strategy}_bits": bits})


@pytest.mark.parametrize("cell", [PROWD, CELLS[-1]], ids=str)
def test_a_resumed_run_is_the_straight_one(cell, tmp_path):
    straight = run(cell, tmp_path / "straight", killed=tmp_path / "killed", **SECURE_RUN)
    is_the_same_run(straight, run(cell, tmp_path / "killed", resume=True, **SECURE_RUN))


@pytest.mark.parametrize("task", TASKS)
def test_so_it_is_of_any_task(task, tmp_path, without_masks):
    settings = {**SMALL, "task": task, **TASKS[task]}
    is_the_run_without_masks(PROWD, tmp_path, without_masks, **settings)


@pytest.mark.parametrize("cell", [PROWD, *DIFFERENCES], ids=str)
def test_it_is_near_the_run_in_the_clear(cell, tmp_path):
    """Same clients, same codes: what differs is the fixed point of all else."""
    settings = {"rounds": 1, "weighting": "uniform", "batch_size": 12}
    settings |= {"fedcom_server_learning_rate": 1.0}
    clear = run(cell, tmp_path / "clear", fedcom_bits=16, **settings)
    secure = run(cell, tmp_path / "secure", secure_aggregation=True, **settings)
    for name, tensor in clear.starts[2].items():
        moved = float((tensor - clear.starts[1][name]).norm())
        apart = float((secure.starts[2][name] - tensor).norm())
        assert apart <= 0.05 * moved + 1e-3, name


def test_float32_devices_alone_are_summed_to_within_a_step_of_fixed_point(tmp_path):
    cell, settings = Cell("fedavg", widths=FLOAT32), {"rounds": 1, "weighting": "uniform"}
    clear = run(cell, tmp_path / "clear", **settings)
    secure = run(cell, tmp_path / "secure", secure_aggregation=True, **settings)
    for name, tensor in clear.starts[2].items():
        reach = 64 if "running" in name else 4
        step = reach * max(1.0, float(clear.starts[1][name].abs().max())) / (2**19 - 1)
        assert float((secure.starts[2][name] - tensor).abs().max()) <= step


def failing_at(step, node=51):
    """Let a node fail at a step: as one that is killed, it answers nothing else any more."""

    def on_grid(grid):
        whole, gone = grid.nodes[node], []

        def answer(message):
            gone.extend([step] if message.metadata.message_type == step else [])
            if gone and message.metadata.message_type != "query":
                return Message(Error(code=2, reason="out of power"), reply_to=message)
            return whole(message)

        grid.nodes[node] = answer

    return on_grid


@pytest.mark.parametrize("step", [KEYS, SHARES, OPEN, "train", REVEAL])
def test_a_device_that_drops_out_at_a_step_is_left_out_alone(step, tmp_path, without_masks):
    settings = {**SECURE_RUN, "rounds": 1, "secure_min_group": 2, "on_grid": failing_at(step)}
    masked = run(PROWD, tmp_path / "masked", **settings)
    [entry] = masked.entries
    # What was sent before the last step is in the sum, whoever reveals its masks.
    used = 6 if step == REVEAL else 5
    assert entry["clients"]["aggregated"] == used
    assert entry["secure"]["4"]["devices"] == used - 3
    assert entry["left_out"] == ({} if step == REVEAL else {"1": "out of power"})
    without_masks()
    settings["on_grid"] = failing_at(step)
    assert model_of(masked) == model_of(run(PROWD, tmp_path / "bare", **settings))


def test_a_group_that_becomes_too_small_is_left_out_and_the_others_go_on(tmp_path):
    masked = run(PROWD, tmp_path / "run", rounds=1, on_grid=failing_at(SHARES), **SECURE_RUN)
    [entry] = masked.entries
    assert entry["clients"]["aggregated"] == 3
    assert list(entry["secure"]) == ["32"]
    reason = "secure-min-group: 2 devices of 4 bits are left; allowed: 3 or more"
    assert entry["left_out"] == {"0": reason, "1": "out of power", "2": reason}


NONSENSE = [
    {"masking": b"\0" * 32, "sealing": 5, "commitment": [1]},
    {"sealed": b"\xff" * 100, "digests": b"", "own_masks": b"", "masking_keys": b"\0" * 40},
    {"unopened": b"\xff" * 16},
]


# What else is refused: tests/privacy.
@pytest.mark.parametrize("step", [KEYS, SHARES, OPEN, REVEAL])
def test_nonsense_costs_the_one_that_sent_it(step, tmp_path):
    for place, nonsense in enumerate(NONSENSE):

        def on_grid(grid, nonsense=nonsense):
            whole = grid.nodes[51]

            def answer(message):
                if message.metadata.message_type != step:
                    return whole(message)
                return Message(RecordDict({SECURE: ConfigRecord(nonsense)}), reply_to=message)

            grid.nodes[51] = answer

        settings = {"rounds": 1, "secure_min_group": 2, "on_grid": on_grid, **SECURE_RUN}
        [entry] = run(PROWD, tmp_path / str(place), **settings).entries
        assert entry["clients"]["aggregated"] == (6 if step == REVEAL else 5)


class Received(Recording, SimulatedGrid):
    """Keeps all that the server received."""


def test_the_server_never_holds_one_devices_codes(tmp_path, monkeypatch):
    """Neither in a message nor in its memory: each masked vector is uniform, whatever it hides."""
    grids, integers, whole = [], [], SumGrid.integers

    def noting(self, update, weight, generator):
        parts = whole(self, update, weight, generator)
        integers.append([part.copy() for part in parts])
        return parts

    monkeypatch.setattr(SumGrid, "integers", noting)
    monkeypatch.setattr("matrix.running.SimulatedGrid", Received)
    settings = {"rounds": 1, "weighting": "uniform", "on_grid": grids.append, **SECURE_RUN}
    trace = run(PROWD, tmp_path / "run", **settings)
    assert len(integers) == 6
    [grid] = grids
    payloads = [m.content[UPDATE][UPDATE].data for m in grid.received if UPDATE in m.content]
    assert len(payloads) == 6
    # 7 codes to each side and three devices of weight 1 take 6 bits; 20 bits and three, 22.
    codes = next(codes for codes, _ in integers if codes.size)
    counts = [codes.size, next(floats.size for codes, floats in integers if codes.size)]
    lengths = sorted({len(payload) for payload in payloads})
    assert lengths[0] == -(-counts[0] * 6 // 8) + -(-counts[1] * 22 // 8)
    masked = next(p for p in payloads if len(p) == lengths[0])
    words = np.asarray(unpack(masked[: -(-counts[0] * 6 // 8)], 6, counts[0]))
    found = np.bincount(words.astype(np.int64), minlength=64)
    # Chi-square of 63 degrees: above 180 once in 10**12 runs.
    assert ((found - words.size / 64) ** 2 / (words.size / 64)).sum() < 180
    assert (words == codes % 64).mean() < 0.2
    held = {bytes(o) for o in gc.get_objects() if isinstance(o, bytes | bytearray)}
    assert not any(codes.astype(t).tobytes() in held for t in (np.int8, np.int16, np.int64))
    assert trace.entries[0]["clients"]["aggregated"] == 6


@pytest.mark.parametrize("strategy", REFUSED)
def test_what_needs_one_devices_update_is_refused_before_any_training(strategy, tmp_path):
    refused = {"strategy": strategy, "secure_aggregation": True, **REFUSED[strategy]}
    with pytest.raises(SettingsError, match=r"^secure-aggregation: true with .*; allowed"):
        run(FEDAVG, tmp_path / "r", **refused)
