"""A run's model, taken away: as one packed file, and for onnxruntime."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from core.errors import SettingsError
from core.files import write_atomic
from core.mix import check_client_bits
from core.reference import is_reference
from core.run_record import Round
from prowd.export.onnx_model import named_inputs, to_onnx, to_onnx_of
from prowd.records import read_record
from quant import FLOAT_BITS, PackedModel, load_model
from server_app.run import Run, reopen
from task.data.dataset import Images
from task.data.to_input import PIXEL_OFFSET, PIXEL_SCALE
from task.evaluation import evaluate
from task.examples import Examples, MetricSums

_BATCH = 100
_NOT_RUN = "not run, as onnxruntime is not installed"


def export(
    run_dir: Path, bits: int | None = None, output: Path | None = None, data_dir: str = ""
) -> Iterator[str]:
    """Write the model of a run at a bit-width, as the run evaluates it at that width.

    Parameters
    ----------
    run_dir : Path
        Record of the run; its last checkpoint is read.
    bits : int, optional
        2 to 16, or 32; the narrowest of the run if not given.
    output : Path, optional
        Folder of the files; ``export`` in `run_dir` if not given.
    data_dir : str
        Where the run's data lies now; empty: where it was.

    Yields
    ------
    str
        The accuracy that the run recorded; then of each file, once it is written, its path, bytes
        and accuracy on the same images.

    Raises
    ------
    SettingsError
        If there is no such width, no good checkpoint, no global model, or a file cannot be written.
    """
    if bits is not None:
        check_client_bits(bits, "--bits")
    run, state, entries = _load_run(run_dir, data_dir)
    if bits is None:
        bits = min(int(width) for entry in entries for width in entry.uplink_bytes)
    if run.settings.low_bit_training == "integer" and bits != FLOAT_BITS:
        raise SettingsError(
            f"--bits: {bits} of a run with low-bit-training integer; allowed: {FLOAT_BITS}, as no "
            "file says that weights compute as ternary ones"
        )
    test = run.task.test_data()
    examples = None if test is None else run.task.as_examples(test)
    network = run.evaluator.network(run.strategy.model_for(bits, state)).cpu()
    # Of "package.module:factory" no host's or drive's name is made.
    named = run.settings.model if run.settings.task == "images" else run.settings.task
    stem = (output or run_dir / "export") / f"{named.replace(':', '-')}-{bits}bit"
    if run.settings.task == "images":
        yield _recorded(entries[-1], bits, "accuracy")
        yield from _of_images(run, network, stem, cast(Images | None, test))
    else:
        yield from _of_any_task(run, network, stem, examples, entries[-1], bits)


def _of_images(run: Run, network: nn.Module, stem: Path, images: Images | None) -> Iterator[str]:
    """Write both files, which say how pixels enter the network."""
    facts = run.task.facts()
    classes, channels, size = (cast(Any, facts[key]) for key in ("classes", "channels", "size"))
    packed = PackedModel.of(
        network,
        name=run.settings.model,
        channels=channels,
        size=size,
        num_classes=len(classes),
        pixel_scale=PIXEL_SCALE,
        pixel_offset=PIXEL_OFFSET,
    )
    path = _write(stem, "safetensors", packed.to_bytes())
    # What is measured is the file.
    found = "the server has no images to measure it on"
    if images is not None:
        score = evaluate(load_model(path).network(run.model), images)
        found = f"accuracy {score.accuracy:.2%}"
    yield _line(path, found)
    path = _write(stem, "onnx", to_onnx(network, channels, size))
    if images is not None:
        found = _accuracy_in_onnxruntime(path, images)
    yield _line(path, found)


def _of_any_task(
    run: Run,
    network: nn.Module,
    stem: Path,
    examples: Examples | None,
    entry: Round,
    bits: int,
) -> Iterator[str]:
    """Write the ONNX file, whose inputs are those of the task's examples."""
    task, some = run.task, run.task.example_inputs()
    if some is None:
        raise SettingsError(
            f"{run.folder} is of task {run.settings.task!r}, which shows no inputs on the server; "
            "allowed: Task.server_inputs, test_data or example_inputs that give some"
        )
    output = "outputs" if is_reference(run.settings.task) else "logits"
    data = to_onnx_of(network, some, task.input_name, output)
    yield _recorded(entry, bits, "headline metric")
    path = _write(stem, "onnx", data)
    found = "the server has no test set to measure it on"
    if examples is not None:
        found = _measured_in_onnxruntime(path, examples, task.input_name)
    yield _line(path, found)


def _load_run(run_dir: Path, data_dir: str) -> tuple[Run, dict[str, torch.Tensor], list[Round]]:
    """Return the run, its model, and what it recorded of the rounds up to it."""
    try:
        run, saved = reopen(run_dir, data_dir)
    except SettingsError as error:
        # What is given here is no setting of that name.
        raise SettingsError(str(error).removeprefix("resume: ")) from None
    if not run.strategy.evaluates_on_server:
        raise SettingsError(f"{run_dir} is of local training, which has no global model")
    record = read_record(run_dir, weights=False)
    rounds = [entry for entry in record.rounds if entry.round <= saved.server_round]
    if not rounds or len(rounds) < saved.server_round:
        reason = next(iter(record.damage), "it has no round that is done")
        raise SettingsError(f"{run_dir}: {reason}")
    return run, saved.model, rounds


def _recorded(entry: Round, bits: int, metric: str) -> str:
    value = entry.accuracy.get(str(bits))
    found = "not recorded"
    if value is not None:
        found = f"recorded: {value:.2%}" if metric == "accuracy" else f"recorded: {value:.4g}"
    return f"{metric} at {bits} bits after round {entry.round}, {found}"


def _write(stem: Path, kind: str, data: bytes) -> Path:
    path = stem.with_name(f"{stem.name}.{kind}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except (FileExistsError, NotADirectoryError):
        raise SettingsError(f"--output: {path.parent} is a file; it must be a folder") from None
    except OSError as error:
        raise SettingsError(f"--output: {path} cannot be written: {error.strerror}") from None
    return path


def _line(path: Path, found: str) -> str:
    return f"{path}: {path.stat().st_size:,} bytes, {found}"


def _in_onnxruntime(path: Path) -> Any:
    """Return the file in onnxruntime; None where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _accuracy_in_onnxruntime(path: Path, images: Images) -> str:
    session = _in_onnxruntime(path)
    if session is None:
        return _NOT_RUN
    correct = 0
    for start in range(0, len(images), _BATCH):
        batch = images[np.arange(start, min(start + _BATCH, len(images)))]
        [logits] = session.run(None, {"pixels": batch.pixels})
        correct += int((logits.argmax(1) == batch.labels).sum())
    return f"accuracy {correct / len(images):.2%} in onnxruntime"


def _measured_in_onnxruntime(path: Path, examples: Examples, name: str) -> str:
    """Return the task's metrics of what the file gives."""
    session = _in_onnxruntime(path)
    if session is None:
        return _NOT_RUN
    # What the network does not look at is no input of the file.
    known = {one.name for one in session.get_inputs()}
    sums = MetricSums()
    for start in range(0, len(examples), _BATCH):
        inputs, targets = examples.batch(slice(start, min(start + _BATCH, len(examples))))
        tensors = {k: t.numpy() for k, t in named_inputs(inputs, name).items() if k in known}
        outputs = [torch.from_numpy(array) for array in session.run(None, tensors)]
        if len(outputs) > 1:
            return "not measured in onnxruntime, as it has several outputs"
        sums.add(examples.metrics(outputs[0], targets))
    found = ", ".join(f"{metric} {value:.4g}" for metric, value in sums.means().items())
    return f"{found} in onnxruntime"
