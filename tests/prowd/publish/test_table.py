"""The table, worked by hand from run records."""

import json

from prowd import cli
from prowd.compare import command as compare
from prowd.compare.live import Outcome
from prowd.compare.plan import Experiment
from prowd.compare.runs import pending, planned_runs
from prowd.publish.table import make_table, result_of, to_markdown
from prowd.records import read_record


def record(folder, accuracies, up=1_000_000):
    folder.mkdir(parents=True)
    lines = [
        json.dumps(
            {
                "round": number,
                "accuracy": a,
                "uplink_bytes": {"4": up, "32": up},
                "downlink_bytes": {"4": 5},
                "seconds": {"round": 2.5},
            }
        )
        for number, a in enumerate(accuracies, 1)
    ]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": "completed"}))


def accuracy(low, high):
    return {"4": low, "32": high, "average": (low + high) / 2}


def test_accuracy_is_the_mean_of_the_last_three_evaluated_rounds(tmp_path):
    rounds = [
        accuracy(0.1, 0.1),
        accuracy(0.3, 0.5),
        {},
        accuracy(0.4, 0.6),
        accuracy(0.5, 0.7),
        {},
    ]
    record(tmp_path / "a", rounds)
    result = result_of("50-50", "A", 0, read_record(tmp_path / "a"))
    # (0.3 + 0.4 + 0.5) / 3, (0.5 + 0.6 + 0.7) / 3; six rounds of 2 MB up and 5 B down.
    assert round(result["accuracy"]["4"], 9) == 0.4
    assert round(result["accuracy"]["32"], 9) == 0.6
    assert (result["uplink_bytes"], result["downlink_bytes"]) == (12_000_000, 30)
    assert result["seconds"] == 15
    assert result["curve"][-1] == {"round": 5, "uplink_bytes": 10_000_000, "accuracy": 0.6}
    assert [point["round"] for point in result["curve"]] == [1, 2, 4, 5]


def test_systems_are_ranked_by_their_average_with_spread_over_seeds(tmp_path):
    results = [
        {
            "scenario": "50-50",
            "system": s,
            "seed": i,
            "accuracy": a,
            "uplink_bytes": 2e6,
            "downlink_bytes": 3e6,
        }
        for s, i, a in (
            ("low", 0, accuracy(0.50, 0.60)),
            ("high", 0, accuracy(0.70, 0.80)),
            ("high", 1, accuracy(0.72, 0.84)),
            ("ceiling", 0, {"32": 0.9, "average": 0.9}),
        )
    ]
    rows = make_table(results)
    assert [row["system"] for row in rows] == ["ceiling", "high", "low"]
    # Two seeds: mean 0.71, sample deviation 0.02 / sqrt(2) = 0.01414.
    assert to_markdown("T", results).splitlines() == [
        "### T: 50-50",
        "",
        "| system | 4-bit | 32-bit | averaged | MB up | MB down | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ceiling | - | 90.00 | 90.00 | 2.00 | 3.00 | 1 |",
        "| high | 71.00 ± 1.41 | 82.00 ± 2.83 | 76.50 ± 2.12 | 2.00 | 3.00 | 2 |",
        "| low | 50.00 | 60.00 | 55.00 | 2.00 | 3.00 | 1 |",
    ]


def test_a_run_is_done_only_if_its_summary_says_completed(tmp_path):
    experiment = Experiment(
        title="t", seeds=[0, 1], scenarios={"s": {}}, systems={"a": {"strategy": "fedavg"}}
    )
    first, second = planned_runs(experiment, tmp_path, {})
    record(first.folder, [accuracy(0.1, 0.2)])
    assert first.completed
    assert not second.completed
    (first.folder / "summary.json").write_text('{"status": "running"}')
    assert not first.completed
    (first.folder / "summary.json").write_text("{")
    assert not first.completed


def test_a_system_that_overrides_the_scenario_runs_once_for_all(tmp_path):
    experiment = Experiment(
        title="t",
        seeds=[0, 1],
        scenarios={"half": {"bit-mix": "4:0.5,32:0.5"}, "most": {"bit-mix": "4:0.8,32:0.2"}},
        systems={"a": {}, "ceiling": {"bit-mix": "32:1.0"}},
    )
    runs = planned_runs(experiment, tmp_path, {})
    assert [(r.scenario, r.system, r.seed) for r in runs] == [
        (scenario, system, seed)
        for seed in (0, 1)
        for scenario in ("half", "most")
        for system in ("a", "ceiling")
    ]
    names = [run.folder.name for run in pending(runs)]
    assert names == [
        "half-a-seed0",
        "half-ceiling-seed0",
        "most-a-seed0",
        "half-a-seed1",
        "half-ceiling-seed1",
        "most-a-seed1",
    ]
    record(runs[1].folder, [accuracy(0.1, 0.2)])
    assert runs[3].completed
    assert len(pending(runs)) == 5


def test_what_is_not_finite_is_left_out(tmp_path):
    """A round's null is no accuracy, and its time adds nothing."""
    record(tmp_path / "a", [accuracy(0.4, 0.6), accuracy(0.5, 0.7)])
    lines = (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()
    odd = {"round": 3, "accuracy": {"4": 0.1, "average": None}, "seconds": {"round": None}}
    (tmp_path / "a" / "rounds.jsonl").write_text("\n".join([*lines, json.dumps(odd)]))
    result = result_of("50-50", "A", 0, read_record(tmp_path / "a"))
    assert round(result["accuracy"]["average"], 9) == 0.55
    assert result["seconds"] == 5
    json.dumps(result, allow_nan=False)


def test_some_of_a_file_is_compared_by_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "file.toml").write_text(
        "title = 't'\nseeds = [0]\n[scenarios.half]\nbit-mix = '4:0.5,32:0.5'\n[scenarios.most]\n"
        "bit-mix = '4:0.8,32:0.2'\n[systems.a]\n[systems.b]\nstrategy = 'fedavg'\n"
        "[systems.ceiling]\nbit-mix = '32:1.0'\n"
    )
    asked = []

    def run_none(experiment, runs, jobs):
        asked.extend(runs)
        return Outcome({}, interrupted=False)

    monkeypatch.setattr(compare, "run_all", run_none)
    command = ["compare", str(tmp_path / "file.toml"), "--output-dir", str(tmp_path / "out")]
    assert cli.main([*command, "--scenarios", "most", "--systems", "ceiling,b"]) == 0
    # The ceiling is one run for both scenarios, whichever is asked for.
    assert [run.folder.name for run in asked] == ["most-b-seed0", "half-ceiling-seed0"]
    # What was run before stays in the table.
    for name in ("half-a-seed0", "most-b-seed0"):
        record(tmp_path / "out" / name, [accuracy(0.1, 0.2)])
    assert cli.main([*command, "--systems", "b"]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [result["system"] for result in table["results"]] == ["a", "b"]
    assert cli.main([*command, "--systems", "c"]) == 2
    assert "--systems: there is no 'c'; there are a, b, ceiling" in capsys.readouterr().err
