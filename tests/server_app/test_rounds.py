"""A whole run in one process: the real server loop and ClientApp over an in-process grid."""

import itertools
import json
import logging
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from federation import ClientAppNode, InProcessGrid, SimulatedGrid
from flwr.app import Context, Error, Message, RecordDict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import client_app.app
import task.data.dataset
from client_app.state_store import own_model
from core.clock import clock
from core.errors import SettingsError
from exchange.protocol import UPDATE
from quant import decode, spec_of
from server_app.app import main
from server_app.rounds import format_bytes, format_round
from strategies import FedAvg
from task.models import MODELS, build_model

SMALL = {
    "num-server-rounds": 2,
    "samples-per-client": 64,
    "server-buffer": 64,
    "server-threads": 1,
    "model": "toy:net",
}


def run(tmp_path, clients=2, node_configs=None, **changes):
    """Run the ServerApp's main with real ClientApps; return the run's folder."""
    config = {
        **SMALL,
        "output-dir": str(tmp_path),
        "run-name": "run",
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    nodes = {}
    for i in range(clients):
        own = (node_configs or {}).get(i)
        nodes[50 + i] = ClientAppNode(i, clients, config, own)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    main(InProcessGrid(nodes), context)
    return tmp_path / config["run-name"]


def rounds_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


class DrainingOnly(FedAvg):
    """Aggregates by itself, and keeps the model."""

    def aggregate_train(self, server_round, replies):
        self.round_log.aggregated += [reply.metadata.src_node_id for reply in replies]
        return None, None


def test_a_strategy_that_aggregates_by_itself_has_times_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_strategies", sys.modules[__name__])
    for entry in rounds_of(run(tmp_path, strategy="own_strategies:DrainingOnly")):
        seconds = entry["seconds"]
        assert 0 < seconds["train"] <= seconds["round"]
        assert 0 <= seconds["aggregate"] <= seconds["round"]


@pytest.mark.parametrize("strategy", ["prowd", "fedavg"])
@pytest.mark.parametrize("training", ["qat", "strict"])
def test_a_run_completes_with_accuracy_per_width(tmp_path, strategy, training):
    folder = run(tmp_path, strategy=strategy, low_bit_training=training, bit_mix="4:0.5,32:0.5")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    first, last = rounds_of(folder)
    assert list(last["accuracy"]) == ["4", "32", "average"]
    expected = (last["accuracy"]["4"] + last["accuracy"]["32"]) / 2
    assert last["accuracy"]["average"] == pytest.approx(expected)
    assert last["loss"]["average"] < first["loss"]["average"] < 2.4
    assert last["clients"] == {"sampled": 2, "aggregated": 2, "rejected": 0, "failed": 0}
    # A 4-bit client sends about an eighth of a float32 model; the small model adds a little.
    assert last["uplink_bytes"]["4"] < last["uplink_bytes"]["32"] * 0.18
    # So is what it is sent, where it is sent codes.
    narrow = strategy == "prowd" and training == "strict"
    share = last["downlink_bytes"]["4"] / last["downlink_bytes"]["32"]
    assert 0 < share < 0.18 if narrow else share == 1
    model = load_file(folder / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in model.values())


def test_the_papers_literal_form_in_the_docs_runs(tmp_path):
    """The settings of the page's own line; the literal 1/N with masks is known to learn badly."""
    page = (Path(__file__).parents[2] / "docs/strategies.md").read_text()
    line = next(text for text in page.splitlines() if 'strategy="prowd-paper"' in text)
    literal = tomllib.loads("\n".join(re.search("'(.*)'", line).group(1).split()))
    folder = run(tmp_path, **literal)
    first, second = rounds_of(folder)
    assert first["prowd-paper"]["mask-density-8"] <= 0.5
    assert second["clients"]["aggregated"] == 2


def test_local_clients_learn_on_their_own(tmp_path):
    folder = run(tmp_path, strategy="local", bit_mix="4:0.5,32:0.5", num_server_rounds=3)
    entries = rounds_of(folder)
    assert entries[0]["uplink_bytes"] == {"4": 0, "32": 0}
    assert [sum(e["downlink_bytes"].values()) > 0 for e in entries] == [True, False, False]
    assert entries[2]["loss"]["average"] < entries[0]["loss"]["average"]
    assert not (folder / "model.safetensors").exists()


def test_node_config_decides_the_width_where_it_has_one(tmp_path):
    folder = run(tmp_path, node_configs={0: {"bits": 2}, 1: {"bits": 5}}, num_server_rounds=1)
    assert list(rounds_of(folder)[0]["accuracy"]) == ["2", "5", "average"]


def test_a_node_with_a_wrong_width_is_refused_and_the_other_continues(tmp_path):
    folder = run(tmp_path, node_configs={0: {"bits": 17}}, num_server_rounds=1)
    entry = rounds_of(folder)[0]
    assert entry["clients"]["sampled"] == 1
    assert list(entry["accuracy"]) == ["32", "average"]


@pytest.mark.parametrize("claim", [65, 1373])
def test_a_node_that_claims_more_images_than_its_part_has_is_refused(tmp_path, monkeypatch, claim):
    """Of 1437 training images the server takes 64; each of two clients uses 64 of its half."""
    real = client_app.app.declare

    def greedy(node_config, *more):
        declared = real(node_config, *more)
        return replace(declared, num_examples=claim) if declared.partition_id == 0 else declared

    monkeypatch.setattr("client_app.app.declare", greedy)
    folder = run(tmp_path, num_server_rounds=1, node_wait=0.3)
    entry = rounds_of(folder)[0]
    assert entry["clients"]["sampled"] == 1
    assert list(entry["accuracy"]) == ["32", "average"]


def test_clients_evaluate_when_asked(tmp_path):
    folder = run(tmp_path, fraction_evaluate=1.0, num_server_rounds=1)
    by_clients = rounds_of(folder)[0]["evaluated_by_clients"]
    assert set(by_clients) == {
        f"{kind}-{width}"
        for kind in ("accuracy", "loss", "spread", "worst")
        for width in ("8", "32", "average")
    }


def test_what_was_left_out_of_training_and_of_evaluation_stand_apart(tmp_path, monkeypatch):
    """One client fails in training; in the evaluation it fails for another reason, one more too."""
    real = ClientAppNode.__call__

    def failing(node, message):
        partition, kind = node.config["partition-id"], message.metadata.message_type
        if (partition, kind) in {(0, "train"), (0, "evaluate"), (1, "evaluate")}:
            return Message(Error(code=2, reason=f"no power to {kind}"), reply_to=message)
        return real(node, message)

    monkeypatch.setattr(ClientAppNode, "__call__", failing)
    folder = run(tmp_path, clients=3, fraction_evaluate=1.0, num_server_rounds=1)
    [entry] = rounds_of(folder)
    assert entry["clients"] == {"sampled": 3, "aggregated": 2, "rejected": 0, "failed": 1}
    assert entry["left_out"] == {"0": "no power to train"}
    assert entry["left_out_of_evaluation"] == dict.fromkeys("01", "no power to evaluate")


def test_evaluation_can_be_rarer_but_the_last_round_has_it(tmp_path):
    folder = run(tmp_path, num_server_rounds=3, evaluate_every=2)
    assert [bool(e["accuracy"]) for e in rounds_of(folder)] == [False, True, True]
    # Weights are recorded in the same rounds.
    lines = (folder / "weights.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [2, 3]


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    def model(name, seed):
        return (run(tmp_path, run_name=name, seed=seed) / "model.safetensors").read_bytes()

    first = model("a", 0)
    assert model("b", 0) == first
    assert model("c", 1) != first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "fedsgd"}, "strategy: there is no 'fedsgd'"),
        ({"bit_mix": "1:0.5,32:0.5"}, "1 is not a bit-width"),
        ({"bit_mix": "33:0.5,32:0.5"}, "33 is not a bit-width"),
        ({"bit_mix": "8:0.5,32:0.4"}, "add up to 0.9"),
        ({"bit_mix": "8:0.1,32:0.9"}, "leaves width 8 without a client among 2"),
        ({"learning_rate": "oops"}, "learning-rate: 'oops'"),
        ({"dataset": "image-folder", "data_dir": "/nowhere"}, "data-dir: there is no folder"),
        ({"server_buffer": 5000}, "server-buffer: 5000"),
        ({"model": "resnet9000"}, "model: 'resnet9000'"),
        ({"samples_per_client": 5000}, "samples-per-client: 5000"),
    ],
)
def test_a_bad_setting_is_one_line_before_any_training(tmp_path, changes, reason):
    with pytest.raises(Exception, match=r"."):
        run(tmp_path, **changes)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert reason in summary["reason"]
    assert "\n" not in summary["reason"]
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_the_classes_of_a_folder_are_logged_once_by_the_server(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    monkeypatch.setattr(task.data.dataset, "CACHE", tmp_path / "cache")
    for number, (name, count) in enumerate((("ant", 10), ("bee", 10), ("cat", 1))):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.full((8, 8), 200 + 10 * number + index, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{index}.png")
    (tmp_path / "in" / "ant" / "0.gif").write_bytes(b"none")
    run(
        tmp_path,
        dataset="image-folder",
        data_dir=str(tmp_path / "in"),
        samples_per_client=0,
        server_buffer=4,
        num_server_rounds=1,
    )
    said = [record.getMessage() for record in caplog.records]
    assert sum("classes, training" in line for line in said) == 1
    assert said[:3] == [
        "prowd: 3 classes, training + evaluation images: ant 8 + 2, bee 8 + 2, cat 1 + 0",
        "prowd: data-dir: not used, as no image by its suffix or in no class folder: "
        f"{tmp_path}/in/ant/0.gif",
        "prowd: the evaluation images hold none of the classes cat",
    ]


class NanInEvaluation(nn.Sequential):
    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training or len(x) == 2 else logits * float("nan")


def test_logits_that_are_nan_are_no_answers_and_are_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    monkeypatch.setitem(
        MODELS,
        "nan",
        lambda _, size, classes: NanInEvaluation(nn.Flatten(), nn.Linear(size**2, classes)),
    )
    run(tmp_path, model="nan", num_server_rounds=1)
    assert {r.getMessage() for r in caplog.records if "the loss of" in r.getMessage()} == {
        "prowd: the loss of the model at 8 bits is nan",
        "prowd: the loss of the model at 32 bits is nan",
    }
    [line] = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["accuracy"] == {"8": 0.0, "32": 0.0, "average": 0.0}


def test_a_bad_output_dir_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="output-dir: 'runs' is not allowed"):
        run(tmp_path, output_dir="runs")


def test_the_rounds_line():
    entry = {
        "round": 3,
        "accuracy": {"8": 0.5, "32": 0.75, "average": 0.625},
        "uplink_bytes": {"8": 1000, "32": 250},
        "downlink_bytes": {"8": 999},
        "clients": {"aggregated": 5, "sampled": 5, "rejected": 0, "failed": 0},
        "left_out_of_evaluation": {},
        "seconds": {"round": 2.34},
    }
    assert format_round(entry, 10, 65.0) == (
        "round 3/10 | 8-bit 50.00% 32-bit 75.00% average 62.50% | up 1.2 kB, down 999 B | "
        "clients 5 of 5 | 2.3 s, 1:05 left"
    )
    entry["clients"] = {"aggregated": 2, "sampled": 5, "rejected": 1, "failed": 2}
    entry["left_out_of_evaluation"] = {"3": "no reply in time"}
    assert " | clients 2 of 5 (1 rejected, 2 failed, 1 not in the evaluation) | " in format_round(
        entry, 10, 65.0
    )
    assert format_round(entry, 10, 5400.0).endswith(" | 2.3 s, 1:30:00 left")


def line_of(board, server_round, num_rounds):
    """Write the line of a round with nothing but what TensorBoard shows of it."""
    shown = {
        tag: scalar.value
        for tag in board.Tags()["scalars"]
        for scalar in board.Scalars(tag)
        if scalar.step == server_round
    }
    own = "evaluated_by_clients"
    accuracy = " ".join(
        f"{width}{'' if width == 'average' else '-bit'} {shown[f'accuracy/{width}']:.2%}"
        for width in ("8", "32", "average")
        if f"accuracy/{width}" in shown
    )
    on_devices = "; ".join(
        f"{width}-bit {found[0]:.2%} ± {found[1]:.2%}, worst {found[2]:.2%}"
        for width in ("8", "32")
        if (found := [shown.get(f"{own}/{k}-{width}") for k in ("accuracy", "spread", "worst")])[0]
        is not None
    )
    up, down = (format_bytes(shown[f"{way}_bytes/all"]) for way in ("uplink", "downlink"))
    missing = {
        "rejected": shown["clients/rejected"],
        "failed": shown["clients/failed"],
        "not in the evaluation": shown["clients/not_in_the_evaluation"],
    }
    named = ", ".join(f"{n:.0f} {what}" for what, n in missing.items() if n)
    return (
        f"round {server_round}/{num_rounds} | {accuracy or 'not evaluated'}"
        f"{f' | devices: {on_devices}' if on_devices else ''} | "
        f"up {up}, down {down} | "
        f"clients {shown['clients/aggregated']:.0f} of {shown['clients/sampled']:.0f}"
        f"{f' ({named})' if named else ''} | "
        f"{shown['seconds/round']:.1f} s, {clock(shown['seconds/left'])} left"
    )


def test_tensorboard_shows_all_that_the_line_of_a_round_shows(tmp_path, monkeypatch):
    """Of a round without evaluation, and of one in which a client is missing everywhere."""
    real, lines = ClientAppNode.__call__, []

    def failing(node, message):
        if (node.config["partition-id"], message.metadata.message_type) in {
            (0, "train"),
            (0, "evaluate"),
        }:
            return Message(Error(code=2, reason="no power"), reply_to=message)
        return real(node, message)

    def log(_, form, *values):
        lines.append(form % values)

    monkeypatch.setattr(ClientAppNode, "__call__", failing)
    monkeypatch.setattr("server_app.rounds.log", log)
    # So that some time is left after the first round: 1000 s a reading of the clock.
    readings = itertools.count(step=1000.0)
    clock = SimpleNamespace(monotonic=readings.__next__)
    for module in ("server_app.rounds", "strategies.base"):
        monkeypatch.setattr(f"{module}.time", clock)
    folder = run(tmp_path, clients=3, fraction_evaluate=1.0, evaluate_every=2)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    rounds = [line for line in lines if line.startswith("round ")]
    assert rounds == [line_of(board, server_round, 2) for server_round in (1, 2)]
    assert "not evaluated" in rounds[0]
    # Five readings until the first round is recorded, and another round to come.
    assert rounds[0].endswith(" | 3000.0 s, 1:23:20 left")
    assert "(1 failed, 1 not in the evaluation)" in rounds[1]
    assert rounds[1].endswith(", 0:00 left")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.2e9, "3.2 GB")]
)
def test_bytes_are_given_with_a_unit(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("strategy", ["prowd", "fedavg", "local"])
def test_fixed_point_clients_stay_on_one_grid(tmp_path, strategy):
    """What an 8-bit client sends are multiples of the one step, whatever layer they belong to."""
    sent = []

    class Listening(ClientAppNode):
        def __call__(self, message):
            reply = super().__call__(message)
            if reply.has_content() and UPDATE in reply.content:
                sent.append(reply.content[UPDATE][UPDATE].data)
            return reply

    config = {**SMALL, "output-dir": str(tmp_path), "run-name": "run", "strategy": strategy}
    config |= {"weight-step": 2**-6, "low-bit-training": "strict", "bit-mix": "8:0.5,32:0.5"}
    config["lossless-coding"] = False  # read here without the start
    nodes = {50 + i: Listening(i, 2, config) for i in range(2)}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    main(InProcessGrid(nodes), context)
    spec = spec_of(build_model("toy:net", 1, 8, 10, seed=0))
    if strategy == "local":
        state, scales = own_model(nodes[50].context.state)
        for name, scale in scales.items():
            assert torch.equal(scale, torch.full_like(scale, 2**-6))
            assert torch.equal(state[name] * 64, (state[name] * 64).round())
        return
    updates = [decode(data, spec, 8, stamp=r) for r, data in enumerate(sent[1::2], 1)]
    assert len(updates) == 2
    for update in updates:
        for tensor in update.quantized.values():
            assert torch.equal(tensor.scale, torch.full_like(tensor.scale, 2**-6))
            assert tensor.codes.unique().numel() > 3


def test_fixed_point_is_for_strict_training(tmp_path):
    with pytest.raises(SettingsError, match=r"weight-step: 0\.5 with low-bit-training qat"):
        run(tmp_path, weight_step=0.5)


@pytest.mark.parametrize(("grid", "asked"), [(InProcessGrid, [0, 1]), (SimulatedGrid, [])])
def test_networked_nodes_are_held_to_the_partition_and_simulated_ones_need_not_be(
    tmp_path, monkeypatch, grid, asked
):
    """Known from the grid: the server begins before Flower's simulation has started Ray."""
    held = []

    def partition_size(task, partition_id, num_partitions):
        held.append(partition_id)
        return 64

    monkeypatch.setattr("task.images.ImageTask.partition_size", partition_size)
    config = {**SMALL, "num-server-rounds": 1, "output-dir": str(tmp_path), "run-name": "run"}
    nodes = {50 + i: ClientAppNode(i, 2, config) for i in range(2)}
    main(grid(nodes), Context(1, 0, {}, RecordDict(), config))
    assert sorted(set(held)) == asked
