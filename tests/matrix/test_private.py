"""Differential privacy across strategies, with noise of the server or of the devices."""

import json

import pytest
from matrix.cells import Cell
from matrix.invariants import completes_with_everybody, is_finite
from matrix.running import run

from core.errors import SettingsError
from privacy.accounting import Mechanism, epsilon_after

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
