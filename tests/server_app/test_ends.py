"""Whatever ends a run ends it with one line: a walk over settings, files, models and strategies.

With the real ServerApp and ClientApps. What Flower does with an error is done here too: it logs it.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path

import numpy as np
import pytest
from closed import closed_to_us
from federation import ClientAppNode, InProcessGrid, SimulatedGrid
from flower_log import FlowerLog, flower_log
from flwr.app import Context, Message, RecordDict
from flwr.common.logger import log
from PIL import Image
from wrong_values import all_settings, wrong_values

import task.data.dataset
from client_app.app import _failing_in_one_line
from core.errors import SettingsError
from server_app.app import main
from server_app.ending import TRACEBACK, RunFailed
from strategies import FederationError

SMALL = {
    "model": "toy:net",
    "num-server-rounds": 1,
    "samples-per-client": 8,
    "server-buffer": 8,
    "validation-samples": 40,
    "bit-mix": "4:0.5,32:0.5",
    "run-name": "run",
}
NO_UTF8 = os.fsdecode(b"b\xff")
NOBODY = "~nosuchuser/x"


@dataclass(frozen=True)
class End:
    """How a run ended: what was raised, what was logged, and the folders of its output-dir."""

    error: BaseException | None
    log: FlowerLog
    output_dir: Path

    @property
    def folder(self) -> Path:
        """The one record that it left."""
        [folder] = self.output_dir.iterdir()
        return folder

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


class Node(ClientAppNode):
    """A node whose log is another's than the server's."""

    def __init__(self, listener, *arguments) -> None:
        super().__init__(*arguments)
        self.listener = listener

    def __call__(self, message):
        with self.listener.of_a_client():
            return super().__call__(message)


def end_of(output_dir, changes, grid=SimulatedGrid, node_config=None) -> End:
    """Run the ServerApp's main as Flower does, with two real ClientApps."""
    config = {**SMALL, "output-dir": str(output_dir), **changes}
    error = None
    with flower_log() as listener:
        nodes = {i: Node(listener, i, 2, config, node_config) for i in range(2)}
        try:
            main(grid(nodes), Context(1, 0, {}, RecordDict(), config))
        except Exception as raised:
            error = raised
            log(ERROR, "%s raised an exception", "ServerApp", exc_info=error)
    return End(error, listener, output_dir)


def line_of(end: End) -> str:
    """Return the one line that ended a run."""
    assert end.error is not None, "it has not ended"
    assert type(end.error) in (SettingsError, FederationError, RunFailed)
    [line] = end.log.ends()
    assert str(end.error) == line
    assert not [text for text in end.log.of_server if "\n" in text]
    assert end.log.of_server[-1] == "ERROR ServerApp raised an exception"
    return line


def recorded_line_of(end: End) -> str:
    """Return it where the record says the same."""
    line = line_of(end)
    assert (end.summary["status"], end.summary["reason"]) == ("failed", line)
    return line


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that other users may enter, as those of the tests are not."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o777)
        yield folder
    finally:
        shutil.rmtree(folder)


# Settings ----------------------------------------------------------------------------------------

EVERY = [(key, *wrong) for key, field in all_settings() for wrong in wrong_values(field)]
# Without an output-dir there is no record, and what cannot be resumed keeps its own.
UNRECORDED = ("output-dir", "resume")


@pytest.mark.parametrize(("key", "value", "allowed"), EVERY)
def test_a_setting_is_named_with_its_value_and_what_is_allowed(tmp_path, key, value, allowed):
    end = end_of(tmp_path, {key: value})
    line = (line_of if key in UNRECORDED else recorded_line_of)(end)
    assert line.startswith(f"{key}: {value!r} is not allowed: ")
    assert allowed in line


def test_the_walk_has_every_setting():
    assert len(EVERY) > len(dict(all_settings())) > 60
    assert {key for key, *_ in EVERY} == set(dict(all_settings()))


WORDS = "letters, digits and . _ + = - only"
PATHS = [
    ("runs", "the path must be absolute or begin with ~"),
    (NOBODY, "no home folder is known for ~nosuchuser"),
    ("/x\0y", "a path cannot hold a NUL"),
    (f"/{NO_UTF8}", "the path must be in UTF-8"),
]
TEXTS = [
    (
        {"strategy": "fedsgd"},
        "strategy: there is no 'fedsgd'; allowed: prowd, prowd-paper, fedavg, ",
    ),
    (
        {"strategy": "flwr:FedXgbBagging"},
        "strategy: 'flwr:FedXgbBagging' is not one of flwr:Bulyan, ",
    ),
    ({"strategy": "a:b:c"}, "strategy: 'a:b:c' is not written as package.module:name"),
    ({"strategy": "no_such:S"}, "strategy: 'no_such:S' cannot be imported (ModuleNotFoundError: "),
    ({"strategy": "toy:S"}, f"strategy: toy ({Path(__file__).parents[1]}/toy.py) has no 'S'"),
    ({"strategy": "toy:Net"}, "strategy: 'toy:Net' is no subclass of strategies.MixedPrec"),
    ({"strategy-options": "mu = 1"}, "strategy-options: 'mu = 1' with strategy prowd; allowed"),
    ({"strategy-options": "mu"}, "strategy-options: 'mu' is not allowed: "),
    (
        {"strategy": "strategies:FedProx", "strategy-options": "mu = -1.0"},
        "strategy-options: mu: -1.0 is not allowed: input should be greater than or equal to 0",
    ),
    (
        {"strategy": "flwr:FedAdam", "flwr-arguments": "mu = 1"},
        "flwr-arguments: FedAdam has no 'mu",
    ),
    (
        {"strategy": "flwr:FedTrimmedAvg", "flwr-arguments": "beta = 0.9"},
        "flwr-arguments: FedTrimmedAvg refuses {'beta': 0.9}: ",
    ),
    ({"flwr-arguments": "["}, "flwr-arguments: '[' is not allowed: "),
    ({"prowd-ladder": "8,4,32"}, "prowd-ladder: '8,4,32' is not allowed: "),
    ({"prowd-mask-at-most": 0.5}, "prowd-mask-at-least: 1 is above prowd-mask-at-most 0.5"),
    ({"norm-bound": 0.5}, "norm-bound: 0.5 is not allowed: value error, allowed are 0, and 1"),
    ({"activation-bits": 17}, "activation-bits: 17 is not allowed: value error, allowed are 0, 2"),
    ({"gradient-bits": 1}, "gradient-bits: 1 is not allowed: value error, allowed are 0, 2 to"),
    ({"fedcom-bits": 33}, "fedcom-bits: 33 is not allowed: value error, allowed are 0, 2 to 16"),
    ({"bit-mix": "8"}, "bit-mix: '8' in '8' is not bits:share, as in 8:0.5"),
    ({"bit-mix": "1:0.5,32:0.5"}, "bit-mix: 1 is not a bit-width; allowed: 2 to 16, or 32"),
    ({"bit-mix": "8:0.5,32:0.4"}, "bit-mix: the shares in '8:0.5,32:0.4' add up to 0.9, not to"),
    ({"weight-step": 0.5}, "weight-step: 0.5 with low-bit-training qat; allowed: strict"),
    (
        {"strategy": "fedcomgate", "broadcast": "nearest"},
        "broadcast: 'nearest' with fedcomgate; its corrections need the exact model; allowed: fl",
    ),
    (
        {"server-buffer": 1},
        "server-buffer: 1 leaves too few images for calibrate-normalization; al",
    ),
    (
        {"server-buffer": 1, "calibrate-normalization": False, "broadcast": "calibrated"},
        "server-buffer: 1 leaves too few images for broadcast=calibrated; allowed: 2 or more",
    ),
    ({"server-device": "cuda"}, "server-device: 'cuda', but torch sees no GPU here; allowed here"),
    ({"partition-file": "/x"}, "partition-file: '/x' with partitioner iid; allowed: a file with "),
    ({"partitioner": "file"}, "partition-file: '' with partitioner file; allowed: a file with "),
    ({"dataset": "image-folder"}, "data-dir: image-folder needs the folder that holds the images"),
    (
        {"validation-samples": 5000},
        "validation-samples: 5000 beside server-buffer 8; there are 1437",
    ),
    ({"model": "a:b:c"}, "model: 'a:b:c' is not written as package.module:name"),
    (
        {"client-threads": 2**40},
        f"client-threads: {2**40} is not allowed: input should be less tha",
    ),
    ({"run-name": "../x"}, f"run-name: '../x' is not allowed: value error, {WORDS}"),
    ({"run-name": "x" * 201}, "run-name: 'xxx"),
    ({"learning-rat": 0.1}, "learning-rat: there is no such setting (value 0.1)"),
    ({"prowd-tau": 0.1}, "prowd-tau: there is no such setting (value 0.1)"),
    *[
        ({"data-dir": path}, f"data-dir: {path!r} is not allowed: value error, {why}")
        for path, why in PATHS
    ],
    *[
        ({"partition-file": path}, f"partition-file: {path!r} is not allowed: value error, {why}")
        for path, why in PATHS
    ],
]


@pytest.mark.parametrize(("changes", "start"), TEXTS)
def test_what_only_the_setting_itself_knows_is_one_line(tmp_path, changes, start):
    assert recorded_line_of(end_of(tmp_path, changes)).startswith(start)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples-per-client": 5000}, "samples-per-client: 5000, but client 0 holds only "),
        ({"server-buffer": 1396}, "server-buffer: 1396 and validation-samples 40 of 1437 training"),
        ({"bit-mix": "8:0.1,32:0.9"}, "bit-mix: '8:0.1,32:0.9' leaves width 8 without a client"),
        (
            {"min-nodes": 3, "node-wait": 0.1},
            "min-nodes is 3: 2 of 2 connected nodes have answered",
        ),
    ],
)
def test_what_the_nodes_find_is_one_line_of_the_server(tmp_path, changes, named):
    line = recorded_line_of(end_of(tmp_path, changes))
    assert named in line
    assert "nodes can take part, min-nodes is " in line


def test_a_setting_of_a_megabyte_is_a_short_line(tmp_path):
    line = recorded_line_of(end_of(tmp_path, {"bit-mix": 7, "strategy-options": "x" * 10**6}))
    assert "strategy-options: 'xxx" in line
    assert "bit-mix: 7 is not allowed" in line
    assert len(line) < 1000


# Files -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files and folders that something is wrong with, by name."""
    monkeypatch.setattr(task.data.dataset, "CACHE", tmp_path / "cache")
    (base := tmp_path / "files").mkdir()
    (base / "text").write_text("x")
    (base / "bytes").write_bytes(b"\xff\xfe{}")
    (base / "torn").write_text('{"clients": [[0, 1')
    (base / "list").write_text("[1]")
    (base / "loop").symlink_to(base / "loop")
    (base / "nowhere").symlink_to(base / "missing")
    (base / "line\nend").mkdir()
    return base


def image_folder(base: Path, name: bytes) -> Path:
    """Make a folder of images, of which one of a given name cannot be decoded."""
    for kind in ("ant", "bee"):
        (base / kind).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(base / kind / f"{index}.png")
    with open(os.path.join(os.fsencode(base), b"ant", name), "wb") as file:
        file.write(b"no image")
    return base


DATA = {"dataset": "image-folder"}
PARTITION = {"partitioner": "file"}
FILES = [
    ("data-dir", DATA, "missing", "data-dir: there is no folder {}"),
    ("data-dir", DATA, "text", "data-dir: {} is no folder"),
    ("data-dir", DATA, "text/deeper", "data-dir: {} is no folder"),
    ("data-dir", DATA, "loop", "data-dir: {} cannot be read: Too many levels of symbolic links"),
    ("data-dir", DATA, "line\nend", r"data-dir: {} holds no folders"),
    ("data-dir", DATA, "\x1b[2J", r"data-dir: there is no folder {}"),
    ("data-dir", DATA, "x" * 300, "data-dir: {} cannot be read: File name too long"),
    ("data-dir", {"dataset": "fashion-mnist"}, "missing", "data-dir: there is no folder {}"),
    ("partition-file", PARTITION, "missing", "partition-file: {} cannot be read: No such file"),
    ("partition-file", PARTITION, "line\nend", "partition-file: {} is no regular file"),
    ("partition-file", PARTITION, "bytes", "partition-file: {} is not in UTF-8, as byte 0 shows"),
    ("partition-file", PARTITION, "torn", "partition-file: {} holds no partition as in "),
    ("partition-file", PARTITION, "list", "partition-file: {} holds no partition as in "),
    ("partition-file", PARTITION, "\x1b[2J", "partition-file: {} cannot be read: No such file"),
]


@pytest.mark.parametrize(("setting", "changes", "name", "start"), FILES)
def test_a_file_is_named_with_its_setting(tmp_path, files, setting, changes, name, start):
    end = end_of(tmp_path / "out", {**changes, setting: str(files / name)})
    shown = str(files / name).replace("\n", r"\n").replace("\x1b", r"\x1b")
    assert recorded_line_of(end).startswith(start.format(shown))


def test_an_image_is_named_whatever_its_name(tmp_path, files):
    folder = image_folder(tmp_path / "images", b"b\xff\n.png")
    line = recorded_line_of(end_of(tmp_path / "out", {**DATA, "data-dir": str(folder)}))
    assert line.startswith(rf"data-dir: {folder}/ant/b\xff\n.png cannot be decoded: ")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("text", "cannot be made: Not a directory"),
        ("loop", "cannot be made: Too many levels of symbolic links"),
        # A folder on the way is there, and yet is not.
        ("nowhere", "cannot be made: File exists"),
        ("x" * 300, "cannot be made: File name too long"),
        ("line\nend/text", "cannot be made: Not a directory"),
    ],
)
def test_an_output_dir_is_named(files, name, why):
    (files / "line\nend" / "text").touch()
    shown = str(files / name).replace("\n", r"\n")
    line = line_of(end_of(files / name, {}))
    assert line == f"output-dir: {shown}/run {why}"


@pytest.mark.parametrize(("path", "why"), PATHS)
@pytest.mark.parametrize("setting", UNRECORDED)
def test_a_path_that_is_none_is_refused(tmp_path, setting, path, why):
    end = end_of(tmp_path, {setting: path})
    assert line_of(end).startswith(f"{setting}: {path!r} is not allowed: value error, {why}")
    assert not list(tmp_path.iterdir())


def test_a_home_that_is_not_in_utf8_is_refused(tmp_path, monkeypatch):
    """It may be, but the file that resumes the run is TOML, which is."""
    monkeypatch.setenv("HOME", str(tmp_path / NO_UTF8))
    expected = rf"output-dir: {tmp_path}/b\xff/runs/run is not in UTF-8; allowed: a path that is"
    assert line_of(end_of(Path("~/runs"), {})) == expected


def test_a_name_that_is_taken_leaves_that_run_alone(tmp_path):
    (tmp_path / "run").mkdir()
    line = line_of(end_of(tmp_path, {}))
    assert line.startswith(f"run-name: {tmp_path}/run exists already; choose another name or ")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("setting", "changes", "start"),
    [
        ("data-dir", DATA, "data-dir: {} cannot be read: Permission denied"),
        ("partition-file", PARTITION, "partition-file: {} cannot be read: Permission denied"),
        ("output-dir", {}, "output-dir: {}/run cannot be made: Permission denied"),
        ("resume", {}, "resume: {} cannot be opened: Permission denied"),
    ],
)
def test_what_is_closed_to_us_is_named(setting, changes, start):
    with folder_for_all() as base:
        closed = base / "closed"
        closed.touch() if setting == "partition-file" else closed.mkdir()
        with closed_to_us(closed):
            end = end_of(base / "out", {**changes, setting: str(closed)})
            line = (line_of if setting in UNRECORDED else recorded_line_of)(end)
    assert line == start.format(closed)


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A run that is over: only more rounds would resume it."""
    end = end_of(tmp_path_factory.mktemp("completed"), {})
    assert end.summary["status"] == "completed"
    return end.folder


PIPE = b"a pipe in its place"
DEEP = b"[" * 100_000


def replaced(folder: Path, name: str, data: bytes | None) -> None:
    (folder / name).unlink()
    if data is PIPE:
        os.mkfifo(folder / name)
    elif data is not None:
        (folder / name).write_bytes(data)


LAST = "checkpoint/last.safetensors"
MORE = {"num-server-rounds": 2}
RESUMES = [
    (LAST, None, MORE, f"there is no checkpoint {{}}/{LAST}"),
    (LAST, b"torn", MORE, f"{{}}/{LAST} is no checkpoint that can be read: "),
    ("config.json", None, MORE, "{}/config.json cannot be read: No such file or directory"),
    ("config.json", b"\xff", MORE, "{}/config.json cannot be read: "),
    ("config.json", b"[]", MORE, "{}/config.json cannot be read: no object"),
    ("config.json", PIPE, MORE, "{}/config.json cannot be read: it is no regular file"),
    ("config.json", DEEP, MORE, "{}/config.json cannot be read: maximum recursion depth"),
    (LAST, PIPE, MORE, f"{{}}/{LAST} is no checkpoint that can be read: it is no regular file"),
    (
        "rounds.jsonl",
        PIPE,
        MORE,
        "{}/rounds.jsonl does not hold the 1 rounds of the checkpoint: it is no regular file",
    ),
    (
        "rounds.jsonl",
        DEEP,
        MORE,
        "{}/rounds.jsonl does not hold the 1 rounds of the checkpoint: maximum recursion depth",
    ),
    ("summary.json", b'{"status', MORE, "{}/summary.json cannot be read: "),
    (
        "rounds.jsonl",
        b"\xff",
        MORE,
        "{}/rounds.jsonl does not hold the 1 rounds of the checkpoint: ",
    ),
    ("rounds.jsonl", b"", MORE, "{}/rounds.jsonl does not hold the 1 rounds of the checkpoint: "),
    ("", None, {"seed": 1, **MORE}, "the checkpoint is of another run: seed is 1 and was 0"),
    ("", None, {}, "{} is completed with its 1 rounds; a higher num-server-rounds resumes it"),
]


@pytest.mark.parametrize(("name", "data", "changes", "start"), RESUMES)
def test_a_run_that_cannot_be_resumed_is_named_and_left_alone(
    tmp_path, completed, name, data, changes, start
):
    folder = tmp_path / "line\nend"
    shutil.copytree(completed, folder)
    if name:
        replaced(folder, name, data)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (out := tmp_path / "out").mkdir()
    shown = str(folder).replace("\n", r"\n")
    line = line_of(end_of(out, {"resume": str(folder), **changes}))
    assert line.startswith(f"resume: {start.format(shown)}")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("missing", "resume: {} cannot be opened: No such file or directory"),
        ("text", "resume: there is no checkpoint {}/checkpoint/last.safetensors"),
        ("line\nend", "resume: there is no checkpoint {}/checkpoint/last.safetensors"),
        ("loop", "resume: {} cannot be opened: Too many levels of symbolic links"),
        ("\x1b[2J", "resume: {} cannot be opened: No such file or directory"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, files, name, start):
    shown = str(files / name).replace("\n", r"\n").replace("\x1b", r"\x1b")
    line = line_of(end_of(tmp_path / "out", {"resume": str(files / name)}))
    assert line == start.format(shown)


# Models ------------------------------------------------------------------------------------------

MODELS = [
    ("not_a_function", "is a int; allowed: a function of channels, size and num_classes"),
    ("raises", r"fails for channels=1, size=8, num_classes=10: KeyError: 'one\ntwo'"),
    ("mute", "fails for channels=1, size=8, num_classes=10: Mute: (a Mute without words"),
    ("few_arguments", "fails for channels=1, size=8, num_classes=10: TypeError: few_arguments() "),
    ("exits", "failed before its first round: SystemExit: 3 (faulty_models.py:"),
    ("unusual", "failed before its first round: Unusual: no Exception (faulty_models.py:"),
    ("nothing", "returns a NoneType; it must be a torch.nn.Module"),
    ("other_weights", "gives other weights under the same seed; they must depend on torch's"),
    ("bfloat16_buffer", "extra is torch.bfloat16; allowed: torch.float16, torch.float32, torch."),
    ("float8_buffer", "extra is torch.float8_e4m3fn; allowed: torch.float16, torch.float32, "),
    ("huge_buffer", "extra holds 1e+300 before any training; allowed: up to 1e+08"),
    ("huge_weight", "head.weight holds 3e+38 before any training; allowed: up to 1e+08"),
    ("lazy_unused", "unused.weight has no shape, as its lazy layer takes no part in the forward"),
    ("odd_name", r"b\xff cannot be a tensor's name; allowed: UTF-8 of 65535 bytes at most"),
    ("frozen", "has no weight that is trained; allowed: one or more"),
    ("empty_layer", "cannot be loaded at 4 bits: ValueError: unused.weight has no values: its"),
    ("pair_in_training", "gives a tuple in training, not logits"),
    ("gives_bool", "gives logits that are torch.strided of torch.bool; allowed: dense, float"),
    ("gives_sparse", "gives logits that are torch.sparse_coo of torch.float32; allowed: dense, "),
    ("train_raises", "failed before its first round: RuntimeError: no train (faulty_models.py:"),
    (
        "loads_other_names",
        "cannot be loaded at 4 bits: RuntimeError: Error(s) in loading state_dict for "
        '_LoadsOtherNames: Missing key(s) in state_dict: "head.weight", "head.bias"',
    ),
    ("nan_weight", "head.weight is not finite before any training"),
    ("float16", "conv1.weight is torch.float16; allowed: torch.float32"),
    ("on_meta", "conv1.weight is on meta; allowed: weights in memory"),
    ("sparse_buffer", "adjacency is torch.sparse_coo; allowed: dense"),
    ("one_class_more", "gives logits [2, 11] for 2 images; it must be [2, 10]"),
    ("pair", "gives a tuple, not logits"),
    ("no_copy", "cannot be loaded at 4 bits: TypeError: cannot be copied"),
    ("exits_forward", "failed before its first round: SystemExit: in forward (faulty_models.py:"),
    ("raises_in_training", "cannot be trained at 4 bits: RuntimeError: only in training"),
    ("server_raises", r"failed in round 1: RuntimeError: one two b\xff (faulty_models.py:"),
    (
        "server_is_mute",
        "failed in round 1: Mute: (a Mute without words, as its __str__ fails) (fau",
    ),
]


@pytest.mark.parametrize(("name", "start"), MODELS)
def test_a_model_is_named_with_what_is_wrong(tmp_path, name, start):
    line = recorded_line_of(end := end_of(tmp_path, {"model": f"faulty_models:{name}"}))
    assert line.removeprefix(f"model: 'faulty_models:{name}'").lstrip(": ").startswith(start)
    # A fault of the code itself keeps its place.
    assert ("failed" in line) == (end.folder / TRACEBACK).exists() == ("; traceback in " in line)


@pytest.mark.parametrize(
    "model",
    # Metadata in its state dict; a state that is no tensor; layers called with keywords; one layer
    # under two names; no value of its `train`; buffers that are no floats.
    [
        "mnasnet0_5",
        "faulty_models:extra_state",
        "faulty_models:keywords",
        "faulty_models:tied",
        "faulty_models:train_returns_nothing",
        "faulty_models:unsent_buffers",
    ],
)
def test_an_unusual_model_ends_no_run(tmp_path, model):
    end = end_of(tmp_path, {"model": model})
    assert end.error is None
    assert end.log.ends() == end.log.ends_of_clients() == []
    assert end.summary["status"] == "completed"


@pytest.mark.parametrize("strategy", ["prowd", "fedavg", "fedcomgate", "local"])
def test_float32_clients_need_no_layer_that_is_quantized(tmp_path, strategy):
    changes = {"model": "faulty_models:no_layer", "bit-mix": "32:1.0", "strategy": strategy}
    assert end_of(tmp_path, changes).summary["status"] == "completed"


# Strategies --------------------------------------------------------------------------------------

MADE = "'faulty_strategies:{}' cannot be made"
FAILED = "'faulty_strategies:{}' failed"
RETURNS = "{}.combine returns "
ALL = "; allowed: all tensors of the model by name"
STRATEGIES = [
    ("Abstract", f"{MADE} (TypeError: Can't instantiate abstract class Abstract"),
    ("OtherArguments", f"{MADE} (TypeError: OtherArguments.__init__() got an unexpected keyword"),
    ("NoSuper", "the __init__ of 'faulty_strategies:NoSuper' does not call super().__init__"),
    ("InitValue", f"{MADE} (ValueError: one)"),
    ("InitKey", rf"{FAILED} before its first round: KeyError: 'one\ntwo' (faulty_strategies.py:"),
    ("InitExits", f"{FAILED} before its first round: SystemExit: bye (faulty_strategies.py:"),
    ("InstructRaises", f"{FAILED} in round 1: IndexError: one two (faulty_strategies.py:"),
    ("InstructNothing", "InstructNothing.instruct returns no Instruction: None"),
    (
        "InstructText",
        "InstructText.instruct asks for what cannot be sent: Instruction: proximal_mu",
    ),
    ("CombineRaises", f"{FAILED} in round 1: ZeroDivisionError: one two (faulty_strategies.py:"),
    ("CombineExits", f"{FAILED} in round 1: SystemExit (faulty_strategies.py:"),
    ("CombineIsMute", f"{FAILED} in round 1: Mute: (a Mute without words, as its __str__ fails) ("),
    ("CombineText", f"{RETURNS}a str{ALL}"),
    ("CombineArrays", f"{RETURNS}for conv1.weight a ndarray{ALL}"),
    ("CombineFewer", f"{RETURNS}no head.bias{ALL}"),
    ("CombineMore", f"{RETURNS}momentum, which the model has not{ALL}"),
    ("CombineShape", f"{RETURNS}head.bias of shape [1] for [10]{ALL}"),
    ("CombineIntegers", f"{RETURNS}head.bias that is torch.int64 for torch.float32{ALL}"),
    ("CombineSparse", f"{RETURNS}head.bias that is sparse for torch.float32{ALL}"),
    ("StateForNothing", f"StateForNothing.state_for returns no conv1.weight{ALL}"),
    ("ModelForOther", "ModelForOther.model_for returns a model of 32 bits; allowed: 4"),
    ("CheckpointRaises", f"{FAILED} before its first round: OSError: one two (faulty_strategies"),
    ("CheckpointAlone", "CheckpointAlone.checkpoint returns a dict; allowed: two mappings, one of"),
    ("EvaluateRaises", f"{FAILED} in round 1: RuntimeError: one two (faulty_strategies.py:"),
]
CANNOT = ", which JSON cannot hold; allowed: numbers, text, "
SAYING = [
    (
        "InstructWidth",
        "uplink-bits: InstructWidth.instruct asks for 33; allowed: 0, 2 to 16, and 32",
    ),
    (
        "CombineNan",
        "no result could be used in round 1, though every node was asked: its model is ",
    ),
    (
        "CombineOverflows",
        "no result could be used in round 1, though every node was asked: its model is not finite",
    ),
    (
        "CombineTooLarge",
        "no result could be used in round 1, though every node was asked: its model holds more "
        "than 1e+08 (conv1.weight), which no client takes",
    ),
    ("InfiniteOption", "strategy-options: most: inf is not allowed: input should be a finite"),
    ("UnwrittenOption", "strategy-options: kept: <object object at 0x"),
    (
        "CombineReadsNothing",
        "no client could be used in the first round: the strategy has read no ",
    ),
    ("CombineDrops", "no client could be used in the first round: not?this one"),
    ("OwnSettingsError", "strategy-options: not this one"),
    ("OwnFederationError", "the quorum is lost"),
    (
        "CheckpointObject",
        "strategy: faulty_strategies:CheckpointObject/checkpoint/kept is <",
    ),
    (
        "CheckpointText",
        "strategy: the checkpoint of faulty_strategies:CheckpointText has kept, which cannot be",
    ),
    ("OwnObject", "strategy: faulty_strategies:OwnObject/loss/mine is <object obj"),
    ("OwnKey", f"strategy: faulty_strategies:OwnKey has the key 1{CANNOT}"),
    ("OwnBytes", f"strategy: faulty_strategies:OwnBytes/loss is b'1', a bytes{CANNOT}"),
    ("OwnNoUtf8", rf"strategy: faulty_strategies:OwnNoUtf8/name is 'b\udcff', a str{CANNOT}"),
    ("OwnEndless", "strategy: faulty_strategies:OwnEndless/again holds itself, which JSON cannot"),
]


@pytest.mark.parametrize(("name", "start"), STRATEGIES)
def test_a_strategy_is_named_with_what_is_wrong(tmp_path, name, start):
    changes = {"strategy": f"faulty_strategies:{name}", "fraction-evaluate": 1.0}
    line = recorded_line_of(end := end_of(tmp_path, changes))
    assert line.startswith(f"strategy: {start.format(name)}")
    assert ("failed" in line) == (end.folder / TRACEBACK).exists() == ("; traceback in " in line)


@pytest.mark.parametrize(("name", "start"), SAYING)
def test_a_strategys_useless_requests_and_reports_are_named(tmp_path, name, start):
    end = end_of(tmp_path, {"strategy": f"faulty_strategies:{name}"})
    assert recorded_line_of(end).startswith(start)
    assert not (end.folder / TRACEBACK).exists()


def test_what_a_strategys_code_returned_is_laid_beside_it(tmp_path):
    """It need not be the cause, but shows where to look."""
    end = end_of(tmp_path, {"strategy": "faulty_strategies:ModelForNothing"})
    line = recorded_line_of(end)
    assert line.startswith("the run failed in round 1: AttributeError: 'NoneType' object has no ")
    assert ", with strategy 'faulty_strategies:ModelForNothing' and model 'toy:net'); tr" in line


def test_a_strategys_options_that_it_cannot_take_are_its_failure(tmp_path):
    changes = {"strategy": "faulty_strategies:InitDivides", "strategy-options": "eta = 0.0"}
    line = recorded_line_of(end_of(tmp_path, changes))
    assert line.startswith(
        "strategy: 'faulty_strategies:InitDivides' failed before its first round: Z"
    )


@pytest.mark.parametrize("name", ["OwnNotFinite", "CombineOtherFloats"])
def test_an_unusual_strategy_ends_no_run(tmp_path, name):
    end = end_of(tmp_path, {"strategy": f"faulty_strategies:{name}", "num-server-rounds": 2})
    assert end.error is None
    assert end.summary["status"] == "completed"
    last = json.loads((end.folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["clients"]["aggregated"] == 2
    if name == "OwnNotFinite":
        expected = {"nan": None, "list": [1.0, None, [None]], "tensor": [0.5, None]}
        assert last[f"faulty_strategies:{name}"] == expected


# Clients -----------------------------------------------------------------------------------------

IN_TRAINING = "model: 'faulty_models:{}' failed in training: "
CLIENTS = [
    ("client_nan", "training diverged: the loss of step 1 is nan"),
    ("client_nan_gradient", "training diverged: the gradient of conv1.weight in step 1 is not fin"),
    ("client_raises", rf"{IN_TRAINING}RuntimeError: one two \x1b[2J (faulty_models.py:"),
    ("client_is_long", f"{IN_TRAINING}RuntimeError: long long "),
    ("client_exits", f"{IN_TRAINING}SystemExit: 4 (faulty_models.py:"),
    (
        "client_is_mute",
        f"{IN_TRAINING}Mute: (a Mute without words, as its __str__ fails) (faulty_m",
    ),
    ("client_is_unusual", f"{IN_TRAINING}Unusual: no Exception (faulty_models.py:"),
    ("grows", "model: seen has shape [8] after training; it must stay [0]"),
]


@pytest.mark.parametrize(("name", "start"), CLIENTS)
def test_a_client_answers_with_the_line_that_it_logs(tmp_path, name, start):
    end = end_of(tmp_path, {"model": f"faulty_models:{name}"})
    first, second = end.log.ends_of_clients()
    assert first.startswith(start.format(name))
    assert len(first) <= 500
    # Nothing else: no traceback.
    assert len(end.log.of_clients) == 2
    [entry] = map(json.loads, (end.folder / "rounds.jsonl").read_text().splitlines())
    assert entry["left_out"] == {"0": first, "1": second}
    assert entry["clients"]["failed"] == 2
    assert recorded_line_of(end) == f"no client could be used in the first round: {first}"


def test_a_client_that_alone_fails_ends_no_run(tmp_path, monkeypatch):
    real = Node.__call__

    def other_model(node, message):
        if node.config["partition-id"] == 0:
            node.context.run_config = {**node.run_config, "model": "faulty_models:client_exits"}
        return real(node, message)

    monkeypatch.setattr(Node, "__call__", other_model)
    end = end_of(tmp_path, {})
    assert end.error is None
    [line] = end.log.ends_of_clients()
    [entry] = map(json.loads, (end.folder / "rounds.jsonl").read_text().splitlines())
    assert entry["left_out"] == {"0": line}
    assert end.summary["status"] == "completed"


def test_a_node_that_cannot_take_part_says_so_once(tmp_path):
    end = end_of(tmp_path, {}, InProcessGrid, {"bits": 17})
    words = "node-config bits: 17 is not a bit-width; allowed: 2 to 16, or 32"
    assert end.log.ends_of_clients() == [f"this node cannot take part: {words}"] * 2
    refused = "(2 of 2 connected nodes are refused)"
    line = f"0 nodes can take part, min-nodes is 1: {words} {refused}"
    assert recorded_line_of(end) == line


def test_a_state_dir_that_cannot_be_written_is_named(tmp_path):
    (file := tmp_path / "line\nend").touch()
    node_config = {"bits": 8, "state-dir": str(file)}
    end = end_of(tmp_path / "out", {"strategy": "fedcomgate"}, InProcessGrid, node_config)
    first, _ = end.log.ends_of_clients()
    assert first.startswith(rf"node-config: state-dir: {tmp_path}/line\nend/")
    assert re.search("/[01] cannot be written: Not a directory$", first)
    assert recorded_line_of(end) == f"no client could be used in the first round: {first}"


def test_a_state_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def long_name(*_):
        raise OSError(36, "File name too long")

    monkeypatch.setattr("client_app.state_store._rounds", long_name)
    node_config = {"bits": 8, "state-dir": str(tmp_path / "own")}
    end = end_of(tmp_path, {"strategy": "fedcomgate"}, InProcessGrid, node_config)
    first, _ = end.log.ends_of_clients()
    assert first.startswith(f"node-config: state-dir: {tmp_path}/own/")
    assert first.endswith("cannot be read: File name too long")
    recorded_line_of(end)


def test_a_checkpoint_that_a_simulated_client_cannot_write_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client_app.state_store.write_atomic", full)
    end = end_of(tmp_path, {"strategy": "local"})
    first, _ = end.log.ends_of_clients()
    assert first.startswith(f"output-dir: {tmp_path}/run/checkpoint/clients/")
    assert re.search("/[01] cannot be written: No space left on device$", first)
    recorded_line_of(end)


def test_what_ends_a_clients_process_is_no_answer():
    """Ctrl-C, and the exit that Flower raises on a signal."""
    of_flower = {"__name__": "flwr.supercore.exit.exit", "sys": sys}
    exec("def leave(*_):\n    sys.exit(0)", of_flower)

    def interrupted(message, context):
        raise KeyboardInterrupt

    message, context = Message(RecordDict(), 7, "train"), Context(1, 7, {}, RecordDict(), {})
    for handler, kind in ((interrupted, KeyboardInterrupt), (of_flower["leave"], SystemExit)):
        with pytest.raises(kind):
            _failing_in_one_line(handler)(message, context)
