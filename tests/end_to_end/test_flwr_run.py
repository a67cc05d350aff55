"""`flwr run .` as a user types it: Flower's SuperLink, Ray, real processes, real data."""

import json
import re
import signal

import pytest
from containers import PATIENCE, wait_until

from server_app.folder import locked

WIDTHS = ["2", "4", "8", "32"]
# A strategy that keeps something with its clients, and one of Flower's own; all of them run with
# the real ClientApp, but without its processes, in tests/server_app/test_contract.py.
PLAN = f"""
title = "{{title}}"
seeds = [3]
federation = "num-supernodes=4 client-resources-num-cpus=2"
[settings]
model = "toy:net"
num-server-rounds = {{rounds}}
samples-per-client = 64
node-wait = {PATIENCE}
bit-mix = "{",".join(f"{bits}:0.25" for bits in WIDTHS)}"
[scenarios.half]
[systems.A]
strategy = "fedcomgate"
[systems.B]
strategy = "flwr:FedAdam"
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


@pytest.mark.deployment
def test_an_engine_that_cannot_start_ends_the_run_with_one_line(flower):
    """Flower's simulation wants more CPUs than there are, while the run waits for its nodes."""
    run = flower.run("engine", "num-supernodes=2 client-resources-num-cpus=100000", model="toy:net")
    assert run.status == "finished:failed"
    assert run.summary["status"] == "failed"
    line = run.summary["reason"]
    assert line.startswith(
        "federation-config: client-resources-num-cpus=100000 client-resources-num-gpus=0 is more "
        "than there is for a single client; the simulation has "
    )
    assert [text.partition("prowd: ")[2] for text in run.output.splitlines()].count(line) == 1
    assert "Traceback" not in run.output


@pytest.mark.deployment
def test_compare_runs_what_is_missing_and_makes_one_table(flower, tmp_path):
    """Two systems, begun together; the second call finds one of them done and runs the other."""
    (empty := tmp_path / "empty").mkdir()
    plan, out = tmp_path / "small.toml", tmp_path / "out"
    data = f'dataset = "image-folder"\ndata-dir = "{empty}"'
    plan.write_text(PLAN.format(title="Small", rounds=2) + data)
    with flower.without_superlink(tmp_path / "home") as cold:
        first = cold.compare(plan, out, "--jobs", "2")
        assert first.returncode == 1
        assert "failed: half-B-seed3: data-dir: " in first.stderr
        assert "\x1b" not in first.stdout
        assert re.search(r"\[\d/2\] half-A-seed3: done after ", first.stdout), first.stdout
        assert re.search(r"\[\d/2\] half-B-seed3: failed: data-dir: ", first.stdout)
        assert "| A | " in (out / "table.md").read_text()
        page = (out / "report.html").read_text()
        assert "failed: data-dir: " in page
        assert first.stdout.splitlines()[-1] == str(out / "report.html")
        assert_failed_with_one_clear_line(cold, out / "half-B-seed3", "data-dir: ")

        plan.write_text(plan.read_text().replace('"image-folder"', '"digits"'))
        second = cold.compare(plan, out)
        assert second.returncode == 0, second.stderr
        assert "1 of 2 runs are done" in second.stdout
        assert (out / "half-B-seed3.broken1").is_dir()
        table = (out / "table.md").read_text()
        assert "| A | " in table
        assert "| B | " in table
        for name in ("half-A-seed3", "half-B-seed3"):
            assert cold.status(run_id_of(out / f"{name}.log")) == "finished:completed"
            assert_all_widths_took_part(out / name)
        # The runs that began together share the SuperLink that one of them started.
        assert len(cold.superlinks()) == 1


def run_id_of(log):
    return re.match(r"prowd: Flower's run (\d+)\n", log.read_text()).group(1)


def assert_failed_with_one_clear_line(flower, folder, reason):
    log = folder.with_name(f"{folder.name}.log")
    output = log.read_text()
    lines = [line for line in output.splitlines() if f"prowd: {reason}" in line]
    # A node that is refused says so too, in its own log, which Ray shows here.
    assert len([line for line in lines if "ClientAppActor" not in line]) == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert reason in summary["reason"]
    assert " | up " not in output
    assert flower.status(run_id_of(log)) == "finished:failed"


def assert_all_widths_took_part(folder):
    last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert set(last["accuracy"]) == {*WIDTHS, "average"}
    assert last["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert last["left_out"] == {}


@pytest.mark.deployment
def test_ctrl_c_stops_the_runs_of_a_comparison(flower, tmp_path):
    """In Flower too, where a run continues when `flwr run` alone is ended."""
    plan, out = tmp_path / "long.toml", tmp_path / "out"
    plan.write_text(PLAN.format(title="Long", rounds=10_000))
    compare = flower.start_compare(plan, out)
    rounds = out / "half-A-seed3" / "rounds.jsonl"
    wait_until(lambda: rounds.is_file() and rounds.read_text().count("\n") > 1, "rounds")
    compare.send_signal(signal.SIGINT)
    said, complained = compare.communicate(timeout=PATIENCE)
    assert compare.returncode == 130
    assert "half-A-seed3: failed: interrupted\n" in said
    assert "stopping ..." in said
    assert complained.strip() == "prowd: interrupted; the same command runs what is left"
    assert "| A | " not in said
    assert (out / "report.html").is_file()
    assert not (out / "half-B-seed3").exists()
    assert flower.status(run_id_of(out / "half-A-seed3.log")) == "finished:stopped"
    # It is not written any more, so that the same command can begin it anew.
    with locked(rounds.parent):
        pass
