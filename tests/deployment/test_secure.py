"""Secure aggregation between real SuperNodes, one of which is killed while its client trains."""

import json
import os
import shutil
import signal

import pytest
from containers import PATIENCE, wait_until
from host import PROJECT, Host, activated, copy_project

from privacy.sum_grid import sum_widths
from quant import spec_of
from task.models import build_model

pytestmark = pytest.mark.deployment

DEVICES, KILLED, ROUNDS = 4, 2, 2
LAB = '[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:8000"\ninsecure = true\n'
RUN = (
    'flwr run . lab --stream --run-config \'secure-aggregation=true weighting="uniform" '
    f'strategy="prowd" model="toy:net" num-server-rounds={ROUNDS} min-nodes=3 '
    f'node-wait={PATIENCE} run-name="run"\''
)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The lines of the run's record."""
    folder = tmp_path_factory.mktemp("secure")
    copy_project(folder)
    with_a_client_that_gets_stuck(folder / "prowd")
    with Host(folder, "secure") as host:
        (folder / ".flwr").mkdir()
        (folder / ".flwr" / "config.toml").write_text(LAB)
        host.start("flower-superlink --insecure", "superlink.log")
        wait_until(lambda: "Uvicorn running" in host.read("superlink.log"), "the SuperLink")
        devices = [start_device(host, number) for number in range(DEVICES)]
        wait_until(lambda: activated(host, "superlink.log") == DEVICES, "all are connected")
        stuck = folder / f"state-{KILLED}"
        (stuck / "gets-stuck").touch()
        running = host.start(RUN, "shell.log")
        trains = stuck / "trains"
        wait_until(lambda: trains.exists() or running.poll() is not None, "it trains")
        assert trains.exists(), host.read("shell.log")
        os.killpg(devices[KILLED].pid, signal.SIGKILL)
        running.wait(timeout=PATIENCE)
        assert "prowd: completed" in host.read("shell.log"), host.read("shell.log")
        lines = (folder / "prowd-runs" / "run" / "rounds.jsonl").read_text().splitlines()
        yield [json.loads(line) for line in lines]


def start_device(host, number):
    """Start a SuperNode of 4 bits, the leader of a process group of its own."""
    (host.folder / f"state-{number}").mkdir()
    config = f"partition-id={number} num-partitions={DEVICES} bits=4"
    config += f' state-dir="{host.folder}/state-{number}"'
    words = f"flower-supernode --insecure --superlink 127.0.0.1:8000 --port {9094 + number}"
    return host.start(f"exec {words} --node-config '{config}'", f"{number}.log")


def with_a_client_that_gets_stuck(app):
    settings = (app / "pyproject.toml").read_text()
    for old, new in (
        ('"client_app.app:app"', '"stuck:app"'),
        ('"client_app/**/*.py",', '"client_app/**/*.py", "stuck.py", "toy.py",'),
    ):
        assert settings.count(old) == 1
        settings = settings.replace(old, new)
    (app / "pyproject.toml").write_text(settings)
    shutil.copy(PROJECT / "tests" / "toy.py", app)
    shutil.copy(PROJECT / "tests" / "deployment" / "stuck.py", app)


def test_the_killed_device_is_left_out_by_name(record):
    first, _ = record
    assert first["clients"] == {"sampled": 4, "aggregated": 3, "rejected": 0, "failed": 1}
    assert list(first["left_out"]) == [str(KILLED)]


def test_the_record_says_how_many_are_in_the_sum(record):
    for entry in record:
        assert list(entry["secure"]) == ["4"]
        assert entry["secure"]["4"]["devices"] == 3
    # The group that begins has four devices, and the next one three: 28 and 21 codes to each side.
    first, second = (entry["secure"]["4"] for entry in record)
    assert (first["code-bits"], second["code-bits"]) == (6, 6)
    assert (first["float-bits"], second["float-bits"]) == (22, 22)


def test_the_others_complete_the_next_round_without_it(record):
    assert record[-1]["clients"] == {"sampled": 3, "aggregated": 3, "rejected": 0, "failed": 0}
    assert record[-1]["left_out"] == {}


def test_masked_updates_have_the_bytes_of_their_bits(record, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "tests")
    spec = spec_of(build_model("toy:net", 1, 8, 10, seed=0))
    parts = sum_widths(spec, 4, 20, total_weight=4)
    one = sum(-(-count * bits // 8) for count, bits in parts)
    assert record[0]["uplink_bytes"] == {"4": 3 * one}
