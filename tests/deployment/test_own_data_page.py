"""docs/own-data.md, as it is typed: three sites with folders of their own, one of which dies."""

import json
import os
import re
import signal

import pytest
from containers import PATIENCE, wait_until
from documents import section
from host import PROJECT, Host, activated, copy_project

pytestmark = pytest.mark.deployment

TITLE = "Hospitals: images that stay where they are"
LAB = """
[superlink.lab]
address = "127.0.0.1:8000"
insecure = true
"""


def blocks():
    page = (PROJECT / "docs" / "own-data.md").read_text()
    return re.findall(r"```bash\n(.*?)```", page.split(f"## {TITLE}\n")[1].split("\n## ")[0], re.S)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The run's record; the second site is killed in the second round and started again."""
    folder = tmp_path_factory.mktemp("hospitals")
    copy_project(folder)
    section("own-data.md", TITLE).write(folder / "prowd")
    superlink, devices, run = blocks()
    assert run.count("num-server-rounds=6") == 1
    run = run.replace(
        "num-server-rounds=6", f'num-server-rounds=6 node-wait={PATIENCE} run-name="run"'
    )
    [again] = re.findall(r"^flower-supernode.*?9095.*?&$", devices, re.S | re.M)
    with Host(folder) as host:
        (folder / ".flwr").mkdir()
        (folder / ".flwr" / "config.toml").write_text(f'[superlink]\ndefault = "lab"\n{LAB}')
        host.start(superlink, "superlink.log")
        wait_until(lambda: "Uvicorn running" in host.read("superlink.log"), "the SuperLink")
        host.start(f"{devices}\nwait", "devices.log")
        wait_until(lambda: activated(host, "superlink.log") == 3, "all sites are connected")
        running = host.start(run, "shell.log")
        record = folder / "prowd-runs" / "run" / "rounds.jsonl"
        wait_until(lambda: rounds_in(record) or running.poll() is not None, "a round")
        assert running.poll() is None, host.read("shell.log")
        kill(host, "9095")
        # It is refused until its old connection has lapsed, and ends: its owner starts it again.
        host.start(f"until {again.rstrip('&')}; do sleep 5; done", "again.log")
        running.wait(timeout=PATIENCE)
        yield host, [json.loads(line) for line in record.read_text().splitlines()]


def rounds_in(record):
    return record.read_text().count("\n") if record.exists() else 0


def kill(host, port):
    """End the SuperNode that has this port, and what it started, as a power failure does."""
    for process in [p for p in os.listdir("/proc") if p.isdigit()]:
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            with open(f"/proc/{process}/environ", "rb") as file:
                ours = f"HOME={host.folder}".encode() in file.read().split(b"\0")
        except OSError:
            continue
        if ours and port.encode() in words:
            os.kill(int(process), signal.SIGKILL)


def test_all_sites_take_part_with_their_own_folders(sites):
    host, rounds = sites
    output = host.read("shell.log")
    assert "prowd: completed" in output
    assert rounds[0]["clients"] == {"sampled": 3, "aggregated": 3, "rejected": 0, "failed": 0}
    assert (
        len(re.findall(r"number \d, data of its own, (?:4|8|32) bits, \d+ examples", output)) >= 3
    )


def test_sites_evaluate_at_their_widths(sites):
    _, rounds = sites
    assert set(rounds[0]["accuracy"]) == {"4", "8", "32", "average"}
    assert {"spread-4", "worst-8"} <= rounds[0]["evaluated_by_clients"].keys()
    # Of four classes, one of which the second site does not have.
    assert rounds[-1]["accuracy"]["average"] > 0.9


def test_a_site_that_died_is_left_out_and_comes_back(sites):
    _, rounds = sites
    used = [entry["clients"]["aggregated"] for entry in rounds]
    assert 2 in used
    assert used[-1] == 3
