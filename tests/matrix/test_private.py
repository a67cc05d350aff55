"""Differential privacy across strategies, with noise of the server or of the devices."""

import json
import re

import pytest
from matrix.cells import Cell
from matrix.invariants import completes_with_everybody, is_finite
from matrix.running import run
from matrix.test_secure import failing_at

from core.errors import SettingsError
from privacy.accounting import Mechanism, epsilon_after
from privacy.noisy_grid import NoisyGrid
from strategies import FedAvg

WIDTHS = (4, 4, 4, 32, 32, 32)
PRIVATE = {"weighting": "uniform", "dp_clip": 1.0, "batch_size": 12}
CELLS = [
    Cell("prowd", "calibrated", "strict", WIDTHS),
    Cell("prowd", "float32", "integer", WIDTHS),
    Cell("fedavg", "float32", "qat", WIDTHS),
    Cell("fedcom", "float32", "strict", WIDTHS),
    Cell("grouped-avg", "nearest", "strict", WIDTHS),
    Cell("flwr:FedAdam", "float32", "qat", WIDTHS),
]


def apart(one, other, before):
    """By how much two models differ, in movements of the first one."""

    def distance(a, b):
        return sum(float((a[n] - b[n]).norm()) ** 2 for n in a if "running" not in n) ** 0.5

    return distance(one, other) / distance(one, before)


@pytest.mark.parametrize(("cell", "secure"), zip(CELLS, [True, False] * 3, strict=True), ids=str)
def test_a_run_has_its_noise_and_states_its_epsilon(cell, secure, tmp_path):
    settings = {**PRIVATE, "secure_aggregation": secure, "dp_noise_multiplier": 2.0}
    trace = run(cell, tmp_path / "run", rounds=1, **settings)
    completes_with_everybody(trace)
    is_finite(trace)
    [entry] = trace.entries
    mechanism = Mechanism(2.0, 1.0, secure)
    assert entry["privacy"]["epsilon"] == pytest.approx(epsilon_after(mechanism, 1, 1e-5), rel=1e-3)
    assert trace.summary["privacy"] == entry["privacy"]


@pytest.mark.parametrize("secure", [False, True], ids=["central", "distributed"])
@pytest.mark.parametrize("cell", [CELLS[0], CELLS[3]], ids=str)
def test_with_hardly_any_noise_and_a_wide_clip_it_is_the_run_in_the_clear(cell, secure, tmp_path):
    """But for the statistics, which are not sent: as a server that keeps those it had."""
    clear = run(cell, tmp_path / "clear", rounds=1, weighting="uniform", batch_size=12)
    settings = {**PRIVATE, "dp_clip": 50.0, "dp_noise_multiplier": 1e-6, "norm_bound": 0.0}
    settings |= {"secure_float_bits": 24}
    private = run(cell, tmp_path / "p", rounds=1, secure_aggregation=secure, **settings)
    assert apart(clear.starts[2], private.starts[2], clear.starts[1]) < 0.1


def test_a_budget_ends_the_run_and_a_resume_goes_on_with_the_account(tmp_path):
    cell, settings = CELLS[2], {**PRIVATE, "dp_noise_multiplier": 2.0}
    budget = epsilon_after(Mechanism(2.0), 2, 1e-5) * 1.01
    settings |= {"dp_epsilon": budget}
    straight = run(cell, tmp_path / "straight", rounds=2, killed=tmp_path / "killed", **settings)
    resumed = run(cell, tmp_path / "killed", rounds=2, resume=True, **settings)
    spent = [e["privacy"]["epsilon"] for e in straight.entries]
    assert [e["privacy"]["epsilon"] for e in resumed.entries] == pytest.approx(spent)
    settings["resume"] = True
    lines = (tmp_path / "straight" / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["privacy"]["epsilon"] <= budget
    # There is no third round.
    run(cell, tmp_path / "straight", rounds=3, **settings)
    assert len((tmp_path / "straight" / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("strategy", ["local", "fedcomgate", "prowd-paper"])
def test_what_needs_one_devices_update_is_refused(strategy, tmp_path):
    given = {**PRIVATE, "strategy": strategy, "dp_noise_multiplier": 1.0}
    with pytest.raises(SettingsError, match=r"^dp-clip: 1 with .*; allowed"):
        run(CELLS[2], tmp_path / "r", **given)


def test_the_last_round_of_a_budget_is_evaluated(tmp_path):
    budget = epsilon_after(Mechanism(2.0), 2, 1e-5) * 1.01
    settings = {**PRIVATE, "dp_noise_multiplier": 2.0, "dp_epsilon": budget, "evaluate_every": 9}
    entries = run(CELLS[2], tmp_path / "run", rounds=4, **settings).entries
    assert [bool(entry["accuracy"]) for entry in entries] == [False, True]


def test_noise_larger_than_the_model_is_no_reason_to_leave_a_group_out(tmp_path):
    settings = {**PRIVATE, "dp_noise_multiplier": 100.0, "secure_aggregation": True}
    completes_with_everybody(run(CELLS[2], tmp_path / "run", rounds=1, **settings))


def test_a_sum_is_divided_alike_whoever_drops_out(tmp_path, monkeypatch):
    divisors, whole = [], NoisyGrid.mean

    def noting(self, sums, weight):
        divisors.append(weight)
        return whole(self, sums, weight)

    monkeypatch.setattr(NoisyGrid, "mean", noting)
    settings = {**PRIVATE, "dp_noise_multiplier": 1.0, "secure_aggregation": True}
    settings |= {"secure_min_group": 2, "on_grid": failing_at("train")}
    [entry] = run(CELLS[2], tmp_path / "run", rounds=1, **settings).entries
    assert entry["secure"]["4"]["devices"] == 2
    assert divisors == [3, 3]


def test_a_sum_that_was_seen_counts_though_the_strategy_does_not_read_it(tmp_path, monkeypatch):
    def reads_the_first(self, server_round, start, updates):
        next(updates)
        return start

    monkeypatch.setattr(FedAvg, "combine", reads_the_first)
    monkeypatch.setattr(NoisyGrid, "effective_noise", lambda self, devices: 1 / devices)
    cell = Cell("fedavg", "float32", "qat", (4, 4, 32, 32, 32, 32))
    settings = {**PRIVATE, "dp_noise_multiplier": 1.0, "secure_aggregation": True}
    [entry] = run(cell, tmp_path / "run", rounds=1, secure_min_group=2, **settings).entries
    assert entry["privacy"]["noise_multiplier"] == 1 / 4


@pytest.mark.parametrize("secure", [False, True], ids=["central", "distributed"])
def test_that_nobody_is_drawn_ends_no_run(secure, tmp_path, monkeypatch):
    numbers = iter([1.0] * 6 + [0.0] * 6)
    monkeypatch.setattr("exchange.nodes.SystemRandom.random", lambda _: next(numbers))
    settings = {**PRIVATE, "dp_noise_multiplier": 1.0, "fraction_train": 0.5}
    trace = run(CELLS[2], tmp_path / "r", rounds=2, secure_aggregation=secure, **settings)
    assert [entry["clients"]["aggregated"] for entry in trace.entries] == [0, 6]
    # The server's noise is there all the same; of the devices there is no sum.
    assert ["privacy" in entry for entry in trace.entries] == [not secure, True]


@pytest.mark.parametrize(
    ("noise", "secure", "allowed"),
    [
        (1e-6, True, r"with secure-float-bits 16; allowed for this model and this many devices: "),
        (1e9, True, r"with secure-float-bits 16; allowed for this model and this many devices: "),
        (1e-12, False, r"with 3 devices of 4 bits; allowed: 1\.12e-08 or more$"),
    ],
)
def test_noise_that_no_sampler_or_accountant_takes_is_refused_before_training(
    noise, secure, allowed, tmp_path
):
    settings = {**PRIVATE, "dp_noise_multiplier": noise, "secure_aggregation": secure}
    settings |= {"secure_float_bits": 16}
    with pytest.raises(
        SettingsError, match=rf"^dp-noise-multiplier: {re.escape(f'{noise:g}')} {allowed}"
    ):
        run(CELLS[2], tmp_path / "r", rounds=1, **settings)
