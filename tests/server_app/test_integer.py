"""Integer training through the real ClientApp and server loop, under every strategy.

That a run which was killed goes on to the bit, and each rule, is held by `tests/matrix`.
"""

import json
import re
import sys

import pytest
import torch
from federation import ClientAppNode, Recording, SimulatedGrid, payloads
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from core.errors import SettingsError
from core.settings import Settings
from exchange.protocol import MODEL, UPDATE
from prowd.export.command import export
from quant import decode, federated_state, spec_of, stored_codes, stored_state, ternary
from server_app.app import main
from task.at_width import at_width, ready_to_evaluate
from task.data.dataset import Pixels, load_dataset
from task.data.partition import evaluation_images, server_pixels
from task.evaluation import evaluate
from task.models import build_model

MODEL_NAME = "vgg7-x0.125"
SPEC = spec_of(build_model(MODEL_NAME, 1, 8, 10, 0))
MIXED = "8:0.4,32:0.6"
FOUR = "6:0.2,12:0.2,16:0.2,32:0.4"


class RecordingGrid(Recording, SimulatedGrid):
    pass


def run(tmp_path, strategy, mix, name="run", clients=5, **settings):
    config = {
        "num-server-rounds": 2,
        "samples-per-client": 40,
        "batch-size": 20,
        "learning-rate": 0.2,
        "server-buffer": 32,
        "validation-samples": 200,
        "server-threads": 1,
        "model": MODEL_NAME,
        "bit-mix": mix,
        "low-bit-training": "integer",
        "output-dir": str(tmp_path),
        "run-name": name,
        "strategy": strategy,
        **settings,
    }
    grid = RecordingGrid({10 + i: ClientAppNode(i, clients, config) for i in range(clients)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return tmp_path / name, grid


def entries(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["prowd", "fedavg", "fedcom"])
def test_the_widths_of_the_paper_complete_with_every_client(tmp_path, strategy):
    """All strategies, at other widths, run in tests/matrix."""
    folder, _ = run(tmp_path, strategy, FOUR)
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    for entry in entries(folder):
        assert entry["clients"]["aggregated"] == 5
        assert not entry.get("left_out")
        widths = {part.partition(":")[0] for part in FOUR.split(",")}
        assert entry["accuracy"].keys() >= widths
    assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("strategy", ["prowd", "fedavg"])
def test_the_network_without_batchnorm_runs_too(tmp_path, strategy):
    own = {"model": "vgg7-nobn-x0.125", "learning-rate": 0.01, "integer-learning-rate": 4.0}
    folder, _ = run(tmp_path, strategy, MIXED, **own)
    assert [entry["clients"]["aggregated"] for entry in entries(folder)] == [5, 5]


def test_clients_send_stored_weights_of_their_width(tmp_path):
    settings = {"num-server-rounds": 1, "lossless-coding": False, "upload": "stored"}
    _, grid = run(tmp_path, "fedavg", "6:0.2,8:0.2,16:0.2,32:0.4", **settings)
    sent = payloads(grid.received, UPDATE)
    assert sorted(bits for _, bits, _ in sent) == [6, 8, 16, 32, 32]
    for _, bits, data in sent:
        update = decode(data, SPEC, bits, stamp=1)
        for tensor in update.quantized.values():
            assert tensor.scale.tolist() == [2.0 ** (1 - bits)] * len(tensor.scale)
            assert tensor.codes.abs().max() <= 2 ** (bits - 2)


def test_codes_that_the_server_rounded_are_those_that_clients_round_to(tmp_path):
    """So `broadcast` changes nothing but bytes."""
    one, wide = run(tmp_path, "fedavg", MIXED, "float32", broadcast="float32")
    other, codes = run(tmp_path, "fedavg", MIXED, "nearest", broadcast="nearest")
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.equal(tensor, load_file(other / "model.safetensors")[name])
    assert {bits for _, bits, _ in payloads(wide.sent, MODEL)} == {32}
    assert {bits for _, bits, _ in payloads(codes.sent, MODEL)} == {8, 32}
    assert [e["accuracy"] for e in entries(one)] == [e["accuracy"] for e in entries(other)]


def test_fedavg_is_the_mean_of_what_clients_store(tmp_path):
    settings = {"num-server-rounds": 1, "lossless-coding": False, "upload": "stored"}
    folder, grid = run(tmp_path, "fedavg", MIXED, **settings)
    states = [
        decode(data, SPEC, b, stamp=1).dequantize()
        for _, b, data in payloads(grid.received, UPDATE)
    ]
    model = load_file(folder / "model.safetensors")
    # Its statistics are recalibrated on the server's buffer.
    for name in SPEC.on_grid:
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(model[name], mean, rtol=1e-5, atol=1e-6)


def test_prowd_measures_movement_from_the_start_that_clients_had(tmp_path):
    """One low-bit client, no alignment: the new model is the old one and the mean movement."""
    settings = {"num-server-rounds": 1, "lossless-coding": False, "upload": "stored"}
    folder, grid = run(tmp_path, "prowd", "8:0.5,32:0.5", clients=2, **settings)
    start = federated_state(build_model(MODEL_NAME, 1, 8, 10, 0))
    # Of initial weights up to 0.75 many are clipped at the start.
    began = {8: stored_state(start, SPEC.on_grid, 8).dequantize(), 32: start}
    states = [
        (b, decode(d, SPEC, b, stamp=1).dequantize()) for _, b, d in payloads(grid.received, UPDATE)
    ]
    model = load_file(folder / "model.safetensors")
    for name in SPEC.on_grid:
        moved = [state[name] - began[bits][name] for bits, state in states]
        expected = start[name] + torch.stack(moved).mean(0)
        torch.testing.assert_close(model[name], expected, rtol=1e-5, atol=1e-6)


def test_the_server_evaluates_the_ternary_form_at_low_widths(tmp_path):
    folder, _ = run(tmp_path, "fedavg", MIXED)
    config = json.loads((folder / "config.json").read_text())
    settings = Settings.of_run(config["settings"])
    data, network = load_dataset(settings), build_model(MODEL_NAME, 1, 8, 10, 0)
    state = load_file(folder / "model.safetensors")
    network.load_state_dict(state, strict=False)
    pixels, images = Pixels(server_pixels(settings)), evaluation_images(settings)
    assert len(images) == 200 < len(data.train)
    for bits in (8, 32):
        if bits == 8:  # By hand: the three levels, in a network with 8-bit activations.
            for name in SPEC.on_grid:
                state[name] = ternary(stored_codes(state[name], 8) / 128)
            network.load_state_dict(state, strict=False)
            assert at_width(network, settings, 8).head.layer.weight.unique().numel() == 3
        score = evaluate(ready_to_evaluate(network, settings, bits, {}, pixels), images)
        recorded = entries(folder)[-1]["accuracy"][str(bits)]
        assert score.accuracy == pytest.approx(recorded)
        network.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "resnet8"}, "model: 'resnet8' with low-bit-training integer: conv.weight is"),
        ({"broadcast": "calibrated"}, "broadcast: calibrated with low-bit-training integer; "),
        ({"model": "vgg7-x"}, "model: 'vgg7-x'; allowed: vgg7 or vgg7-nobn"),
    ],
)
def test_what_does_not_go_together_ends_the_run_at_once(tmp_path, changes, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        run(tmp_path, "fedavg", "32:1.0", **changes)


def test_a_low_width_has_no_export_and_float32_has(tmp_path, monkeypatch):
    # What torch writes takes seconds: tests/prowd/export.
    monkeypatch.setattr("prowd.export.command.to_onnx", lambda *given: b"a model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    folder, _ = run(tmp_path, "fedavg", MIXED)
    with pytest.raises(SettingsError, match="--bits: 8 of a run with low-bit-training integer"):
        list(export(folder))
    lines = list(export(folder, 32))
    assert "vgg7-x0.125-32bit.safetensors" in lines[1]
    accuracies = re.findall(r"(\d+\.\d+)%", "\n".join(lines[:2]))
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
