"""docs/own-data.md: its examples in simulation, by the real ServerApp and ClientApps."""

import json
import shutil
import subprocess
import sys
import tomllib

import pytest
from documents import PROJECT, importable, section
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from server_app.app import main

DEFAULTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def run(tmp_path, given, clients=3):
    assert given.keys() <= DEFAULTS.keys()
    config = {**DEFAULTS, **given, "output-dir": str(tmp_path), "run-name": "run"}
    nodes = {50 + i: ClientAppNode(i, clients, config) for i in range(clients)}
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_wearables(tmp_path):
    example = section("own-data.md", "Wearables: a signal, a loss and metrics of your own")
    example.write(tmp_path)
    with importable(tmp_path, "wearables"):
        rounds = run(tmp_path, example.run_config)
    assert rounds[-1]["clients"]["aggregated"] == 3
    assert set(rounds[-1]["accuracy"]) == {"4", "8", "32", "average"}
    # A guess has a third.
    assert rounds[-1]["accuracy"]["32"] > 0.6


def test_keyboards(tmp_path):
    rounds = run(tmp_path, section("own-data.md", "Keyboards: text").run_config, clients=2)
    assert rounds[-1]["clients"]["aggregated"] == 2
    # The space, the commonest byte, has some 20 %.
    assert rounds[-1]["accuracy"]["average"] > 0.2
    assert rounds[-1]["loss"]["average"] < rounds[0]["loss"]["average"]


@pytest.fixture
def checkout(tmp_path):
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def new(folder, name):
    command = [sys.executable, "-m", "prowd", "new", name]
    env = {"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_new_task_runs_at_once(checkout):
    said = new(checkout, "my_signals")
    assert said.returncode == 0, said.stderr
    command = said.stdout.splitlines()[-1]
    given = parse_config_args([command.split("--run-config ")[1].strip("'")])
    assert given == {"task": "my_signals:MySignals"}
    app = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["fab-include"][0] == "my_signals.py"
    with importable(checkout, "my_signals"):
        rounds = run(checkout, given, clients=2)
    assert rounds[-1]["accuracy"]["average"] > 0.85


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("task", "NAME: 'task' is a package of prowd's own"),
        ("2fast", "NAME: '2fast' is no module's name; allowed: as in my_task"),
        ("class", "NAME: 'class' is no module's name"),
        ("none", "NAME: 'none' is taken in Python"),
        ("json", "NAME: 'json' is taken in Python"),
        ("taken", "taken.py exists already; allowed: another name"),
    ],
)
def test_a_name_that_cannot_be_is_refused(checkout, name, line):
    (checkout / "taken.py").touch()
    before = (checkout / "pyproject.toml").read_text()
    said = new(checkout, name)
    assert said.returncode != 0
    assert said.stderr.startswith("prowd: ")
    assert line in said.stderr
    assert said.stderr.count("\n") == 1
    assert (checkout / "pyproject.toml").read_text() == before


def test_it_is_run_in_a_checkout(tmp_path):
    assert "is no checkout of prowd; allowed: run it in one" in new(tmp_path, "my_task").stderr
