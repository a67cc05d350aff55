"""docs/bring-your-own.md: each example run as it stands, by the real ServerApp and ClientApps."""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import tomllib

import pytest
import torch
from documents import PROJECT, importable, section
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from torch import nn

from quant import QuantConfig, prepare, quantizable_weights, quantize_model
from server_app.app import main

DEFAULTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with importable(tmp_path, "my_package"):
        yield tmp_path


def run(home, title, **changes):
    """Do what a section says, with two nodes in this process; return the run's folder."""
    example = section("bring-your-own.md", title)
    example.write(home)
    for words in example.commands:
        if words[0] == "python":
            runpy.run_path(str(home / words[1]))
    given = {**example.run_config, **{k.replace("_", "-"): v for k, v in changes.items()}}
    assert given.keys() <= DEFAULTS.keys()
    config = {**DEFAULTS, "run-name": "run", **given}
    nodes = {50 + i: ClientAppNode(i, 2, config) for i in range(2)}
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    return home / "prowd-runs" / "run"


def final_accuracy(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    return summary["accuracy"]["final"]["average"]


def test_any_folder_of_images(home):
    folder = run(home, "Images: any folder")
    # 1797 images: 359 of them are the test set, so an accuracy is a multiple of 1 / 359.
    assert final_accuracy(folder) >= 0.8
    hits = json.loads((folder / "summary.json").read_text())["accuracy"]["final"]["32"] * 359
    assert hits == pytest.approx(round(hits), abs=1e-6)
    identity = (folder / "checkpoint" / "last.safetensors").read_bytes()
    assert b"1438 + 359 images" in identity


def test_a_layer_of_ones_own_is_quantized(home):
    section("bring-your-own.md", "A layer").write(home)
    layers = importlib.import_module("my_package.layers")
    model = nn.Sequential(layers.LowRank(6, 2), nn.Linear(6, 3))
    assert quantizable_weights(model) == ["0.down", "0.up", "1.weight"]
    x = torch.randn(5, 6)
    rounded = quantize_model(model, 3).dequantize()
    expected = x @ rounded["0.down"].T @ rounded["0.up"].T
    assert torch.equal(prepare(model, QuantConfig(3))[0](x), expected)


def test_a_partition_file(home):
    folder = run(home, "Who holds which image: a partition file", model="cnn")
    parts = json.loads((home / "partition.json").read_text())
    assert [len(client) for client in parts["clients"]] == [500, 500]
    # Neither client alone, of even or odd digits, gets further than the half.
    assert final_accuracy(folder) >= 0.6
    assert json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])["left_out"] == {}


def test_the_package_is_sent_with_the_app(tmp_path):
    """What the two sections with code of the user's own begin with; twice does it once."""
    page = (PROJECT / "docs" / "bring-your-own.md").read_text()
    commands = re.findall(r"^grep -q my_package.*$", page, re.M)
    assert len(commands) == 2
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    before = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    before["tool"]["flwr"]["app"]["fab-include"].insert(0, "my_package/**/*.py")
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text()) == before


def test_a_model(home):
    folder = run(home, "A model")
    assert final_accuracy(folder) >= 0.8
    shapes = {n: list(t.shape) for n, t in load_file(folder / "model.safetensors").items()}
    assert shapes["0.weight"] == [16, 1, 3, 3]
    assert shapes["5.weight"] == [10, 256]


def test_a_strategy_and_going_on_with_its_settings(home):
    few = {"model": "toy:net", "samples_per_client": 64}
    folder = run(home, "A strategy", **few)
    config = json.loads((folder / "config.json").read_text())["settings"]
    assert config["strategy"] == "my_package.strategies:BitWeighted"
    assert config["strategy-options"] == "power = 0.5"
    resume = tomllib.loads((folder / "checkpoint" / "resume.toml").read_text())
    assert resume["strategy-options"] == "power = 0.5"
    again = {k.replace("-", "_"): v for k, v in resume.items()} | {"num_server_rounds": 4}
    run(home, "A strategy", **again)
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 4


def test_the_strategy_of_the_example_weighs_by_bits(home):
    """Two clients of ten examples, 4 and 16 bits, power 1/2: weights 10 * 2 and 10 * 4."""
    import torch
    from federation import ScriptedClient, federation, run_round, with_w

    section("bring-your-own.md", "A strategy").write(home)
    from my_package.strategies import BitWeighted, BitWeightedOptions

    state = {"bias": torch.zeros(3)}
    values = {4: 1.0, 16: 4.0}
    clients = [
        ScriptedClient(i, 2, bits, lambda start, v=value: {n: t + v for n, t in start.items()})
        for i, (bits, value) in enumerate(values.items())
    ]
    strategy = BitWeighted(BitWeightedOptions(power=0.5), with_w(norm_bound=0.0))
    new = run_round(strategy, federation(clients, state), state)
    assert new["bias"].tolist() == pytest.approx([(20 * 1 + 40 * 4) / 60] * 3)
