"""Federated averaging of Float32 clients as Flower has it, with the training that prowd's do."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from benchmarks.federation import CLIENTS, FEDERATION, ROUNDS, SETTINGS
from core.reference import PACKAGES
from core.settings import Settings
from prowd.compare.runs import PROJECT
from quant import FLOAT_BITS
from task.data.partition import client_images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

client = ClientApp()
server = ServerApp()

_PACKAGES = ("benchmarks", *PACKAGES)
_MARK = "seconds of rounds: "
_PYPROJECT = """
[project]
name = "plain-flower"
version = "1.0.0"
description = "Plain FedAvg"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "prowd"
fab-include = {includes}

[tool.flwr.app.components]
serverapp = "benchmarks.plain_flower:server"
clientapp = "benchmarks.plain_flower:client"
"""


def network() -> nn.Module:
    """Return the network that both sides begin with."""
    settings = Settings.of_run(SETTINGS)
    return build_model(settings.model, 1, settings.image_size, 10, seed=0)


@client.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the received model and send it back."""
    settings = Settings.of_run(SETTINGS)
    torch.set_num_threads(settings.client_threads)
    model = network()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    images = client_images(settings, int(context.node_config["partition-id"]), CLIENTS)
    score = train(model, images, LocalTraining.of(settings, FLOAT_BITS, 1, 0.0), seed=0).score
    metrics = MetricRecord({"num-examples": len(images), "train-loss": score.loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and log what each took."""
    ends: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    initial = ArrayRecord(network().state_dict())
    strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=note)
    seconds = [end - began for began, end in pairwise(ends[1:])]
    log(INFO, "%s%s", _MARK, json.dumps(seconds))


def seconds_of_rounds() -> list[float]:
    """Run it by `flwr run`, as prowd's rounds are, and return how long each took but the first."""
    with tempfile.TemporaryDirectory() as folder:
        _write_app(Path(folder))
        command = [sys.executable, "-m", "flwr.cli.app", "run", folder, "--stream"]
        command += ["--federation-config", FEDERATION]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(rf"{_MARK}(.*)", done.stdout)
    if not found:
        raise RuntimeError(f"plain Flower failed: {(done.stdout + done.stderr)[-2000:]}")
    return [float(second) for second in json.loads(found[1])]


def _write_app(folder: Path) -> None:
    """Make an app of this file and what it imports."""
    for package in _PACKAGES:
        shutil.copytree(PROJECT / package, folder / package)
    includes = [f"{package}/**/*.py" for package in _PACKAGES]
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(includes=json.dumps(includes)))
