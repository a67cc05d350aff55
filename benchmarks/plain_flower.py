"""Federated averaging of Float32 clients as Flower has it, with the training that prowd's do.

``python -m benchmarks.plain_flower`` runs it in Flower's simulation and prints, as its last line,
the seconds of each round, the first apart, as JSON.
"""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from benchmarks.federation import CLIENTS, ROUNDS, SETTINGS
from quant import FLOAT_BITS
from task.models import build_model
from task.partition import client_images
from task.settings import Settings
from task.training import LocalTraining, train

client = ClientApp()
server = ServerApp()


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
    """Run the rounds and print what each took."""
    ends: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    initial = ArrayRecord(network().state_dict())
    strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=note)
    seconds = [end - began for began, end in pairwise(ends[1:])]
    print(json.dumps(seconds), flush=True)


def seconds_of_rounds() -> list[float]:
    """Run it in a process of its own, as Ray stays in one."""
    command = [sys.executable, "-m", "benchmarks.plain_flower"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise RuntimeError(f"plain Flower failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    # By the name that Ray's processes import them by.
    from benchmarks.plain_flower import client as client_app
    from benchmarks.plain_flower import server as server_app

    run_simulation(
        server_app, client_app, CLIENTS, backend_config={"client_resources": {"num_cpus": 1}}
    )
