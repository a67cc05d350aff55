"""The poster's first table as a contract: what every system really puts on the wire, per width.

The real ClientApp and the real server loop run over an in-process grid that keeps every message. A
payload says its own width in byte 5 of the header; its length is what that width takes.
"""

import json

import numpy as np
import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from quant import UpdateSpec, payload_size
from server_app.app import main
from task.models import build_model
from task.protocol import MODEL, UPDATE

FLOAT = "32:1.0"
MIXED = "2:0.2,4:0.2,8:0.2,32:0.4"
SPEC = UpdateSpec.of(build_model("cnn", 1, 8, 10, seed=0).state_dict())
OWN = "own"
# System: settings, bits up, bits down, as in the table ("OWN" is the client's; 0 is nothing sent).
TABLE = {
    "fedavg": ({"strategy": "fedavg"}, OWN, 32),
    "fedprox": ({"strategy": "fedprox", "fedprox-mu": 0.1}, OWN, 32),
    "fedpaq": ({"strategy": "fedpaq", "fedpaq-bits": 6}, 6, 32),
    "fedcom": ({"strategy": "fedcom", "fedcom-bits": 4}, 4, 32),
    "fedcomgate": ({"strategy": "fedcomgate", "fedcomgate-bits": 8}, 8, 32),
    "fedcom at the client's own bits": ({"strategy": "fedcom"}, OWN, 32),
    "grouped-avg": ({"strategy": "grouped-avg"}, OWN, 32),
    "local": ({"strategy": "local"}, 0, 32),
    "prowd": ({"strategy": "prowd"}, OWN, 32),
    "prowd, client-bits": ({"strategy": "prowd", "prowd-downlink": "client-bits"}, OWN, OWN),
    "flwr:FedAdam": ({"strategy": "flwr:FedAdam"}, OWN, 32),
}


class Recording(InProcessGrid):
    """Keeps what was received too."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        self.received = [*getattr(self, "received", []), *replies]
        return replies


def run(tmp_path, mix, clients=5, name="run", **settings):
    config = {
        "num-server-rounds": 2,
        "samples-per-client": 48,
        "server-buffer": 32,
        "server-threads": 1,
        "model": "cnn",
        "bit-mix": mix,
        "low-bit-training": "strict",
        "output-dir": str(tmp_path),
        "run-name": name,
        **settings,
    }
    grid = Recording({10 + i: ClientAppNode(i, clients, config) for i in range(clients)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return tmp_path / name, grid


def payloads(messages, record):
    """(node, bits in the header, payload) of each training message that carries one."""
    found = []
    for message in messages:
        if message.metadata.message_type == "train" and record in message.content:
            data = next(iter(message.content[record].values())).data
            node = message.metadata.dst_node_id if record == MODEL else message.metadata.src_node_id
            found.append((node, data[5], data))
    return found


@pytest.mark.parametrize("mix", [FLOAT, MIXED])
@pytest.mark.parametrize("system", TABLE)
def test_bytes_on_the_wire_are_those_of_the_table(tmp_path, system, mix):
    settings, up, down = TABLE[system]
    folder, grid = run(tmp_path, mix, **settings)
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    widths = {FLOAT: [32] * 5, MIXED: [2, 4, 8, 32, 32]}[mix]

    sent_up, sent_down = payloads(grid.received, UPDATE), payloads(grid.sent, MODEL)
    # Replies do not name their node in process; they come in the order of the clients.
    expected_up = [b if up == OWN else up for b in widths] * 2 if up else []
    assert [bits for _, bits, _ in sent_up] == expected_up
    assert [len(data) for _, _, data in sent_up] == [payload_size(SPEC, b) for b in expected_up]
    rounds_down = 1 if system == "local" else 2
    expected_down = [b if down == OWN else down for b in widths] * rounds_down
    assert [bits for _, bits, _ in sent_down] == expected_down
    assert [len(data) for _, _, data in sent_down] == [payload_size(SPEC, b) for b in expected_down]

    # And the record reports what was sent, by width.
    entries = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for key, expected in (("uplink_bytes", expected_up), ("downlink_bytes", expected_down)):
        total = sum(sum(entry[key].values()) for entry in entries)
        assert total == sum(payload_size(SPEC, bits) for bits in expected)
    assert set(entries[0]["accuracy"]) == {*map(str, widths), "average"}


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


def test_prowds_narrow_downlink_changes_nothing_for_strict_clients(tmp_path):
    """They bring the float32 model onto that very grid themselves."""
    wide = model_of(tmp_path, "wide", mix=MIXED, **{"prowd-downlink": "float32"})
    narrow = model_of(tmp_path, "narrow", mix=MIXED, **{"prowd-downlink": "client-bits"})
    assert wide.read_bytes() == narrow.read_bytes()


def test_fedcomgate_in_the_real_app_keeps_corrections_that_sum_to_zero(tmp_path):
    settings = {"strategy": "fedcomgate", "fedcomgate-bits": 4, "num-server-rounds": 3}
    _, grid = run(tmp_path, FLOAT, clients=3, **settings)
    kept = [node.context.state["tracking-correction"] for node in grid.nodes.values()]
    for name in kept[0]:
        deltas = np.stack([record[name].numpy() for record in kept])
        assert np.abs(deltas).max() > 0
        assert np.abs(deltas.sum(0)).max() < 1e-3 * np.abs(deltas).max()


def test_the_ladder_follows_more_than_two_widths(tmp_path):
    folder, _ = run(tmp_path, MIXED)
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
        ({"strategy": "flwr:FedNova"}, "strategy: 'flwr:FedNova' is none of"),
        ({"strategy": "flwr"}, "strategy: there is no 'flwr'"),
        ({"strategy": "fedavg:x"}, "strategy: there is no 'fedavg:x'"),
        ({"strategy": "flwr:QFedAvg"}, "QFedAvg needs client_learning_rate"),
    ],
)
def test_bad_settings_of_the_rivals_are_one_line_and_no_run(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=r"."):
        run(tmp_path, FLOAT, **settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert reason in summary["reason"]
    assert "\n" not in summary["reason"]
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
