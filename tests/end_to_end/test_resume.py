"""A run under `flwr run` whose ServerApp is killed, and the one line that resumes it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from containers import PATIENCE, wait_until
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

from server_app.app import main

# Small, and with everything in it that a run keeps: the dequantizer is trained in each round.
SETTINGS = {
    "num-server-rounds": 10_000,
    "fraction-train": 0.75,
    "samples-per-client": 32,
    "model": "toy:net",
    "low-bit-training": "strict",
    "node-wait": PATIENCE,
    "prowd-finetune-every": 1,
    "prowd-finetune-steps": 5,
}
NUM_NODES = 4
TWO_AT_ONCE = f"num-supernodes={NUM_NODES} client-resources-num-cpus=1"
ONE_AT_A_TIME = f"num-supernodes={NUM_NODES} client-resources-num-cpus=2"


def processes_of(home: Path, name: str) -> list[int]:
    """Processes of the tests' own SuperLink whose command holds a name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # It ended, or is another user's.
        if name.encode() in command and f"FLWR_HOME={home}".encode() in environment:
            found.append(int(folder.name))
    return found


def unbroken(output_dir: Path, rounds: int) -> Path:
    """The same run, left in peace, in this process."""
    config = {**SETTINGS, "output-dir": str(output_dir), "run-name": "whole"}
    config["num-server-rounds"] = rounds
    grid = InProcessGrid({50 + i: ClientAppNode(i, NUM_NODES, config) for i in range(NUM_NODES)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return output_dir / "whole"


@pytest.mark.deployment
def test_a_killed_run_resumes_and_ends_with_the_unbroken_runs_model(flower, tmp_path):
    """Whatever the number of workers: two until it is killed, one after that."""
    folder = flower.output_dir / "killed"
    config = {**SETTINGS, "output-dir": str(flower.output_dir), "run-name": "killed"}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    stream = subprocess.Popen(
        flower.command(text, TWO_AT_ONCE),
        env=flower.env,
        cwd=flower.home,
        stdout=subprocess.DEVNULL,
    )

    def goes() -> bool:
        assert stream.poll() is None, "the run ended before its first round"
        return (folder / "rounds.jsonl").exists()

    try:
        wait_until(goes, "a round is over")
        killed = processes_of(flower.home, "flwr-simulation")
        assert killed
        for process in killed:
            os.kill(process, signal.SIGKILL)
    finally:
        stream.kill()
        stream.wait()
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"

    rounds = 2 + (folder / "rounds.jsonl").read_text().count("\n")
    file = folder / "checkpoint" / "resume.toml"
    text, changed = re.subn("(?m)^(num-server-rounds *= *).*", rf"\g<1>{rounds}", file.read_text())
    assert changed == 1
    file.write_text(text)
    resumed = flower.run_config("killed", str(file), ONE_AT_A_TIME)
    assert resumed.status == "finished:completed"
    assert "prowd: resuming after round " in resumed.output
    assert [entry["round"] for entry in resumed.rounds] == list(range(1, rounds + 1))
    model = (unbroken(tmp_path, rounds) / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == model
