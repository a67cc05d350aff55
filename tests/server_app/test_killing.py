"""kill -9 at random moments, some within the writing of a file: a resumed run is as if unbroken."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

PROJECT = Path(__file__).parents[2]
SMALL = {
    "num-server-rounds": 4,
    "samples-per-client": 32,
    "server-buffer": 16,
    "evaluate-every": 2,
    "model": "cnn",
    "bit-mix": "4:0.5,32:0.5",
    "low-bit-training": "strict",
}
PROWD = {"strategy": "prowd", "prowd-finetune-every": 2, "prowd-finetune-steps": 2}
MOMENTUM = {"strategy": "flwr:FedAvgM", "flwr-arguments": "server_momentum = 0.5"}
# Name: kills, configuration. The strategies that keep something, on the server or with clients.
JOBS = {
    "prowd": (8, SMALL | PROWD),
    "fedcomgate": (4, SMALL | {"strategy": "fedcomgate"}),
    "grouped-avg": (4, SMALL | {"strategy": "grouped-avg", "fraction-train": 0.5}),
    "local": (4, SMALL | {"strategy": "local", "fraction-train": 0.5}),
    "fedavgm": (4, SMALL | MOMENTUM),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of the runs, and the exit codes of the processes by job."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder)],
        input=json.dumps(JOBS),
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_runs_are_killed_at_least_twenty_times_and_end(killed):
    _, codes = killed
    assert sum(code == -signal.SIGKILL for job in codes.values() for code in job) >= 20
    for name, job in codes.items():
        # Nothing but the kill ever ended a process, and the last came to its end.
        assert set(job[:-1]) == {-signal.SIGKILL}, name
        assert job[-1] == 0, name


def entries(folder):
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in found]


def tensors(folder):
    """Bytes of every tensor that a run left: models, checkpoint, what clients keep on disk."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        # The folder of what clients keep is named at random.
        place = "/".join(p for p in path.relative_to(folder).parts if len(p) != 32)
        for name, array in load_file(path).items():
            found[place, name] = (array.shape, array.tobytes())
    return found


@pytest.mark.parametrize("name", JOBS)
def test_the_resumed_run_is_the_unbroken_one_byte_for_byte(killed, name):
    whole, broken = (killed[0] / name / part for part in ("whole", "broken"))
    if name != "local":  # It has no global model.
        model = (whole / "model.safetensors").read_bytes()
        assert (broken / "model.safetensors").read_bytes() == model
    assert entries(broken) == entries(whole)
    assert tensors(broken) == tensors(whole)
    if name in ("local", "fedcomgate"):
        assert any("clients" in place for place, _ in tensors(whole))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, broken)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]
    assert not list(broken.rglob("*.part"))
