"""What a process imports that trains, which a deployment starts anew for every message."""

import subprocess
import sys

# Each takes about as long to import as a small client to train.
SLOW = ("torch._dynamo", "flwr_datasets", "matplotlib", "torchvision")
RUN = f"""
import sys
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from server_app.app import main

settings = {{
    "model": "toy:net",
    "samples-per-client": 16,
    "num-server-rounds": 1,
    "bit-mix": "4:0.5,32:0.5",
    "output-dir": sys.argv[1],
    "prowd-finetune-every": 1,
    "prowd-finetune-steps": 1,
}}
for training in ("qat", "strict"):
    config = {{**settings, "low-bit-training": training, "run-name": training}}
    grid = InProcessGrid({{i: ClientAppNode(i, 2, config) for i in range(2)}})
    main(grid, Context(1, 0, {{}}, RecordDict(), config))
print([name for name in {SLOW!r} if name in sys.modules])
"""


def test_a_run_imports_nothing_slow_that_it_does_not_need(tmp_path):
    """On clients of both kinds, and on a server that trains its dequantizer."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for training in ("qat", "strict"):
        assert (tmp_path / training / "model.safetensors").exists()
