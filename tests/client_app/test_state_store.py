"""What a client keeps between messages."""

import os
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from client_app.node import declare
from client_app.state_store import has_model, keep_model, own_model, recall, state_folder, store
from core.errors import SettingsError


def test_a_kept_model_comes_back_bit_for_bit():
    state = RecordDict()
    model = {"w": torch.randn(3, 4), "b": torch.tensor([1e-40, -0.0])}
    keep_model(state, model, {"w": torch.rand(3)})
    back, scales = own_model(state)
    assert all(torch.equal(back[n], t) for n, t in model.items())
    assert scales["w"].shape == (3,)
    back["w"].zero_()
    assert own_model(state)[0]["w"].any(), "what is returned has memory of its own"


def test_a_new_client_has_no_model():
    state = RecordDict()
    assert not has_model(state)
    keep_model(state, {"w": torch.ones(1)}, {})
    assert has_model(state)


def kept(value):
    state = RecordDict()
    keep_model(state, {"z": torch.tensor([value, 1e-40, -0.0]), "a": torch.tensor(3.0)}, {})
    state["numbers"] = ConfigRecord({"epoch": 2, "learning-rate": 0.1 + 0.2})
    return state


def test_what_is_stored_comes_back_bit_for_bit_and_in_order(tmp_path):
    store(kept(7.0), tmp_path / "new" / "0", 3)
    state = RecordDict()
    recall(state, tmp_path / "new" / "0", 4)
    model, scales = own_model(state)
    assert list(model) == ["z", "a"]
    assert model["z"].numpy().tobytes() == own_model(kept(7.0))[0]["z"].numpy().tobytes()
    assert scales == {}
    assert state["numbers"] == kept(7.0)["numbers"]


def test_a_round_that_comes_again_begins_from_the_round_before(tmp_path):
    """The server may have crashed before its own checkpoint of round 5."""
    for server_round in (1, 3, 5):
        store(kept(float(server_round)), tmp_path, server_round)
    assert sorted(os.listdir(tmp_path)) == ["3.safetensors", "5.safetensors"]
    for asked, found in ((5, 3.0), (6, 5.0), (9, 5.0)):
        state = RecordDict()
        recall(state, tmp_path, asked)
        assert own_model(state)[0]["z"][0] == found
    state = RecordDict()
    recall(state, tmp_path, 3)
    assert not has_model(state)
    # A later round that was lost is of no use.
    store(kept(4.0), tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["3.safetensors", "4.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[:50],
        lambda d: b"",
        lambda d: d[:-1] + bytes([d[-1] ^ 1]),
        lambda d: d.replace(b"epoch", b"hcope"),
    ],
)
def test_a_damaged_file_counts_as_lost(tmp_path, damage):
    for server_round in (1, 2):
        store(kept(float(server_round)), tmp_path, server_round)
    path = tmp_path / "2.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    state = RecordDict()
    recall(state, tmp_path, 3)
    assert not state, "nor is anything older taken for it"


@pytest.mark.parametrize("name", ["x.safetensors", "-1.safetensors", "03.safetensors", "4.part"])
def test_a_file_of_somebody_else_is_let_be(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for server_round in (1, 2, 3):
        store(kept(float(server_round)), tmp_path, server_round)
    assert sorted(os.listdir(tmp_path)) == sorted(["2.safetensors", "3.safetensors", name])
    state = RecordDict()
    recall(state, tmp_path, 4)
    assert own_model(state)[0]["z"][0] == 3.0
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_kill_left_of_a_file_goes_with_the_next_round(tmp_path):
    torn = tmp_path / "4.safetensors.part"
    torn.write_text("torn")
    store(kept(3.0), tmp_path, 3)
    state = RecordDict()
    recall(state, tmp_path, 5)
    assert own_model(state)[0]["z"][0] == 3.0
    assert os.listdir(tmp_path) == ["3.safetensors"]


def test_what_is_in_memory_is_newer_than_the_disk(tmp_path):
    store(kept(1.0), tmp_path, 1)
    state = RecordDict({"x": ArrayRecord()})
    recall(state, tmp_path, 2)
    assert not has_model(state)


@pytest.mark.parametrize(
    ("node_config", "keep_in", "folder"),
    [
        ({}, "/runs/a/checkpoint/clients/1f", "/runs/a/checkpoint/clients/1f/7"),
        ({}, "", None),
        # A networked node writes nowhere but where its owner says.
        ({"bits": 8}, "/runs/a/checkpoint/clients/1f", None),
        ({"bits": 8, "state-dir": "/mine"}, "/runs/a/checkpoint/clients/1f", "/mine/1f/7"),
        ({"bits": 8, "state-dir": "/mine"}, "1f", "/mine/1f/7"),
        ({"bits": 8, "state-dir": "/mine"}, "", None),
        ({}, "1f", None),
    ],
)
def test_where_a_client_keeps_its_state(node_config, keep_in, folder):
    config = {"partition-id": 7, **node_config}
    assert state_folder(config, keep_in) == (Path(folder) if folder else None)


def test_a_folder_that_leads_out_of_the_state_dir_is_refused():
    config = {"partition-id": 7, "bits": 8, "state-dir": "/mine"}
    with pytest.raises(SettingsError, match="its last part must be letters and digits"):
        state_folder(config, "/runs/..")


@pytest.mark.parametrize("wrong", ["state", 5])
def test_a_node_with_a_wrong_state_dir_is_refused(wrong):
    config = {"partition-id": 0, "num-partitions": 2, "bits": 8, "state-dir": wrong}
    with pytest.raises(SettingsError, match="node-config: state-dir is"):
        state_folder(config, "/x")
    assert "must be an absolute path" in declare(config, {}, False).refused


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_state_dir_that_can_never_be_there_is_refused_by_name(tmp_path, name):
    (tmp_path / "file").touch()
    own = {"partition-id": 0, "num-partitions": 1, "bits": 8, "state-dir": str(tmp_path / name)}
    refused = declare(own, {}, simulated=False).refused
    assert refused.startswith(f"node-config: state-dir: {tmp_path / name} cannot be used: ")
    assert "\n" not in refused
