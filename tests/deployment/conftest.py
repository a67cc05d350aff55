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
from containers import PATIENCE, Containers, wait_until

from core.reference import PACKAGES

PROJECT = Path(__file__).parents[2]
SITES = INT4, INT8_A, INT8_B, FLOAT32 = "int4", "int8-a", "int8-b", "float32"
NUM_SITES = len(SITES)


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
def resolved():
    """Resolve the compose file, with some environment variables."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")

    def resolve(**variables):
        words = ["docker-compose", "--profile", "*", "config", "--format", "json"]
        known = {k: v for k, v in os.environ.items() if not k.startswith("PROWD_")}
        env = {**known, **variables}
        done = subprocess.run(words, cwd=PROJECT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return resolve


@pytest.fixture(scope="session")
def compose(resolved):
    """The resolved compose file."""
    return resolved()


class Rehearsal(Containers):
    """The compose project, and what its operator does with it."""

    def start_run(self, name: str, app: str = ".", **settings) -> str:
        """Start a run of the app in a folder, and return its ID."""
        small = {"model": "toy:net"}
        # A loaded machine starts four ClientApps slower than in the usual minute.
        settings = {"run_name": name, "node_wait": PATIENCE, **small, **settings}
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

    def wait_for_run(self, name: str, run_id: str) -> str:
        """Wait until a run has finished; how it did."""
        # By its record at first, as to ask Flower takes seconds of this machine's time.
        wait_until(lambda: self.summary(name)["status"] != "running", f"{name} ends")
        wait_until(lambda: self.status(run_id).startswith("finished"), f"{name} has finished")
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
        wait_until(lambda: len(pattern.findall(service.log)) >= number, f"round {number} at {site}")

    def fill(self) -> None:
        """Give the sites data, by the page's command, so that each has another number of images."""
        done = self.run("samples")
        assert done.returncode == 0, done.stdout + done.stderr
        for number, site in enumerate(SITES):
            images = (self.folder / "volumes" / f"data-{site}").glob("*/*.png")
            for image in sorted(images, key=lambda path: int(path.stem))[64 + 20 * number :]:
                image.unlink()
            (self.folder / "volumes" / f"state-{site}" / "site").write_text(site)

    def numbers(self) -> dict[str, str]:
        """Return the numbers that the server gave the sites, as keys of the record, by name."""
        states = {site: self.folder / "volumes" / f"state-{site}" for site in SITES}
        return {site: (state / "number").read_text() for site, state in states.items()}

    def online(self) -> int:
        """Sites that the SuperLink has activated, by its own log."""
        return self.services["superlink"].log.count('activate-node HTTP/1.1" 200')


# An outside machine, which reaches the port that the proxy publishes.
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
        wait_until(lambda: containers.online() == NUM_SITES, "four sites online")
        containers.fill()
        yield containers
    finally:
        containers.down()


# What the run's copy of the app does with a training message, by round and site.
FAULTS = {2: {INT8_A: "raise"}, 3: {INT8_A: "die", INT4: "answer late"}}


@dataclass(frozen=True)
class Story:
    """One run in which nearly all goes wrong, at its end.

    Round 2 begins, and the ServerApp is killed; `resume` begins it again. Then one ClientApp
    raises, one site's SuperNode is killed while its ClientApp trains, one site's link is cut. Round
    3: one ClientApp's process dies, one answers after the round's timeout. Round 4: everybody is
    back, and the SuperLink is killed.

    Attributes
    ----------
    exits : dict of str to list of int
        Exit codes of all services' processes that had ended before anything was killed.
    before : list of dict
        The rounds before the ServerApp was killed.
    killed_status, status : str
        How the killed run and the one that resumed it ended for Flower.
    rounds : list of dict
        All rounds.
    numbers : dict of str to str
        What the sites are called there, in the order int4, int8-a, int8-b, float32.
    """

    exits: dict[str, list[int]]
    before: list[dict]
    killed_status: str
    status: str
    rounds: list[dict]
    numbers: dict[str, str]


@pytest.fixture(scope="session")
def story(rehearsal):
    source = rehearsal.results("faulty-app")
    copy_app(rehearsal.app, source)
    app = f"/srv/prowd/prowd-runs/{source.name}"
    settings = {
        "num_server_rounds": 4,
        # Nodes that were away are waited for before a round, so that each loss is the fault tested.
        "min_nodes": NUM_SITES,
        # So that the bytes tell what came.
        "lossless_coding": False,
    }
    killed_id = rehearsal.start_run("run", app, **settings)
    rehearsal.begin_round(killed_id, "int4", 2)
    exits = {name: list(s.exits) for name, s in rehearsal.services.items() if s.exits}
    before = rehearsal.rounds("run")
    [pid] = rehearsal.services["serverapp"].process_ids("flwr-serverapp")
    os.kill(pid, signal.SIGKILL)

    run_id = rehearsal.start_run("", app, resume="/srv/prowd/prowd-runs/run", **settings)
    rehearsal.begin_round(run_id, "int8-b", 1)
    rehearsal.set_link("int8-b", "uplink-int8-b", "down")
    rehearsal.begin_round(run_id, "float32", 1)
    rehearsal.services["float32"].kill()
    wait_until(lambda: len(rehearsal.rounds("run")) == 2, "round 2 ends")
    rehearsal.set_link("int8-b", "uplink-int8-b", "up")
    wait_until(lambda: len(rehearsal.rounds("run")) == 3, "round 3 ends")
    (rehearsal.folder / "volumes" / "state-int4" / "round-3-is-over").touch()
    rehearsal.begin_round(run_id, "int4", 3)
    rehearsal.services["superlink"].kill()
    status = rehearsal.wait_for_run("run", run_id)
    killed_status, rounds = rehearsal.status(killed_id), rehearsal.rounds("run")
    return Story(exits, before, killed_status, status, rounds, rehearsal.numbers())


def copy_app(source: Path, folder: Path) -> None:
    """Write a copy of the app with the faults in its ClientApp and a clock in its ServerApp."""
    for name in PACKAGES:
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md"):
        shutil.copy(source / name, folder / name)
    settings = (source / "pyproject.toml").read_text()
    for old, new in (
        ('"client_app.app:app"', '"faulty:client"'),
        ('"server_app.app:app"', '"faulty:server"'),
        ('"client_app/**/*.py",', '"client_app/**/*.py", "faulty.py", "toy.py",'),
    ):
        assert settings.count(old) == 1
        settings = settings.replace(old, new)
    (folder / "pyproject.toml").write_text(settings)
    shutil.copy(PROJECT / "tests" / "toy.py", folder)
    faulty = (Path(__file__).parent / "faulty.py").read_text()
    assert faulty.count("FAULTS = {}") == 1
    (folder / "faulty.py").write_text(faulty.replace("FAULTS = {}", f"FAULTS = {FAULTS!r}"))
