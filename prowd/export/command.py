"""A run's model, taken away: as one packed file, and for onnxruntime."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from core.errors import SettingsError
from core.files import write_atomic
from core.mix import check_client_bits
from core.run_record import Round
from prowd.export.onnx_model import to_onnx
from prowd.records import read_record
from quant import FLOAT_BITS, PackedModel, load_model
from server_app.run import Run, reopen
from task.data.dataset import Images, load_dataset
from task.data.partition import evaluation_images
from task.data.to_input import PIXEL_OFFSET, PIXEL_SCALE
from task.evaluation import evaluate

_BATCH = 100


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
    if run.settings.task != "images" or not run.evaluator.has_examples:
        raise SettingsError(
            f"{run_dir} is of task {run.settings.task!r}, with "
            f"{'a' if run.evaluator.has_examples else 'no'} test set on the server; allowed: "
            "images, and a test set, as the files say how pixels enter the network"
        )
    yield _recorded(entries[-1], bits)
    network = run.evaluator.network(run.strategy.model_for(bits, state)).cpu()
    images, data = evaluation_images(run.settings), load_dataset(run.settings)
    # Of "package.module:factory" no host's or drive's name is made.
    name = run.settings.model.replace(":", "-")
    stem = (output or run_dir / "export") / f"{name}-{bits}bit"
    packed = PackedModel.of(
        network,
        name=run.settings.model,
        channels=data.channels,
        size=data.size,
        num_classes=data.num_classes,
        pixel_scale=PIXEL_SCALE,
        pixel_offset=PIXEL_OFFSET,
    )
    path = _write(stem, "safetensors", packed.to_bytes())
    # What is measured is the file.
    accuracy = evaluate(load_model(path).network(run.model), images).accuracy
    yield _line(path, f"accuracy {accuracy:.2%}")
    path = _write(stem, "onnx", to_onnx(network, data.channels, data.size))
    yield _line(path, _accuracy_in_onnxruntime(path, images))


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


def _recorded(entry: Round, bits: int) -> str:
    accuracy = entry.accuracy.get(str(bits))
    found = "not recorded" if accuracy is None else f"recorded: {accuracy:.2%}"
    return f"accuracy at {bits} bits after round {entry.round}, {found}"


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


def _accuracy_in_onnxruntime(path: Path, images: Images) -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not run, as onnxruntime is not installed"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    correct = 0
    for start in range(0, len(images), _BATCH):
        batch = images[np.arange(start, min(start + _BATCH, len(images)))]
        [logits] = session.run(None, {"pixels": batch.pixels})
        correct += int((logits.argmax(1) == batch.labels).sum())
    return f"accuracy {correct / len(images):.2%} in onnxruntime"
