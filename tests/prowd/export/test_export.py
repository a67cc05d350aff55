"""`prowd export` on a real run: the files hold what the server evaluated, to the bit."""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import server_app.evaluation
from core.settings import Settings
from prowd.cli import main
from quant import largest_code, load_model
from server_app.app import main as serve
from server_app.run import reopen
from task.data.partition import evaluation_images
from task.models import build_model

PROJECT = Path(__file__).parents[3]
IMAGES = evaluation_images(Settings())


def run(output_dir, **settings):
    config = {
        "num-server-rounds": 2,
        "samples-per-client": 200,
        "bit-mix": "4:0.5,32:0.5",
        "low-bit-training": "strict",
        "output-dir": str(output_dir),
        "run-name": "run",
        **{key.replace("_", "-"): value for key, value in settings.items()},
    }
    grid = InProcessGrid({50 + i: ClientAppNode(i, 2, config) for i in range(2)})
    serve(grid, Context(1, 0, {}, RecordDict(), config))
    return output_dir / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ProWD, and by width the network that the server evaluated last."""
    networks = {}

    def spy(evaluator, model, server_round):
        networks[model.bits] = network = evaluator.network(model)
        return server_app.evaluation.evaluate(network, evaluator._examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app.evaluation.Evaluator, "score", spy)
        folder = run(tmp_path_factory.mktemp("runs"))
    return folder, networks


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def export(folder, *arguments):
    return main(["export", str(folder), *map(str, arguments)])


def recorded(folder, bits):
    last = (folder / "rounds.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["accuracy"][str(bits)]


@torch.no_grad()
def logits(path):
    packed = load_model(path)
    architecture = (packed.name, packed.channels, packed.size, packed.num_classes)
    network = packed.network(build_model(*architecture, seed=1))
    return network(packed.to_input(IMAGES.pixels)).numpy()


def accuracy(scores):
    return float((scores.argmax(1) == IMAGES.labels).mean())


def test_the_files_are_the_network_that_the_server_evaluated(finished, folder, capsys):
    assert export(folder) == 0
    packed, model = (
        folder / "export" / "resnet8-4bit.safetensors",
        folder / "export/resnet8-4bit.onnx",
    )
    found = logits(packed)
    with torch.no_grad():
        want = finished[1][4](load_model(packed).to_input(IMAGES.pixels)).numpy()
    assert np.array_equal(found, want)
    assert accuracy(found) == recorded(folder, 4) > 0.5
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    in_onnx = accuracy(session.run(None, {"pixels": IMAGES.pixels})[0])
    assert abs(in_onnx - recorded(folder, 4)) <= 0.002
    kinds = Counter(node.op_type for node in onnx.load(model).graph.node)
    # Ten layers; the inputs of two blocks' first convolution and shortcut are the same.
    assert (kinds["DequantizeLinear"], kinds["QuantizeLinear"]) == (18, 8)
    assert kinds["BatchNormalization"] == 9
    sizes = [f"{path.stat().st_size:,} bytes" for path in (packed, model)]
    shown = f"{recorded(folder, 4):.2%}"
    assert capsys.readouterr().out.splitlines() == [
        f"accuracy at 4 bits after round 2, recorded: {shown}",
        f"{packed}: {sizes[0]}, accuracy {shown}",
        f"{model}: {sizes[1]}, accuracy {in_onnx:.2%} in onnxruntime",
    ]
    float32 = (folder / "model.safetensors").stat().st_size
    assert packed.stat().st_size < float32 / 5
    assert model.stat().st_size < float32 / 4


def test_at_32_bits_it_is_the_float32_model_of_the_record(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(folder, "--bits", 32, "--output", tmp_path / "there") == 2
    floats = load_model(tmp_path / "there" / "resnet8-32bit.safetensors").update.floats
    saved = load_file(folder / "model.safetensors")
    assert floats.keys() == saved.keys()
    assert all(torch.equal(floats[name], tensor) for name, tensor in saved.items())
    assert accuracy(logits(tmp_path / "there" / "resnet8-32bit.safetensors")) == recorded(
        folder, 32
    )


def test_a_width_that_the_run_did_not_have(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export(folder, "--bits", 3)
    packed = load_model(folder / "export" / "resnet8-3bit.safetensors")
    assert (packed.bits, packed.activation_bits) == (3, 3)
    codes = torch.cat([t.codes.flatten() for t in packed.update.quantized.values()])
    assert int(codes.abs().max()) == largest_code(3)
    assert "after round 2, not recorded" in capsys.readouterr().out
    assert accuracy(logits(folder / "export" / "resnet8-3bit.safetensors")) > 0.5


def test_without_the_extra_the_packed_file_is_there_and_the_extra_is_named(
    folder, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(folder) == 2
    assert "'.[export]' brings it" in capsys.readouterr().err
    assert [path.name for path in (folder / "export").iterdir()] == ["resnet8-4bit.safetensors"]


@pytest.fixture
def without_torchs_exporter(monkeypatch):
    """What torch writes, and takes seconds for: test_onnx_model.py."""
    monkeypatch.setattr("prowd.export.command.to_onnx", lambda network, channels, size: b"a model")


def test_without_onnxruntime_the_file_is_written_and_not_run(
    folder, capsys, monkeypatch, without_torchs_exporter
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(folder) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("bytes, not run, as onnxruntime is not installed")
    assert (folder / "export" / "resnet8-4bit.onnx").exists()


def test_the_run_stays_as_it_was(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "onnx", None)
    export(folder)
    assert all(path.read_bytes() == content for path, content in before.items())


def refused(capsys, *arguments):
    assert export(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_exported_is_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    allowed = "allowed: 2 to 16, or 32"
    assert (
        refused(capsys, folder, "--bits", 17) == f"prowd: --bits: 17 is not a bit-width; {allowed}"
    )
    nowhere = tmp_path / "nowhere"
    missing = f"there is no checkpoint {nowhere}/checkpoint/last.safetensors"
    assert refused(capsys, nowhere) == f"prowd: {missing}"
    file = tmp_path / "file"
    file.touch()
    assert refused(capsys, folder, "--output", file).startswith(
        f"prowd: --output: {file} is a file"
    )
    with monkeypatch.context() as patch:
        patch.setattr("task.images.fingerprint", lambda data: "other")
        assert "the checkpoint is of another run: data is 'other'" in refused(capsys, folder)
    (folder / "rounds.jsonl").unlink()
    assert refused(capsys, folder).startswith(f"prowd: {folder}: rounds.jsonl lacks rounds 1 to ")


TASKS = {
    "text": ("context = 4, width = 8, depth = 1, heads = 1", "tokens", "tensor(int64)", [4]),
    "table": ("width = 8", "columns", "tensor(float)", [64]),
    "my_tasks:Signals": ("width = 3", "inputs", "tensor(float)", [6, 12]),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_other_inputs_is_exported_as_onnx(task, tmp_path, capsys):
    options, name, kind, shape = TASKS[task]
    own = {"task": task, "task_options": options, "samples_per_client": 32, "run_name": "run"}
    if ":" in task:
        own.pop("samples_per_client")
    folder = run(tmp_path, num_server_rounds=1, **own)
    assert export(folder) == 0
    [file] = (folder / "export").iterdir()
    assert file.name == f"{task.replace(':', '-')}-4bit.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [given], [output] = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == (name, kind, ["batch", *shape])
    assert output.name == ("outputs" if ":" in task else "logits")
    reopened, saved = reopen(folder)
    network = reopened.evaluator.network(reopened.strategy.model_for(4, saved.model)).cpu().eval()
    examples = reopened.task.as_examples(reopened.task.test_data())
    assert len(examples) >= 30
    for count in (1, 30):
        inputs, _ = examples.batch(slice(count))
        with torch.no_grad():
            want = network(inputs).numpy()
        got = session.run(None, {name: inputs.numpy()})[0]
        # A value halfway between two levels may go either way: one step of the narrow widths.
        assert np.isclose(got, want, rtol=0, atol=1e-5 * np.ptp(want)).mean() > 0.9
        assert np.abs(got - want).max() < 0.15 * np.ptp(want)
    recorded_line, line = capsys.readouterr().out.splitlines()
    shown = f"{recorded(folder, 4):.4g}"
    assert recorded_line == f"headline metric at 4 bits after round 1, recorded: {shown}"
    accuracy = float(re.search(r"accuracy ([\d.]+) in onnxruntime$", line).group(1))
    assert accuracy == pytest.approx(recorded(folder, 4), abs=0.05)


def test_a_task_whose_data_is_on_devices_shows_no_inputs(tmp_path, capsys):
    folder = run(tmp_path, task="my_tasks:OnDevices", samples_per_client=0, num_server_rounds=1)
    assert refused(capsys, folder) == (
        f"prowd: {folder} is of task 'my_tasks:OnDevices', which shows no inputs on the server; "
        "allowed: Task.server_inputs, test_data or example_inputs that give some"
    )


def test_there_is_no_model_of_local_training_nor_before_the_first_round(tmp_path, capsys):
    local = run(
        tmp_path, strategy="local", model="toy:net", samples_per_client=32, num_server_rounds=1
    )
    assert (
        refused(capsys, local) == f"prowd: {local} is of local training, which has no global model"
    )
    begun = tmp_path / "begun"
    shutil.copytree(local, begun)
    (begun / "rounds.jsonl").write_text("")
    # Its checkpoint is that of a run that was stopped before the first round.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strategies.local.Local.evaluates_on_server", True)
        assert refused(capsys, begun) == f"prowd: {begun}: rounds.jsonl lacks round 1"


def test_the_documented_lines_export_and_load_it(folder, monkeypatch):
    chapter = (PROJECT / "docs/export.md").read_text().split("## Export and load\n")[1]
    chapter = chapter.split("\n## ")[0]
    [command] = re.findall(r"^prowd (.*)", chapter, flags=re.M)
    [code] = re.findall(r"```python\n(.*?)```", chapter, flags=re.S)
    monkeypatch.setitem(sys.modules, "onnx", None)
    main([word.replace("~/prowd-runs/int4", str(folder)) for word in command.split()])
    monkeypatch.chdir(folder / "export")
    names = {"pixels": IMAGES.pixels}
    exec(code, names)
    assert accuracy(names["logits"].detach().numpy()) == recorded(folder, 4)
