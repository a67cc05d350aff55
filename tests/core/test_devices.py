"""Networks on a GPU: the same results, and nothing of it but numbers on the CPU comes out."""

import json

import numpy as np
import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from specs import to_bits

from core.devices import device_of, pick_device
from core.errors import SettingsError
from core.settings import Settings
from prowd.export.command import export
from quant import federated_state
from server_app.app import main
from server_app.build import read_settings
from server_app.evaluation import CalibratedRounding, Evaluator, make_predict
from task.data.dataset import Images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

STRICT = LocalTraining(4, "strict", activation_bits=4, gradient_bits=8, proximal_mu=0.1)


def some_images(count=96):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    pixels = rng.integers(0, 100, (count, 1, 8, 8)) + 15 * labels[:, None, None, None]
    return Images(pixels.astype(np.uint8), labels)


def network():
    return build_model("resnet8", 1, 8, 10, seed=0)


def on_cpu(trained):
    update = trained.update
    tensors = [*trained.moved.values(), *update.floats.values(), *update.scales.values()]
    tensors += [tensor.codes for tensor in update.quantized.values()]
    return all(tensor.device.type == "cpu" for tensor in tensors)


def test_auto_is_the_cpu_without_a_gpu():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused_before_any_training(tmp_path):
    config = {"server-device": "cuda", "output-dir": str(tmp_path), "run-name": "run"}
    grid = InProcessGrid({50: ClientAppNode(0, 1, config)})
    with pytest.raises(SettingsError, match=r"server-device.*allowed here: auto, cpu"):
        main(grid, Context(1, 0, {}, RecordDict(), config))
    assert "server-device" in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]


def test_the_record_names_the_device_that_auto_was():
    settings, _ = read_settings({"server-device": "auto"})
    assert settings.server_device == "cpu"


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="server-device"):
        Settings.read({"server-device": "tpu"})


@pytest.mark.gpu
@pytest.mark.parametrize("config", [LocalTraining(32), LocalTraining(4), STRICT])
def test_training_on_the_gpu_ends_on_the_cpu_and_repeats_to_the_bit(config):
    correction = {name: torch.full_like(p, 1e-3) for name, p in network().named_parameters()}
    runs = []
    for _ in range(2):
        model = network()
        trained = train(
            model, some_images(), config, 0, correction=correction, device=pick_device("auto")
        )
        runs.append(trained)
        assert device_of(model).type == "cpu"
    first, second = runs
    assert on_cpu(first)
    assert first.score.loss < 2.5
    for name, moved in first.moved.items():
        assert torch.equal(moved, second.moved[name])


@pytest.mark.gpu
def test_float_training_on_the_gpu_is_that_on_the_cpu():
    config = LocalTraining(32, learning_rate=0.01)
    there, here = (
        train(network(), some_images(), config, 0, device=torch.device(name))
        for name in ("cuda", "cpu")
    )
    for name, moved in here.moved.items():
        torch.testing.assert_close(there.moved[name], moved, rtol=0.05, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 32])
def test_evaluation_on_the_gpu_is_that_on_the_cpu(bits):
    images, state = some_images(), federated_state(network())
    scores = []
    for name in ("cuda", "cpu"):
        settings = Settings.read({"server-device": name})
        evaluator = Evaluator(settings, network(), images, images)
        rounding = CalibratedRounding(settings, network(), images)
        model = rounding(state, bits) if bits < 32 else to_bits(state, 32)
        assert all(t.codes.device.type == "cpu" for t in model.quantized.values())
        scores.append(evaluator.score(model))
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=0.02)


@pytest.mark.gpu
def test_distillation_on_the_gpu_gives_gradients_on_the_cpu():
    weights = {name: t.clone().requires_grad_() for name, t in federated_state(network()).items()}
    predict = make_predict(network(), some_images(), pick_device("auto"))
    logits = predict(weights)
    logits.square().sum().backward()
    assert logits.device.type == "cpu"
    assert weights["conv.weight"].grad.abs().sum() > 0


@pytest.mark.gpu
def test_a_whole_run_on_the_gpu(tmp_path):
    config = {
        "server-device": "cuda",
        "output-dir": str(tmp_path),
        "run-name": "run",
        "bit-mix": "4:0.5,32:0.5",
        "low-bit-training": "strict",
        "num-server-rounds": 2,
        "prowd-finetune-every": 1,
    }
    nodes = {50 + i: ClientAppNode(i, 4, config) for i in range(4)}
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["accuracy"]["final"]["average"] > 0.5
    pytest.importorskip("onnxruntime")
    _, packed, onnx = export(tmp_path / "run", 4)
    assert packed.split()[-1] == onnx.split()[-3]
