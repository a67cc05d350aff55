"""docs/architecture.md: the strategy it adds works, and what it names is there."""

import importlib.util
import re
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from documents import PROJECT, section
from federation import ClientAppNode, InProcessGrid, ScriptedClient, federation, run_round
from flwr.app import Context, RecordDict

import strategies
from core.reference import PACKAGES
from server_app.app import main

PAGE = (PROJECT / "docs" / "architecture.md").read_text()
CONFIG = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.fixture
def cautious(tmp_path, monkeypatch):
    """The file and the line in the registry."""
    section("architecture.md", "A strategy").write(tmp_path)
    path = tmp_path / "strategies" / "cautious.py"
    spec = importlib.util.spec_from_file_location("strategies.cautious", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "strategies.cautious", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(strategies.STRATEGIES, "cautious", module.Cautious)
    return module


def test_the_strategy_steps_towards_the_mean(cautious):
    """From 1, clients of ten examples each at 2 and 6: the mean is 4, a quarter of the way 1.75."""
    state = {"bias": torch.ones(3)}
    clients = [
        ScriptedClient(i, 2, 32, lambda start, v=value: {n: t * v for n, t in start.items()})
        for i, value in enumerate((2.0, 6.0))
    ]
    strategy = cautious.Cautious(cautious.CautiousOptions(step=0.25))
    new = run_round(strategy, federation(clients, state), state)
    assert new["bias"].tolist() == [1.75, 1.75, 1.75]


def test_it_runs_by_its_name_with_its_setting(cautious, tmp_path):
    config = {**CONFIG, "strategy": "cautious", "cautious-step": 0.75, "model": "toy:net"}
    config |= {"num-server-rounds": 1, "samples-per-client": 32, "output-dir": str(tmp_path)}
    config |= {"run-name": "run"}
    nodes = {50 + i: ClientAppNode(i, 2, config) for i in range(2)}
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    assert '"status": "completed"' in (tmp_path / "run" / "summary.json").read_text()
    assert '"cautious-step": 0.75' in (tmp_path / "run" / "config.json").read_text()


def test_the_files_that_it_names_are_there():
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE)) - {"strategies/cautious.py"}
    assert len(named) >= 15
    assert [name for name in sorted(named) if not (PROJECT / name).is_file()] == []


def test_the_picture_and_the_words_have_the_same_folders():
    drawn = set(re.findall(r'^    (\w+)\["', PAGE, re.M))
    listed = set(re.findall(r"^\| `(\w+)/` \|", PAGE, re.M))
    assert drawn == listed == set(PACKAGES)


def files_between_training_and_the_next_model(output_dir):
    """Files of our own that a round of FedAvg enters from the end of training to the next model."""
    config = {**CONFIG, "strategy": "fedavg", "low-bit-training": "strict", "model": "toy:net"}
    config |= {"num-server-rounds": 1, "samples-per-client": 48, "run-name": "run"}
    config |= {"output-dir": str(output_dir)}
    entered, watching = set(), False

    def profile(frame, event, _):
        nonlocal watching
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if not path.is_relative_to(PROJECT) or path.is_relative_to(PROJECT / "tests"):
            return
        if event == "return" and name == "train" and path.name == "training.py":
            watching = True
        elif event == "return" and name == "aggregate_train":
            watching = False
        elif watching and event == "call":
            entered.add(str(path.relative_to(PROJECT)))

    node = ClientAppNode(0, 1, config, {"bits": 4})
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        main(InProcessGrid({50: node}), Context(1, 0, {}, RecordDict(), config))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return entered


def test_an_update_passes_the_files_of_the_table(tmp_path):
    table = PAGE.split("### From a trained model to the next one")[1].split("\n\n")[2]
    named = set(re.findall(r"^\| `([\w/]+\.py)`", table, re.M))
    assert files_between_training_and_the_next_model(tmp_path) == named
    assert len(named) <= 14
