"""A ClientApp's process, which Flower starts anew for every message in a deployment."""

import subprocess
import sys

# Each takes about as long to import as a small client to train.
SLOW = ("torch._dynamo", "flwr_datasets", "matplotlib", "torchvision")
ROUND = f"""
import sys
from federation import ClientAppNode, InProcessGrid
from flwr.app import ConfigRecord
from strategies import FedAvg
from strategies.states import to_arrays
from task.models import build_model
from task.training import model_state

arrays = to_arrays(model_state(build_model("cnn", 1, 8, 10, seed=0)))
for training in ("qat", "strict"):
    settings = {{"model": "cnn", "samples-per-client": 16, "low-bit-training": training}}
    grid = InProcessGrid({{i: ClientAppNode(i, 2, settings) for i in range(2)}})
    strategy = FedAvg(min_nodes=2)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    strategy.aggregate_train(1, list(grid.send_and_receive(messages)))
    assert strategy.round_log.aggregated == [0, 1], strategy.round_log
    assert strategy.round_log.uplink_bytes.keys() == {{8, 32}}
print([name for name in {SLOW!r} if name in sys.modules])
"""


def test_training_imports_nothing_slow_that_it_does_not_need():
    done = subprocess.run(
        [sys.executable, "-c", ROUND],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
