"""Bit-widths with too few devices for a sum of their own, summed with the next wider one."""

import json

import pytest
import torch
from matrix.cells import Cell
from matrix.invariants import (
    completes_with_everybody,
    is_finite,
    is_the_same_run,
    records_its_bytes,
)
from matrix.running import run
from matrix.test_secure import SECURE_RUN, failing_at, model_of

from core.errors import FederationError, SettingsError
from exchange.secure import KEYS
from exchange.secure_groups import SecureSettings, widths_together
from privacy.accounting import Mechanism, epsilon_after
from privacy.noisy_grid import NoisyGrid

MERGED = {**SECURE_RUN, "secure_small_groups": "merge", "secure_min_group": 3}
TWO_OF_SIX = (4, 4, 32, 32, 32, 32)
PROWD = Cell("prowd", "calibrated", "strict", (2, 8, 8, 32, 32, 32))
# Beside each cell, the devices by width in each of its sums.
CELLS = {
    PROWD: {"8": {2: 1, 8: 2}, "32": {32: 3}},
    Cell("prowd", "float32", "integer", (2, 4, 4, 4, 32, 32), "dithered"): {
        "32": {2: 1, 4: 3, 32: 2}
    },
    Cell("prowd", "nearest", "qat", (2, 2, 8, 8, 8, 32)): {"32": {2: 2, 8: 3, 32: 1}},
    Cell("fedavg", "nearest", "qat", TWO_OF_SIX): {"32": {4: 2, 32: 4}},
    Cell("fedcom", "float32", "integer", TWO_OF_SIX): {"32": {4: 2, 32: 4}},
    Cell("flwr:FedAdam", "calibrated", "strict", (3, 3, 5, 5, 16, 16)): {"16": {3: 2, 5: 2, 16: 2}},
}


def figures_of(sums):
    found = {}
    for width, devices in sums.items():
        of_each = {f"devices-{bits}": count for bits, count in devices.items()}
        found[width] = {"devices": sum(devices.values()), **(of_each if len(devices) > 1 else {})}
    return found


def devices_of(entry):
    return {
        width: {key: value for key, value in figures.items() if key.startswith("devices")}
        for width, figures in entry["secure"].items()
    }


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_it_is_the_run_without_masks_bit_for_bit(cell, tmp_path, without_masks):
    masked = run(cell, tmp_path / "masked", rounds=1, **MERGED)
    completes_with_everybody(masked)
    is_finite(masked)
    records_its_bytes(masked)
    [entry] = masked.entries
    assert devices_of(entry) == figures_of(CELLS[cell])
    for width, figures in entry["secure"].items():
        # Codes of two widths have no sum.
        assert (figures["code-bits"] == 0) == (len(CELLS[cell][width]) > 1 or width == "32")
    without_masks()
    assert model_of(masked) == model_of(run(cell, tmp_path / "bare", rounds=1, **MERGED))


def test_a_resumed_run_is_the_straight_one(tmp_path):
    straight = run(PROWD, tmp_path / "straight", killed=tmp_path / "killed", **MERGED)
    is_the_same_run(straight, run(PROWD, tmp_path / "killed", resume=True, **MERGED))


def test_movements_are_those_of_the_run_in_the_clear(tmp_path):
    """FedPAQ averages the differences of all, whatever their widths."""
    cell, settings = Cell("fedpaq", "float32", "qat", TWO_OF_SIX), {"rounds": 1, "batch_size": 12}
    settings["weighting"] = "uniform"
    clear = run(cell, tmp_path / "clear", **settings)
    merged = run(cell, tmp_path / "merged", **{**MERGED, **settings})
    for name, tensor in clear.starts[2].items():
        start = clear.starts[1][name]
        step = (64 if "running" in name else 4) * max(1.0, float(start.abs().max())) / (2**19 - 1)
        assert float((merged.starts[2][name] - tensor).abs().max()) <= step + 1e-6, name
        assert not tensor.equal(start), name


@pytest.mark.parametrize(
    ("broadcast", "training", "upload"),
    [
        ("float32", "qat", "forward"),
        ("float32", "qat", "dithered"),
        ("nearest", "qat", "forward"),
        ("float32", "strict", "auto"),
        ("calibrated", "strict", "auto"),
    ],
)
def test_how_the_start_is_rounded_is_no_movement(broadcast, training, upload, tmp_path):
    """Devices of 4 bits that hardly learn leave the Float32 model where it was."""
    cell = Cell("fedavg", broadcast, training, TWO_OF_SIX, upload)
    trace = run(cell, tmp_path / "run", rounds=1, **{**MERGED, "learning_rate": 1e-9})
    for name in cell.on_grid:
        step = 4 * max(1.0, float(trace.starts[1][name].abs().max())) / (2**19 - 1)
        assert float((trace.starts[2][name] - trace.starts[1][name]).abs().max()) <= step


def test_all_devices_of_a_merged_group_have_its_steps(tmp_path, monkeypatch):
    """Whatever each was sent: the model on its own grid."""
    reach = "privacy.sum_grid._reach"
    monkeypatch.setattr(
        reach, lambda name, start: 1.0 + 5 * float(start.double().std(correction=0))
    )
    cell, settings = Cell("fedpaq", "nearest", "qat", TWO_OF_SIX), {"rounds": 1, "batch_size": 12}
    settings |= {"weighting": "uniform", "secure_float_bits": 24}
    clear = run(cell, tmp_path / "clear", **settings)
    merged = run(cell, tmp_path / "merged", **{**MERGED, **settings})
    for name, tensor in clear.starts[2].items():
        if "running" not in name:
            torch.testing.assert_close(merged.starts[2][name], tensor, rtol=0, atol=1e-6)


def test_the_mean_counts_as_one_of_the_widest_that_take_part(tmp_path, without_masks):
    """Both Float32 devices, too few for themselves, fail before anybody trains."""

    def on_grid(grid):
        failing_at(KEYS, node=54)(grid)
        failing_at(KEYS, node=55)(grid)

    cell = Cell("prowd", "calibrated", "strict", (4, 4, 4, 4, 32, 32))
    settings = {"rounds": 1, "on_grid": on_grid, **MERGED}
    masked = run(cell, tmp_path / "masked", **settings)
    [entry] = masked.entries
    assert devices_of(entry) == {"4": {"devices": 4, "devices-4": 4}}
    assert entry["left_out"] == {"4": "out of power", "5": "out of power"}
    without_masks()
    assert model_of(masked) == model_of(run(cell, tmp_path / "bare", **settings))


def test_a_group_too_small_even_when_merged_is_left_out_by_name(tmp_path):
    cell, folder = Cell("fedavg", widths=(4, 32, 32)), tmp_path / "run"
    reason = "secure-min-group: 3 devices of 4 and 32 bits are left; allowed: 4 or more"
    with pytest.raises(FederationError, match=f"in the first round: {reason}"):
        run(cell, folder, rounds=1, **{**MERGED, "secure_min_group": 4})
    assert reason in json.loads((folder / "summary.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("sizes", "merged"),
    [
        ({4: 3, 32: 3}, [[4], [32]]),
        ({4: 2, 8: 5, 32: 3}, [[4, 8], [32]]),
        ({2: 1, 4: 1, 8: 1, 32: 3}, [[2, 4, 8], [32]]),
        ({4: 3, 8: 2, 32: 2}, [[4], [8, 32]]),
        ({4: 3, 8: 3, 32: 2}, [[4], [8, 32]]),
        ({4: 1, 32: 1}, [[4, 32]]),
        ({}, []),
    ],
)
def test_which_widths_sum_together(sizes, merged):
    settings = SecureSettings(0.66, 3, 20, small_groups="merge")
    assert widths_together(sizes, settings) == merged
    apart = SecureSettings(0.66, 3, 20)
    assert widths_together(sizes, apart) == [[bits] for bits in sizes]


@pytest.mark.parametrize("strategy", ["grouped-avg", "grouped-avg-asymmetric"])
def test_a_model_for_each_width_is_not_made_of_another(strategy, tmp_path):
    line = r"^secure-small-groups: merge with GroupedAvg\w*, which has a .*; allowed: leave-out$"
    with pytest.raises(SettingsError, match=line):
        run(Cell(strategy, widths=TWO_OF_SIX), tmp_path / "r", **MERGED)


def test_with_noise_a_merged_sum_is_divided_by_the_devices_of_all_its_widths(tmp_path, monkeypatch):
    divisors, whole = [], NoisyGrid.mean

    def noting(self, sums, weight):
        divisors.append(weight)
        return whole(self, sums, weight)

    monkeypatch.setattr(NoisyGrid, "mean", noting)
    settings = {**MERGED, "weighting": "uniform", "dp_clip": 1.0, "dp_noise_multiplier": 2.0}
    cell = Cell("fedavg", "float32", "qat", TWO_OF_SIX)
    settings |= {"on_grid": failing_at("train")}
    [entry] = run(cell, tmp_path / "run", rounds=1, **settings).entries
    assert divisors == [6]
    assert entry["secure"]["32"]["devices"] == 5
    wanted = epsilon_after(Mechanism(2.0, 1.0, True), 1, 1e-5)
    assert entry["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-3)
