"""docker-compose.yml, rehearsed once for all tests of this folder."""

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from containers import Containers, wait_until

PROJECT = Path(__file__).parents[2]
NUM_SITES = 4


def _missing() -> str:
    """What this machine lacks for a rehearsal; empty if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "setpriv", "caddy"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"])
    return "this machine allows no namespaces" if probe.returncode else ""


@pytest.fixture(scope="session")
def compose():
    """The resolved compose file."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")
    words = ["docker-compose", "--profile", "operator", "config", "--format", "json"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Rehearsal(Containers):
    """The compose project, and what its operator does with it."""

    def start_run(self, name: str, app: str = ".", **settings) -> str:
        """Start a run of the app in a folder, and return its ID."""
        small = {"model": "cnn", "samples_per_client": 64}
        # A loaded machine starts four ClientApps slower than in the usual minute.
        settings = {"run_name": name, "node_wait": 300.0, **small, **settings}
        config = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in settings.items())
        words = ("flwr", "run", app, "prowd", "--format", "json", "--run-config", config)
        done = self.run("operator", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(json.loads(done.stdout)["run-id"])

    def status(self, run_id: str) -> str:
        done = self.run("operator", "flwr", "ls", "prowd", "--run-id", run_id, "--format", "json")
        # A SuperLink that is just coming back has no answer.
        runs = json.loads(done.stdout or "{}").get("runs")
        return runs[0]["status"] if runs else "unknown"

    def wait_for_run(self, name: str, run_id: str, seconds: float) -> str:
        """Wait until a run has finished; how it did."""
        # By its record at first, as to ask Flower takes seconds of this machine's time.
        wait_until(lambda: self.summary(name)["status"] != "running", seconds, f"{name} ends")
        wait_until(lambda: self.status(run_id).startswith("finished"), 60, f"{name} has finished")
        return self.status(run_id)

    def results(self, name: str) -> Path:
        return self.folder / "volumes" / "results" / name

    def rounds(self, name: str) -> list[dict]:
        file = self.results(name) / "rounds.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def summary(self, name: str) -> dict:
        file = self.results(name) / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {"status": "running"}

    def begin_round(self, run_id: str, site: str, number: int) -> None:
        """Wait until a site has received its training message of a round, by its own log."""
        pattern = re.compile(rf"RUN {run_id}\]\s.*?Receiving: train")
        service = self.services[site]
        wait_until(
            lambda: len(pattern.findall(service.log)) >= number, 600, f"round {number} at {site}"
        )

    def online(self) -> int:
        done = self.run("operator", "flwr", "supernode", "ls", "prowd", "--format", "json")
        nodes = json.loads(done.stdout or "{}").get("nodes", [])
        return sum(node["status"] == "online" for node in nodes)


# A machine of somebody else, which reaches the port that the proxy publishes.
INTRUDER = {
    "user": "49999:49999",
    "profiles": ["intruder"],
    "networks": {"outside": None},
    "environment": {
        "HOME": "/srv/prowd",
        "FLWR_HOME": "/srv/prowd/keys/operator",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    },
    "working_dir": "/srv/prowd/app",
    "volumes": [{"type": "volume", "source": "intruder", "target": "/srv/prowd/keys"}],
}


@pytest.fixture(scope="session")
def rehearsal(compose, tmp_path_factory):
    """The whole project, up, with all four sites online, and an intruder on the same network."""
    if missing := _missing():
        pytest.skip(missing)
    project = {**compose, "services": {**compose["services"], "intruder": INTRUDER}}
    containers = Rehearsal(project, tmp_path_factory.mktemp("compose"), PROJECT)
    try:
        containers.build_networks()
        containers.up()
        wait_until(lambda: containers.online() == NUM_SITES, 90, "four sites online")
        yield containers
    finally:
        containers.down()


@dataclass(frozen=True)
class Resumed:
    """A run whose ServerApp was killed in its second round, and what `resume` made of it.

    With how the killed one stands, and the exit codes of all services' processes that had ended.
    """

    before: list[dict]
    rounds: list[dict]
    status: str
    killed_status: str
    exits: dict[str, list[int]]


@pytest.fixture(scope="session")
def resumed(rehearsal):
    killed_id = rehearsal.start_run("killed", num_server_rounds=2)
    rehearsal.begin_round(killed_id, "int4", 2)
    before = rehearsal.rounds("killed")
    [pid] = rehearsal.services["serverapp"].process_ids("flwr-serverapp")
    os.kill(pid, signal.SIGKILL)
    folder = "/srv/prowd/prowd-runs/killed"
    run_id = rehearsal.start_run("", num_server_rounds=2, resume=folder)
    status = rehearsal.wait_for_run("killed", run_id, 600)
    exits = {name: list(s.exits) for name, s in rehearsal.services.items() if s.exits}
    killed_status = rehearsal.status(killed_id)
    return Resumed(before, rehearsal.rounds("killed"), status, killed_status, exits)
