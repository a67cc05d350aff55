"""kill -9 at random moments, some within the writing of a file: a resumed run is as if unbroken.

In random rounds, that is: the moment is drawn within the round, as a process spends most of its
time on its start and on its first round.
"""

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
    "num-server-rounds": 6,
    "samples-per-client": 32,
    "server-buffer": 16,
    "evaluate-every": 3,
    "model": "toy:net",
    "bit-mix": "4:0.5,32:0.5",
    "low-bit-training": "strict",
}
PROWD = {"strategy": "prowd", "prowd-finetune-every": 2, "prowd-finetune-steps": 2}
MOMENTUM = {"strategy": "flwr:FedAvgM", "flwr-arguments": "server_momentum = 0.5"}
pytestmark = pytest.mark.deployment
# Kills of each run: one before a round, the others in different rounds.
KILLS = 5
# By name, the strategies that keep something, on the server or with clients.
JOBS = {
    "prowd": SMALL | PROWD,
    "fedcomgate": SMALL | {"strategy": "fedcomgate"},
    "grouped-avg": SMALL | {"strategy": "grouped-avg", "fraction-train": 0.5},
    "local": SMALL | {"strategy": "local", "fraction-train": 0.5},
    "fedavgm": SMALL | MOMENTUM,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of the runs, and the attempts of the broken one by job."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder)],
        input=json.dumps({name: (KILLS, config) for name, config in JOBS.items()}),
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_runs_are_killed_at_least_twenty_times_and_end(killed):
    assert KILLS * len(JOBS) >= 20
    for name, attempts in killed[1].items():
        # Nothing but the kill ever ended a process, and the last came to its end.
        codes = [attempt["code"] for attempt in attempts]
        assert codes == [-signal.SIGKILL] * KILLS + [0], name


def test_kills_are_in_and_resumes_from_different_rounds(killed):
    for name, attempts in killed[1].items():
        kills = [attempt for attempt in attempts if attempt["phase"] is not None]
        # In a start, and in four different rounds.
        assert len({kill["phase"] for kill in kills}) == KILLS, name
        assert len({attempt["after"] for attempt in attempts}) >= 3, name
        # Also in rounds that were not the first of their process.
        assert any(kill["phase"] > kill["after"] + 1 for kill in kills), name


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
