"""`flwr run .` as a user types it: Flower's SuperLink, Ray, real processes, real data."""

import re
import signal

import pytest
from containers import wait_until

from server_app.record import locked

TWO_AT_ONCE = "num-supernodes=4 client-resources-num-cpus=1"
ONE_AT_A_TIME = "num-supernodes=4 client-resources-num-cpus=2"
PLAN = """
title = "{title}"
seeds = [3]
federation = "num-supernodes=2"
[settings]
model = "cnn"
num-server-rounds = {rounds}
samples-per-client = 64
[scenarios.half]
[systems.A]
strategy = "fedavg"
[systems.B]
strategy = "fedprox"
"""


@pytest.fixture(scope="module")
def default_run(flower):
    return flower.run("default")


def test_the_main_job_completes_and_learns(default_run):
    assert default_run.status == "finished:completed"
    assert default_run.summary["status"] == "completed"
    assert default_run.summary["accuracy"]["final"]["average"] >= 0.95
    assert len(default_run.rounds) == 8
    assert set(default_run.rounds[-1]["accuracy"]) == {"8", "32", "average"}


def test_it_shows_a_line_a_round(default_run):
    lines = [line for line in default_run.output.splitlines() if " | up " in line]
    assert len(lines) == 8
    assert "round 8/8 | 8-bit 9" in lines[-1]
    assert "clients 2 of 2" in lines[-1]


def test_it_leaves_the_whole_run_record(default_run):
    names = {path.name for path in default_run.folder.iterdir()}
    assert names == {
        "checkpoint",
        "config.json",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "tensorboard",
        "weights.jsonl",
    }


def test_one_seed_gives_one_model_whatever_the_number_of_workers(flower):
    small = {"num_server_rounds": 2, "samples_per_client": 32, "fraction_train": 0.75}
    models = []
    for name, federation in (("two", TWO_AT_ONCE), ("one", ONE_AT_A_TIME)):
        run = flower.run(f"seed-{name}", federation, low_bit_training="strict", **small)
        assert run.summary["status"] == "completed"
        models.append((run.folder / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_a_bad_setting_is_one_clear_line_and_a_failed_run(flower):
    reason = "strategy: there is no 'fedsgd'; allowed: prowd"
    run = flower.run("bad", strategy="fedsgd")
    assert run.status == "finished:failed"
    lines = [line for line in run.output.splitlines() if "prowd: " in line and reason in line]
    # A node that is refused says so too, in its own log, which Ray shows here.
    assert len([line for line in lines if "ClientAppActor" not in line]) == 1
    assert run.summary["status"] == "failed"
    assert reason in run.summary["reason"]
    assert " | up " not in run.output


# Those that keep something from round to round, with clients, or in Flower's own class; all of them
# run with the real ClientApp, but without its processes, in tests/server_app/test_contract.py.
@pytest.mark.parametrize("strategy", ["fedcomgate", "flwr:FedAdam"])
def test_rivals_run_on_mixed_bit_widths(flower, strategy):
    small = {"num_server_rounds": 2, "samples_per_client": 100, "model": "cnn"}
    run = flower.run(
        strategy.replace(":", "-"),
        ONE_AT_A_TIME,
        strategy=strategy,
        bit_mix="2:0.25,4:0.25,8:0.25,32:0.25",
        **small,
    )
    assert run.status == "finished:completed"
    last = run.rounds[-1]
    assert set(last["accuracy"]) == {"2", "4", "8", "32", "average"}
    assert last["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert last["left_out"] == {}


def test_compare_runs_what_is_missing_and_makes_one_table(flower, tmp_path):
    """Two systems; the second call finds one of them done and runs the other alone."""
    (empty := tmp_path / "empty").mkdir()
    plan = tmp_path / "small.toml"
    data = f'dataset = "image-folder"\ndata-dir = "{empty}"'
    plan.write_text(PLAN.format(title="Small", rounds=1) + data)
    first = flower.compare(plan, tmp_path / "out")
    assert first.returncode == 1
    assert "failed: half-B-seed3: data-dir: " in first.stderr
    assert "\x1b" not in first.stdout
    assert "[1/2] half-A-seed3: done after " in first.stdout
    assert "[2/2] half-B-seed3: failed: data-dir: " in first.stdout
    assert "| A | " in (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "failed: data-dir: " in page
    assert first.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    plan.write_text(plan.read_text().replace('"image-folder"', '"digits"'))
    second = flower.compare(plan, tmp_path / "out")
    assert second.returncode == 0, second.stderr
    assert "1 of 2 runs are done" in second.stdout
    assert (tmp_path / "out" / "half-B-seed3.broken1").is_dir()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| A | " in table
    assert "| B | " in table


def test_runs_that_begin_together_share_the_superlink_that_one_of_them_starts(flower, tmp_path):
    plan = tmp_path / "small.toml"
    plan.write_text(PLAN.format(title="Small", rounds=1))
    with flower.without_superlink(tmp_path / "home") as cold:
        compared = cold.compare(plan, tmp_path / "out", "--jobs", "2")
    assert compared.returncode == 0, compared.stdout
    logs = "".join(log.read_text() for log in (tmp_path / "out").glob("*.log"))
    assert logs.count("Starting local SuperLink") == 1


def test_ctrl_c_stops_the_runs_of_a_comparison(flower, tmp_path):
    """In Flower too, where a run goes on when `flwr run` alone is ended."""
    plan, out = tmp_path / "long.toml", tmp_path / "out"
    plan.write_text(PLAN.format(title="Long", rounds=10_000))
    compare = flower.start_compare(plan, out)
    rounds = out / "half-A-seed3" / "rounds.jsonl"
    wait_until(lambda: rounds.is_file() and rounds.read_text().count("\n") > 1, 120, "rounds")
    compare.send_signal(signal.SIGINT)
    said, complained = compare.communicate(timeout=240)
    assert compare.returncode == 130
    assert "half-A-seed3: failed: interrupted\n" in said
    assert "stopping ..." in said
    assert complained.strip() == "prowd: interrupted; the same command runs what is left"
    assert "| A | " not in said
    assert (out / "report.html").is_file()
    assert not (out / "half-B-seed3").exists()
    [run_id] = re.findall(r"run (\d+)", (out / "half-A-seed3.log").read_text())[:1]
    assert flower.status(run_id) == "finished:stopped"
    # Nobody writes it any more, so that the same command can begin it anew.
    with locked(rounds.parent):
        pass
