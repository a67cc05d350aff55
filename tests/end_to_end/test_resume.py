"""A run under `flwr run` whose ServerApp is killed, and the one line that goes on with it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

from server_app.app import main

# Small, and with everything in it that a run keeps: the dequantizer is trained in rounds 2 and 4.
SETTINGS = {
    "num-server-rounds": 5,
    "samples-per-client": 100,
    "model": "cnn",
    "low-bit-training": "strict",
    "prowd-finetune-every": 2,
    "prowd-finetune-steps": 5,
}


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


def unbroken(output_dir: Path) -> Path:
    """The same run, left in peace, in this process."""
    config = {**SETTINGS, "output-dir": str(output_dir), "run-name": "whole"}
    grid = InProcessGrid({50 + i: ClientAppNode(i, 2, config) for i in range(2)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return output_dir / "whole"


def test_a_killed_run_goes_on_and_ends_with_the_unbroken_runs_model(flower, tmp_path):
    folder = flower.output_dir / "killed"
    config = {**SETTINGS, "output-dir": str(flower.output_dir), "run-name": "killed"}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    stream = subprocess.Popen(
        flower.command(text), env=flower.env, cwd=flower.home, stdout=subprocess.DEVNULL
    )
    try:
        while not (folder / "rounds.jsonl").exists():
            assert stream.poll() is None, "the run ended before its first round"
            time.sleep(0.05)
        time.sleep(0.5)
        killed = processes_of(flower.home, "flwr-simulation")
        assert killed
        for process in killed:
            os.kill(process, signal.SIGKILL)
    finally:
        stream.kill()
        stream.wait()
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"

    resumed = flower.run_config("killed", str(folder / "checkpoint" / "resume.toml"))
    assert resumed.status == "finished:completed"
    assert "prowd: going on after round " in resumed.output
    assert [entry["round"] for entry in resumed.rounds] == [1, 2, 3, 4, 5]
    model = (unbroken(tmp_path) / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == model
