"""The paper's first table as a contract: what every system really puts on the wire, per width.

The real ClientApp and the real server loop run over an in-process grid that keeps every message. A
payload says its own width in byte 5 of the header; its length is what that width takes.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federation import ClientAppNode, InProcessGrid, Recording, in_an_actor, payloads
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import client_app.app as client_app
from client_app.state_store import own_model
from core.run_record import CONFIG, ROUNDS, SUMMARY, Config, Round, Summary
from core.seeds import derive_seed
from core.settings import Settings
from exchange.protocol import MODEL, UPDATE
from quant import (
    federated_state,
    load_state,
    payload_size,
    quantized_layers,
    set_scales,
    spec_of,
)
from server_app.app import main
from task.at_width import at_width
from task.data.partition import client_images
from task.data.to_input import to_input
from task.models import build_model

FLOAT = "32:1.0"
MIXED = "2:0.2,4:0.2,8:0.2,32:0.4"
SPEC = spec_of(build_model("toy:net", 1, 8, 10, seed=0))
OWN = "own"
# System: settings, bits up, bits down, as in the table ("OWN" is the client's; 0 is nothing sent).
TABLE = {
    "fedavg": ({"strategy": "fedavg"}, OWN, 32),
    "fedprox": ({"strategy": "fedprox", "fedprox-mu": 0.1}, OWN, 32),
    "fedpaq": ({"strategy": "fedpaq", "fedpaq-bits": 6}, 6, 32),
    "fedcom": ({"strategy": "fedcom", "fedcom-bits": 4}, 4, 32),
    "fedcomgate": ({"strategy": "fedcomgate", "fedcomgate-bits": 8}, 8, 32),
    "grouped-avg": ({"strategy": "grouped-avg"}, OWN, 32),
    "local": ({"strategy": "local"}, 0, 32),
    "prowd": ({"strategy": "prowd", "broadcast": "float32"}, OWN, 32),
    "prowd, rounded by the server": ({"strategy": "prowd"}, OWN, OWN),
    "flwr:FedAdam": ({"strategy": "flwr:FedAdam"}, OWN, 32),
}


class RecordingGrid(Recording, InProcessGrid):
    pass


def run(tmp_path, mix, clients=5, name="run", **settings):
    config = {
        "num-server-rounds": 2,
        "samples-per-client": 48,
        "server-buffer": 32,
        "server-threads": 1,
        "model": "toy:net",
        "bit-mix": mix,
        "low-bit-training": "strict",
        "output-dir": str(tmp_path),
        "run-name": name,
        **settings,
    }
    grid = RecordingGrid({10 + i: ClientAppNode(i, clients, config) for i in range(clients)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return tmp_path / name, grid


@pytest.mark.parametrize("system", TABLE)
def test_bytes_on_the_wire_are_those_of_the_table(tmp_path, system):
    settings, up, down = TABLE[system]
    folder, grid = run(tmp_path, MIXED, **settings, **{"lossless-coding": False})
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    widths = [32, 32, 8, 4, 2]

    sent_up, sent_down = payloads(grid.received, UPDATE), payloads(grid.sent, MODEL)
    # Replies do not name their node in process; they come as they were asked for, widest first.
    expected_up = [b if up == OWN else up for b in widths] * 2 if up else []
    assert [bits for _, bits, _ in sent_up] == expected_up
    assert [len(data) for _, _, data in sent_up] == [payload_size(SPEC, b) for b in expected_up]
    rounds_down = 1 if system == "local" else 2
    expected_down = [b if down == OWN else down for b in widths] * rounds_down
    assert [bits for _, bits, _ in sent_down] == expected_down
    assert [len(data) for _, _, data in sent_down] == [payload_size(SPEC, b) for b in expected_down]

    # Weights, or differences: byte 6 of the header.
    content = 1 if settings["strategy"] in ("fedpaq", "fedcom", "fedcomgate") else 0
    assert {data[6] for _, _, data in sent_up} <= {content}
    assert {data[6] for _, _, data in sent_down} == {0}

    # And the record reports what was sent, by width and round.
    entries = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for number, entry in enumerate(entries):
        for key, kind in (("uplink_bytes", up), ("downlink_bytes", down)):
            expected = {}
            for bits in widths:
                size = payload_size(SPEC, bits if kind == OWN else kind) if kind else 0
                expected[str(bits)] = expected.get(str(bits), 0) + size
            if system == "local" and key == "downlink_bytes" and number > 0:
                expected = {}
            assert entry[key] == expected
    assert set(entries[0]["accuracy"]) == {*map(str, widths), "average"}


def test_what_is_written_is_the_schema_of_the_record(tmp_path):
    """Every key of a run, clients' evaluation and dropped rounds included."""
    folder, _ = run(tmp_path, MIXED, **{"fraction-evaluate": 1.0})
    for name, kind in ((CONFIG, Config), (SUMMARY, Summary)):
        written = json.loads((folder / name).read_text())
        assert written.keys() <= kind.model_fields.keys()
        kind.model_validate(written, strict=True)
    entries = [json.loads(line) for line in (folder / ROUNDS).open()]
    sometimes = {"dropped", "unchanged", "asked", "metrics", "secure", "complaints", "privacy"}
    expected = Round.model_fields.keys() - sometimes - {"own"} | {"prowd"}
    assert [entry.keys() for entry in entries] == [expected] * 2
    assert [Round.model_validate(entry).round for entry in entries] == [1, 2]


@pytest.mark.parametrize(
    ("system", "coding"), [("prowd, rounded by the server", 2), ("fedavg", 2), ("fedcom", 1)]
)
def test_coded_payloads_are_shorter_and_change_nothing(tmp_path, system, coding):
    settings, _, _ = TABLE[system]
    plain, _ = run(tmp_path, MIXED, name="plain", **settings, **{"lossless-coding": False})
    coded, grid = run(tmp_path, MIXED, name="coded", **settings)
    assert weights_of(plain) == weights_of(coded)
    entries = [[json.loads(x) for x in (f / "rounds.jsonl").open()] for f in (plain, coded)]
    for before, after in zip(*entries, strict=True):
        for key in ("uplink_bytes", "downlink_bytes"):
            assert all(after[key][bits] <= size for bits, size in before[key].items())
        assert after["uplink_bytes"]["2"] < before["uplink_bytes"]["2"]
        assert after["accuracy"] == before["accuracy"]
    # Byte 7 of the header: from the start where weights are sent; packed if not shorter.
    used = {data[7] for _, _, data in payloads(grid.received, UPDATE)}
    assert coding in used <= {0, coding}


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def model_of(tmp_path, name, **settings):
    folder, _ = run(tmp_path, settings.pop("mix", FLOAT), name=name, **settings)
    return folder / "model.safetensors"


def test_fedprox_without_its_term_is_fedavg_bit_for_bit(tmp_path):
    average = model_of(tmp_path, "a", mix=MIXED, strategy="fedavg").read_bytes()
    zero = model_of(tmp_path, "b", mix=MIXED, strategy="fedprox", **{"fedprox-mu": 0.0})
    some = model_of(tmp_path, "c", mix=MIXED, strategy="fedprox", **{"fedprox-mu": 1.0})
    assert zero.read_bytes() == average
    assert some.read_bytes() != average


@pytest.mark.parametrize(
    ("ours", "flowers"),
    [
        ({"strategy": "fedavg"}, {"strategy": "flwr:FedAvg"}),
        (
            {"strategy": "fedprox", "fedprox-mu": 0.5},
            {"strategy": "flwr:FedProx", "flwr-arguments": "proximal_mu = 0.5"},
        ),
    ],
)
def test_ours_agree_with_flowers_on_float32_clients(tmp_path, ours, flowers):
    one = load_file(model_of(tmp_path, "ours", **ours))
    other = load_file(model_of(tmp_path, "flowers", **flowers))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_unquantized_differences_and_weights_average_to_the_same_model(tmp_path):
    """With 32 target bits FedPAQ adds the mean movement; FedAvg averages where they ended."""
    one = load_file(model_of(tmp_path, "paq", strategy="fedpaq", **{"fedpaq-bits": 32}))
    other = load_file(model_of(tmp_path, "avg", strategy="fedavg"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_rounding_noise_differs_between_clients_and_rounds(tmp_path):
    """Same data movement would give the same codes under one noise; here nothing repeats."""
    _, grid = run(tmp_path, FLOAT, strategy="fedpaq", **{"fedpaq-bits": 2, "learning-rate": 1e-9})
    # Some 900 bytes of codes come after the header.
    codes = [data[100:700] for _, _, data in payloads(grid.received, UPDATE)]
    assert len(set(codes)) == len(codes)


class TorchClient:
    """FedCOMGATE's client in plain torch, Float32, for comparison with the real one."""

    def __init__(self, partition, config):
        settings = Settings.of_run(config)
        self.images = client_images(settings, partition, 3)
        self.partition, self.settings = partition, settings
        self.delta, self.velocity = None, None

    def train(self, received, server_round):
        model = build_model("toy:net", 1, 8, 10, 0)
        load_state(model, received)
        names = [n for n, _ in model.named_parameters()]
        rate = self.settings.learning_rate * self.settings.learning_rate_decay ** (server_round - 1)
        seed = derive_seed(self.settings.seed, 5, server_round, self.partition)
        order = np.random.default_rng(seed).permutation(len(self.images))
        velocity = {}
        batches = [order[i : i + 32] for i in range(0, len(order), 32)]
        for index in batches:
            labels = torch.from_numpy(self.images.labels[index])
            loss = F.cross_entropy(model(to_input(self.images.pixels[index])), labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for name, parameter, gradient in zip(
                    names, model.parameters(), gradients, strict=True
                ):
                    corrected = gradient - (self.delta[name] if self.delta else 0)
                    velocity[name] = 0.9 * velocity.get(name, 0) + corrected
                    parameter -= rate * velocity[name]
        moved = {n: p.detach() - received[n] for n, p in model.named_parameters()}
        return moved, rate, len(batches)


def test_fedcomgate_of_the_real_app_is_algorithm_2(tmp_path):
    """Momentum 0.9 and a decaying step, no quantization: A = sum (1 - 0.9^i) / 0.1 for tau."""
    config = {
        "samples-per-client": 160,
        "num-server-rounds": 4,
        "learning-rate": 0.1,
        "fedcomgate-bits": 32,
    }
    folder, grid = run(tmp_path, FLOAT, clients=3, strategy="fedcomgate", **config)
    run_config = next(iter(grid.nodes.values())).run_config
    clients = [TorchClient(i, run_config) for i in range(3)]
    state = {n: t.clone() for n, t in federated_state(build_model("toy:net", 1, 8, 10, 0)).items()}
    for server_round in range(1, 5):
        results = [c.train(state, server_round) for c in clients]
        average = {n: sum(moved[n] for moved, _, _ in results) / 3 for n in state}
        for client, (moved, rate, steps) in zip(clients, results, strict=True):
            factor = rate * sum((1 - 0.9**i) / 0.1 for i in range(1, steps + 1))
            old = client.delta or dict.fromkeys(state, 0.0)
            client.delta = {n: old[n] + (average[n] - moved[n]) / factor for n in state}
        state = {n: t + average[n] for n, t in state.items()}
    real = load_file(folder / "model.safetensors")
    plain = load_file(
        run(tmp_path, FLOAT, clients=3, name="com", strategy="fedcom", **config)[0]
        / "model.safetensors"
    )
    error = max(float((real[n] - t).abs().max()) for n, t in state.items())
    effect = max(float((plain[n] - real[n]).abs().max()) for n in state)
    # Rounding alone parts the real app from the model here; the corrections matter far more.
    assert error < 0.02 * effect, (error, effect)


def test_local_strict_clients_are_evaluated_on_the_grid_they_trained_on(tmp_path):
    _, grid = run(tmp_path, MIXED, strategy="local")
    for node in list(grid.nodes.values())[:3]:
        model, scales = own_model(node.context.state)
        bits = {0: 2, 1: 4, 2: 8}[node.config["partition-id"]]
        asked = [m for m in grid.sent if m.metadata.message_type == "evaluate"][-1]
        with in_an_actor():
            job = client_app._read_job(asked, node.context)
        assert job.bits == bits
        evaluated = at_width(job.model, job.settings, bits)
        set_scales(evaluated, job.scales)
        for name, layer in quantized_layers(evaluated):
            assert torch.equal(layer.quantized_weight(), model[f"{name}.weight"])
            assert torch.equal(layer.weight_scale, scales[f"{name}.weight"])


def test_a_local_client_whose_reply_was_lost_continues_from_its_own_model(tmp_path):
    """The server sends it the common start once more; it still has its model and uses that."""
    _, grid = run(tmp_path, FLOAT, strategy="local")
    node = grid.nodes[10]
    kept, _ = own_model(node.context.state)
    first = next(m for m in grid.sent if m.metadata.message_type == "train")
    assert MODEL in first.content
    with in_an_actor():
        job = client_app._read_job(first, node.context)
    assert all(torch.equal(federated_state(job.model)[n], t) for n, t in kept.items())
    node.lose_state()
    with in_an_actor():
        job = client_app._read_job(first, node.context)
    assert not all(torch.equal(federated_state(job.model)[n], t) for n, t in kept.items())


def test_without_float32_clients_the_widest_groups_model_is_written(tmp_path):
    folder, _ = run(tmp_path, "4:0.4,8:0.6", strategy="grouped-avg")
    start = federated_state(build_model("toy:net", 1, 8, 10, 0))
    written = load_file(folder / "model.safetensors")
    assert not torch.equal(written["hidden.weight"], start["hidden.weight"])


@pytest.mark.parametrize("strategy", ["prowd", "fedcom"])
def test_rounding_to_nearest_on_the_server_changes_nothing_for_strict_clients(tmp_path, strategy):
    """They bring the float32 model onto that very grid themselves."""
    wide = model_of(tmp_path, "wide", mix=MIXED, strategy=strategy, broadcast="float32")
    narrow = model_of(tmp_path, "narrow", mix=MIXED, strategy=strategy, broadcast="nearest")
    assert wide.read_bytes() == narrow.read_bytes()


def test_the_ladder_follows_more_than_two_widths(tmp_path):
    folder, _ = run(tmp_path, MIXED, **{"prowd-finetune-every": 5})
    own = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])["prowd"]
    assert {key for key in own if key.startswith("mask-density")} == {
        "mask-density-2",
        "mask-density-4",
        "mask-density-8",
    }
    assert own["reconstruction-loss"] > 0
    assert own["distill-loss"] < 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "fedpaq", "fedpaq-bits": 17}, "fedpaq-bits: 17 is not allowed"),
        ({"strategy": "fedcom", "fedcom-bits": 1}, "fedcom-bits: 1 is not allowed"),
        ({"strategy": "fedcomgate", "local-epochs": 0}, "local-epochs: 0 is not allowed"),
        ({"strategy": "flwr:FedNova"}, "strategy: 'flwr:FedNova' is not one of"),
        ({"strategy": "flwr"}, "strategy: there is no 'flwr'"),
        ({"strategy": "fedavg:x"}, "strategy: there is no 'fedavg:x'"),
        ({"strategy": "flwr:QFedAvg"}, "QFedAvg needs client_learning_rate"),
    ],
)
def test_bad_settings_of_the_baselines_are_one_line_and_no_run(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=r"."):
        run(tmp_path, FLOAT, **settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert reason in summary["reason"]
    assert "\n" not in summary["reason"]
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
