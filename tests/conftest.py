import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# The federation helpers are shared by several folders of tests.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)

# Files whose tests share something that is started once: they run on one core, one after the other.
TOGETHER = {
    "tests/deployment/test_faults.py": "rehearsal",
    "tests/deployment/test_intruders.py": "rehearsal",
    "tests/deployment/test_rehearsal.py": "rehearsal",
    "tests/end_to_end/test_bring_your_own.py": "flwr run",
    "tests/end_to_end/test_flwr_run.py": "flwr run",
    "tests/end_to_end/test_resume.py": "flwr run",
}


class FilesTogether(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config, log):
    return FilesTogether(config, log)


def pytest_xdist_auto_num_workers():
    # One more than there are cores, as a test of a deployment mostly waits.
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items):
    # What takes longest begins first, so that nothing is left for one core alone in the end.
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in TOGETHER)


def pytest_collection_finish():
    # What torch and Flower are made of stays; a collection need not go through it every time.
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    # All but the tests marked gpu look at single bits of what the CPU computes.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def gpu(request):
    """Skip a test that needs a GPU where torch sees none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here; pytest -m gpu shows it one that is there")
