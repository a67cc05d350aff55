"""Resuming a run: as if it had never stopped, or refused with the reason."""

import json
import os
import re
import resource
import shutil
import subprocess
import tomllib
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from closed import closed_to_us
from federation import ClientAppNode, InProcessGrid, SimulatedGrid
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.run import RunNotRunningException
from safetensors.numpy import save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.errors import SettingsError
from core.tensor_files import read_tensors, to_bytes
from exchange.protocol import INSTRUCTION
from server_app.app import main
from server_app.checkpoint import read_checkpoint
from server_app.ending import RunFailed
from server_app.record import RunRecord
from strategies import FederationError

SMALL = {
    "samples-per-client": 32,
    "server-buffer": 16,
    "model": "toy:net",
    "bit-mix": "4:0.5,32:0.5",
    "low-bit-training": "strict",
    "node-wait": 0.3,
}
# What tests/matrix does not resume.
SYSTEMS = {
    "prowd in the literal form": {
        "prowd-reference": "global",
        "prowd-dequantize": "client",
        "prowd-finetune-every": 1,
        "prowd-finetune-steps": 1,
    },
    "flwr:QFedAvg": {"flwr-arguments": "client_learning_rate = 0.05, q = 0.1"},
}


def run(output_dir, rounds, clients=2, grid=None, node_configs=None, **settings):
    """Run the real ServerApp, with ClientApps that have nothing in memory; return the folder."""
    config = {"strategy": "fedavg", **SMALL, "num-server-rounds": rounds}
    config |= {"output-dir": str(output_dir), "run-name": "run"}
    config |= {key.replace("_", "-"): value for key, value in settings.items()}
    own = node_configs or {}
    nodes = {50 + i: ClientAppNode(i, clients, config, own.get(i)) for i in range(clients)}
    grid = grid(nodes) if grid else SimulatedGrid(nodes)
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return Path(config.get("resume") or output_dir / "run")


def resume(folder, rounds, **settings):
    return run(folder.parent, rounds, resume=str(folder), **settings)


def entries(folder):
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in found]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two rounds, to be copied; never changed."""
    return run(tmp_path_factory.mktemp("stopped"), 2)


@pytest.fixture
def two_rounds(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_rounds_and_one_more_are_three(tmp_path, system):
    # Both runs evaluate rounds 2 and 3: as an even one, or as their last.
    own = {"strategy": system.split()[0], "evaluate-every": 2, **SYSTEMS[system]}
    whole = run(tmp_path / "whole", 3, **own)
    first = run(tmp_path / "parts", 2, **own)
    parts = resume(first, 3, **own)
    assert entries(parts) == entries(whole)
    assert model(parts) == model(whole)
    one, other = read_checkpoint(whole), read_checkpoint(parts)
    assert one.values == other.values
    assert list(one.tensors) == list(other.tensors)
    assert list(one.model) == list(other.model)
    for kept in ("model", "tensors"):
        for name, tensor in getattr(one, kept).items():
            assert torch.equal(tensor, getattr(other, kept)[name]), name


def test_a_wider_ladder_resumes_where_it_was(tmp_path):
    """The dequantizer that a resumed run grows keeps its trained blocks."""
    own = {"strategy": "prowd", "prowd-finetune-every": 1, "prowd-finetune-steps": 1}
    folder = run(tmp_path, 1, **own)
    tensors = read_checkpoint(folder).tensors
    assert any(bool(t.abs().max() > 0) for n, t in tensors.items() if n.endswith("4.weight"))
    resume(folder, 2, **own)
    assert entries(folder)[1]["prowd"]["reconstruction-loss"] > 0


def test_corrections_that_clients_lost_begin_anew(tmp_path):
    folder = run(tmp_path, 2, strategy="fedcomgate")
    shutil.rmtree(folder / "checkpoint" / "clients")
    before = read_checkpoint(folder).values["epoch"]
    resume(folder, 3, strategy="fedcomgate")
    assert read_checkpoint(folder).values["epoch"] == before + 1
    assert summary(folder)["status"] == "completed"


class Reporting(SimulatedGrid):
    """A node that raises answers with an error, as Flower's runtime does for it."""

    def __init__(self, nodes):
        super().__init__({node_id: self.guarded(node) for node_id, node in nodes.items()})

    @staticmethod
    def guarded(node):
        def answer(message):
            try:
                return node(message)
            except Exception as error:
                return Message(Error(code=2, reason=str(error)), reply_to=message)

        return answer


def test_a_local_client_that_lost_its_model_is_sent_the_start_again(tmp_path):
    folder = run(tmp_path, 2, strategy="local")
    shutil.rmtree(next((folder / "checkpoint" / "clients").glob("*/0")))
    resume(folder, 4, strategy="local", grid=Reporting)
    assert [entry["clients"]["failed"] for entry in entries(folder)] == [0, 0, 1, 0]
    assert "no longer has a model" in entries(folder)[2]["left_out"]["0"]


def test_rounds_after_the_checkpoint_do_not_stand_twice(two_rounds, tmp_path):
    """A crash between the record and the checkpoint, in the middle of a line at that."""
    last = (two_rounds / "rounds.jsonl").read_text().splitlines()[-1]
    lost = json.dumps({**json.loads(last), "round": 3})
    with open(two_rounds / "rounds.jsonl", "a") as file:
        file.write(lost + "\n" + lost[:40])
    resume(two_rounds, 4)
    assert [entry["round"] for entry in entries(two_rounds)] == [1, 2, 3, 4]
    whole = run(tmp_path / "whole", 4)
    assert model(two_rounds) == model(whole)
    resumed, unbroken = summary(two_rounds), summary(whole)
    assert resumed.pop("seconds") > 0
    assert unbroken.pop("seconds") > 0
    assert resumed == unbroken


def test_tensorboard_shows_each_round_once(two_rounds):
    # As if round 2 had been shown but not kept: its checkpoint is put back to round 1.
    kept = read_checkpoint(two_rounds)
    put_back(two_rounds, round=1, values=kept.values)
    resume(two_rounds, 3)
    board = EventAccumulator(str(two_rounds / "tensorboard")).Reload()
    assert [s.step for s in board.Scalars("accuracy/average")] == [1, 2, 3]


def test_the_record_tells_what_it_was_made_with(two_rounds):
    resume(two_rounds, 3, round_timeout=77.0)
    config = json.loads((two_rounds / "config.json").read_text())
    assert config["settings"]["round-timeout"] == 77.0
    assert config["resumed_after"] == 2
    (earlier,) = config["earlier"]
    assert earlier["settings"]["num-server-rounds"] == 2
    assert earlier["settings"]["resume"] == ""
    resume(two_rounds, 4)
    config = json.loads((two_rounds / "config.json").read_text())
    assert [e["settings"]["num-server-rounds"] for e in config["earlier"]] == [2, 3]


def test_the_settings_to_resume_are_in_a_file(two_rounds):
    given = tomllib.loads((two_rounds / "checkpoint" / "resume.toml").read_text())
    config = json.loads((two_rounds / "config.json").read_text())["settings"]
    assert given.pop("resume").endswith("/run")
    assert given == {key: value for key, value in config.items() if key != "resume"}


def test_a_crash_before_the_first_round_is_over_can_be_resumed(two_rounds, stopped):
    class Crash(SimulatedGrid):
        def pull_messages(self, ids):
            if any(m.metadata.message_type == "train" for m in self.sent):
                raise MemoryError("crashed")
            return super().pull_messages(ids)

    shutil.rmtree(two_rounds)
    with pytest.raises(RunFailed, match="MemoryError: crashed"):
        run(two_rounds.parent, 2, grid=Crash)
    assert summary(two_rounds)["rounds"] == 0
    assert not (two_rounds / "model.safetensors").exists()
    resume(two_rounds, 2)
    assert model(two_rounds) == model(stopped)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "fedprox"}, "strategy is 'fedprox' and was 'fedavg'"),
        ({"model": "resnet8"}, "model is 'resnet8' and was 'toy:net'"),
        ({"learning_rate": 0.1}, "learning-rate is 0.1 and was 0.05"),
        ({"bit_mix": "8:0.5,32:0.5"}, "bit-mix is '8:0.5,32:0.5' and was '4:0.5,32:0.5'"),
        ({"seed": 1, "batch_size": 8}, "batch-size is 8 and was 32; seed is 1 and was 0"),
        ({"dataset": "fashion-mnist"}, "dataset is 'fashion-mnist' and was 'digits'"),
        ({"server_threads": 2}, "server-threads is 2 and was 1"),
        ({"clients": 4}, "num-partitions is 4 and was 2"),
        ({"rounds": 1}, "num-server-rounds: 1, but "),
        ({"rounds": 2}, "is completed with its 2 rounds; a higher num-server-rounds"),
        ({"resume": "run"}, "resume: 'run' is not allowed: value error, the path must be absolute"),
        ({"resume": "/nowhere"}, "resume: /nowhere cannot be opened: No such file or directory"),
        ({"resume": 5}, "resume: 5 is not allowed"),
    ],
)
def test_another_run_is_refused_in_one_line_and_the_record_left_alone(two_rounds, changes, reason):
    before = contents(two_rounds)
    arguments = {"rounds": 3, "resume": str(two_rounds), **changes}
    with pytest.raises(SettingsError) as caught:
        run(two_rounds.parent, **arguments)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(two_rounds) == before


def put_back(folder, **changes):
    """Rewrite the head of a checkpoint, with a checksum that fits."""
    path = folder / "checkpoint" / "last.safetensors"
    head, tensors = read_tensors(path)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    path.write_bytes(to_bytes(head | changes, arrays))


def test_other_data_under_the_same_name_is_refused(two_rounds):
    kept = read_checkpoint(two_rounds).identity
    put_back(two_rounds, identity={**vars(kept), "data": "1437 + 360 images, CRC 00000000"})
    with pytest.raises(SettingsError, match=r"data is '1437 \+ 360 .* and was '.*CRC 00000000'"):
        resume(two_rounds, 3)


def test_another_partition_in_the_file_is_refused_and_another_place_is_not(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(json.dumps({"clients": content}))
        return str(path)

    half = [list(range(32)), list(range(32, 64))]
    first = write("first.json", half)
    folder = run(tmp_path, 1, partitioner="file", partition_file=first)
    moved = write("moved.json", half)
    assert resume(folder, 2, partitioner="file", partition_file=moved) == folder
    assert len(entries(folder)) == 2
    other = write("other.json", half[::-1])
    with pytest.raises(SettingsError, match=r"another run: data is .*partition-file of CRC"):
        resume(folder, 3, partitioner="file", partition_file=other)
    assert len(entries(folder)) == 2


def test_a_model_of_other_shapes_under_the_same_name_is_refused(two_rounds):
    kept = read_checkpoint(two_rounds).identity
    shapes = {**kept.shapes, "hidden.bias": [99]}
    put_back(two_rounds, identity={**vars(kept), "shapes": shapes})
    with pytest.raises(SettingsError, match=r"shape of hidden.bias is \[\d+\] and was \[99\]"):
        resume(two_rounds, 3)


def test_another_format_is_refused(two_rounds):
    put_back(two_rounds, format=99)
    with pytest.raises(SettingsError, match=r"has format 99; this version reads 6$"):
        resume(two_rounds, 3)


def test_a_checkpoint_of_an_earlier_form_is_refused(two_rounds):
    path = two_rounds / "checkpoint" / "last.safetensors"
    path.write_bytes(save({}, {"prowd": '{"format": 5}', "sha256": "0"}))
    with pytest.raises(SettingsError, match=r"it has no checksum; an earlier version wrote it$"):
        resume(two_rounds, 3)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:100], lambda d: b"", bytes.upper]
)
def test_a_damaged_checkpoint_is_refused(two_rounds, damage):
    path = two_rounds / "checkpoint" / "last.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SettingsError, match="no checkpoint that can be read"):
        resume(two_rounds, 3)


def flip_a_bit(path, find):
    """Flip the lowest bit of the last byte of what is found; nothing else of the file changes."""
    data = bytearray(path.read_bytes())
    data[next(re.finditer(find, data, flags=re.DOTALL)).end() - 1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "find",
    [rb".*", rb'\\"round\\": 2', rb'\\"learning-rate\\": 0\.05', rb'client_key\\": \\".'],
    ids=["the last weight", "the round", "a setting", "the run's name"],
)
def test_one_flipped_bit_of_a_checkpoint_is_refused(two_rounds, find):
    flip_a_bit(two_rounds / "checkpoint" / "last.safetensors", find)
    before = contents(two_rounds)
    with pytest.raises(SettingsError) as caught:
        resume(two_rounds, 3)
    assert str(caught.value).endswith(": its checksum is of something else")
    assert contents(two_rounds) == before


def test_a_checkpoint_with_a_weight_that_is_no_number_is_refused(two_rounds):
    path = two_rounds / "checkpoint" / "last.safetensors"
    head, tensors = read_tensors(path)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays["model/hidden.bias"][-1] = np.inf
    path.write_bytes(to_bytes(head, arrays))
    with pytest.raises(SettingsError, match=r"^resume: the model in .* is not finite$"):
        resume(two_rounds, 3)


@pytest.mark.parametrize("package", ["prowd", "torch", "flwr"])
def test_the_checkpoint_of_another_version_is_refused(two_rounds, package):
    kept = read_checkpoint(two_rounds).identity
    now = kept.versions[package]
    put_back(two_rounds, identity={**vars(kept), "versions": {**kept.versions, package: "0.0.9"}})
    before = contents(two_rounds)
    with pytest.raises(SettingsError) as caught:
        # Of the settings it says nothing: they may be other ones in that version.
        resume(two_rounds, 3, strategy="fedprox")
    reason = f"the checkpoint is of another version: {package} is {now!r} and was '0.0.9'"
    assert str(caught.value) == f"resume: {reason}"
    assert contents(two_rounds) == before


def test_a_checkpoint_without_a_strategy_is_one_line(two_rounds):
    kept = read_checkpoint(two_rounds).identity
    put_back(two_rounds, identity={**vars(kept), "settings": {}})
    with pytest.raises(SettingsError, match="strategy is 'fedavg' and was None"):
        resume(two_rounds, 3)


def test_a_record_without_the_rounds_of_the_checkpoint_is_refused(two_rounds):
    (two_rounds / "rounds.jsonl").write_text("")
    with pytest.raises(SettingsError, match="does not hold the 2 rounds"):
        resume(two_rounds, 3)


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_a_missing_or_torn_file_of_the_record_is_one_line(two_rounds, name, damage):
    damage(two_rounds / name)
    before = contents(two_rounds)
    with pytest.raises(SettingsError, match=rf"resume: .*{name} cannot be read") as caught:
        resume(two_rounds, 3)
    assert "\n" not in str(caught.value)
    assert contents(two_rounds) == before


def test_a_folder_without_a_checkpoint_is_refused(two_rounds):
    shutil.rmtree(two_rounds / "checkpoint")
    with pytest.raises(SettingsError, match=r"there is no checkpoint .*last\.safetensors$"):
        resume(two_rounds, 3)


@pytest.mark.parametrize("place", [".", "checkpoint"])
def test_the_folder_of_another_user_is_one_line(stopped, place):
    # Not under tmp_path, which the user nobody may not enter.
    with TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = shutil.copytree(stopped, Path(base) / "run")
        with closed_to_us(folder / place), pytest.raises(SettingsError) as caught:
            resume(folder, 3)
        assert "Permission denied" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_that_is_still_going_is_not_resumed_beside(tmp_path):
    class Beside(SimulatedGrid):
        def pull_messages(self, ids):
            if any(m.metadata.message_type == "train" for m in self.sent) and not refused:
                refused.append("")
                with pytest.raises(SettingsError) as caught:
                    resume(tmp_path / "run", 3)
                refused[0] = str(caught.value)
            return super().pull_messages(ids)

    refused = []
    folder = run(tmp_path, 2, grid=Beside)
    assert refused == [f"resume: another process is writing {folder}"]
    assert summary(folder)["status"] == "completed"


def test_a_resume_holds_the_run_while_it_still_gathers(two_rounds):
    """Its checkpoint would be stale, and its record cut, had another one finished meanwhile."""

    class Beside(SimulatedGrid):
        def get_node_ids(self):
            if not refused:
                refused.append("")
                with pytest.raises(SettingsError) as caught:
                    resume(two_rounds, 4)
                refused[0] = str(caught.value)
            return super().get_node_ids()

    refused = []
    resume(two_rounds, 3, grid=Beside)
    assert refused == [f"resume: another process is writing {two_rounds}"]
    assert [entry["round"] for entry in entries(two_rounds)] == [1, 2, 3]


# --- runs that fail on the way -----------------------------------------------------------------


class Leaving(SimulatedGrid):
    """One node goes after the second round."""

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        trained = [m for m in self.sent if m.metadata.message_type == "train"]
        self.leaving = len(trained) == 4
        return ids

    def get_node_ids(self):
        if getattr(self, "leaving", False):
            self.nodes.pop(51, None)
        return super().get_node_ids()


def test_a_run_that_falls_below_min_nodes_leaves_its_model_and_can_be_resumed(tmp_path):
    with pytest.raises(FederationError, match="1 nodes can take part, min-nodes is 2"):
        run(tmp_path, 4, grid=Leaving, min_nodes=2)
    folder = tmp_path / "run"
    assert summary(folder)["status"] == "failed"
    assert summary(folder)["rounds"] == 2
    assert model(folder) == model(run(tmp_path / "two", 2))
    resume(folder, 4, min_nodes=2)
    assert summary(folder)["status"] == "completed"
    assert model(folder) == model(run(tmp_path / "four", 4))


@pytest.mark.parametrize("ended", [RunNotRunningException, KeyboardInterrupt])
def test_a_run_that_flower_ended_while_the_superlink_was_away_can_be_resumed(
    tmp_path, stopped, ended
):
    """To a SuperLink that is back after a minute the run is over: it refuses the ServerApp's calls.

    Flower raises that at 403, and at 401 interrupts its process; neither is an `Exception`.
    """

    class Ended(SimulatedGrid):
        def pull_messages(self, ids):
            if sum(m.metadata.message_type == "train" for m in self.sent) == 4:
                raise ended
            return super().pull_messages(ids)

    with pytest.raises((ended, RunFailed)):
        run(tmp_path, 2, grid=Ended)
    folder = tmp_path / "run"
    assert summary(folder)["status"] == "failed"
    assert summary(folder)["rounds"] == 1
    resume(folder, 2)
    assert summary(folder)["status"] == "completed"
    assert [entry["round"] for entry in entries(folder)] == [1, 2]
    assert model(folder) == model(stopped)


@contextmanager
def file_size_limit(size):
    """The kernel refuses files above this size, for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_intact(two_rounds):
    kept = (two_rounds / "checkpoint" / "last.safetensors").read_bytes()
    with file_size_limit(10_000), pytest.raises(SettingsError) as caught:
        resume(two_rounds, 4)
    assert "last.safetensors cannot be written: File too large" in str(caught.value)
    assert summary(two_rounds)["status"] == "failed"
    assert (two_rounds / "checkpoint" / "last.safetensors").read_bytes() == kept
    assert not list(two_rounds.rglob("*.part"))
    resume(two_rounds, 4)
    assert summary(two_rounds)["status"] == "completed"


def test_a_full_disk_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def full(self, state):
        raise SettingsError("output-dir: model.safetensors cannot be written: No space left")

    monkeypatch.setattr(RunRecord, "write_model", full)
    with pytest.raises(FederationError, match="1 nodes can take part, min-nodes is 2"):
        run(tmp_path, 4, grid=Leaving, min_nodes=2)
    assert "min-nodes is 2" in summary(tmp_path / "run")["reason"]


@contextmanager
def mounted(folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kib", [400, 1000, 1250])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_intact(tmp_path, kib):
    """A disk of so many KiB; a checkpoint takes 606 kB, or twice that while it is replaced."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs") as disk:
        with pytest.raises(SettingsError, match="No space left on device") as caught:
            run(disk, 100, model="cnn", evaluate_every=100)
        assert str(caught.value).startswith("output-dir: ")
        assert "\n" not in str(caught.value)
        rescued = shutil.copytree(disk / "run", tmp_path / "rescued")
    if kib == 400:
        assert not (rescued / "checkpoint" / "last.safetensors").exists()
        return
    done = read_checkpoint(rescued).server_round
    assert done == 0 if kib == 1000 else done > 0
    resume(rescued, done + 1, model="cnn", evaluate_every=100)
    assert summary(rescued)["status"] == "completed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_one_line(two_rounds):
    """TensorBoard writes in a thread of its own, and fails once more when it is closed."""
    disk = ("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    with mounted(two_rounds / "tensorboard", *disk), pytest.raises(SettingsError) as caught:
        resume(two_rounds, 40)
    assert "tensorboard cannot be written: No space left" in str(caught.value)
    assert "tensorboard cannot be written" in summary(two_rounds)["reason"]


@pytest.mark.parametrize("place", [".", "checkpoint"])
def test_a_folder_that_cannot_be_written_is_one_line(two_rounds, place):
    folder = two_rounds / place
    kept = contents(two_rounds)
    with mounted(folder, "--bind", "-o", "ro", str(folder)):
        with pytest.raises(SettingsError, match="cannot be written: Read-only file system"):
            resume(two_rounds, 3)
        last = two_rounds / "checkpoint" / "last.safetensors"
        assert last.read_bytes() == kept[last]


def test_a_file_in_place_of_the_checkpoints_folder_is_one_line(tmp_path, monkeypatch):
    class Meddling(SimulatedGrid):
        def get_node_ids(self):
            (tmp_path / "run" / "checkpoint").touch()
            return super().get_node_ids()

    with pytest.raises(SettingsError, match=r"checkpoint cannot be written: File exists"):
        run(tmp_path, 2, grid=Meddling)
    assert summary(tmp_path / "run")["status"] == "failed"


def told_to_keep_in(grids):
    records = [m.content[INSTRUCTION] for g in grids for m in g.sent if INSTRUCTION in m.content]
    return {record["keep_in"] for record in records}


@pytest.mark.parametrize("strategy", ["local", "fedcomgate"])
def test_networked_nodes_resume_from_their_own_state_dir(tmp_path, strategy):
    grids = []

    class Networked(InProcessGrid):
        def __init__(self, nodes):
            super().__init__(nodes)
            grids.append(self)

    def node_configs(name):
        return {
            i: {"bits": b, "state-dir": str(tmp_path / name / str(i))} for i, b in ((0, 4), (1, 32))
        }

    own = {"strategy": strategy, "bit_mix": "4:0.5,32:0.5"}
    own["grid"] = Networked
    whole = run(tmp_path / "whole", 3, node_configs=node_configs("a"), **own)
    folder = run(tmp_path, 2, node_configs=node_configs("b"), **own)
    assert not (folder / "checkpoint" / "clients").exists()
    resume(folder, 3, node_configs=node_configs("b"), **own)
    assert entries(folder) == entries(whole)
    keys = [read_checkpoint(path).identity.client_key for path in (whole, folder)]
    assert told_to_keep_in(grids) == set(keys), "no folder of the server's"


def test_networked_nodes_may_have_other_widths_when_a_run_is_resumed(tmp_path):
    own = {"strategy": "prowd", "prowd-finetune-steps": 1}
    folder = run(tmp_path, 1, node_configs={0: {"bits": 4}, 1: {"bits": 32}}, **own)
    resume(folder, 2, node_configs={0: {"bits": 8}, 1: {"bits": 32}}, **own)
    assert [sorted(e["uplink_bytes"]) for e in entries(folder)] == [["32", "4"], ["32", "8"]]
    assert summary(folder)["status"] == "completed"


def test_a_client_restarted_before_evaluation_evaluates_what_it_trained_last(tmp_path):
    class Restarting(SimulatedGrid):
        def push_messages(self, messages):
            for node in self.nodes.values():
                node.lose_state()
            return super().push_messages(messages)

    whole = run(tmp_path / "whole", 2, strategy="local")
    restarted = run(tmp_path / "restarted", 2, strategy="local", grid=Restarting)
    assert entries(restarted) == entries(whole)


def test_what_simulated_clients_keep_does_not_grow(tmp_path):
    folder = run(tmp_path, 5, strategy="fedcomgate")
    kept = sorted(os.listdir(next((folder / "checkpoint" / "clients").glob("*/0"))))
    assert kept == ["4.safetensors", "5.safetensors"]
