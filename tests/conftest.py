import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# The federation helpers are shared by several folders of tests.
sys.path.insert(0, str(TESTS))

torch.set_num_threads(1)

# Tests that share something that is started once: they run on one core, one after the other.
TOGETHER = {
    "deployment/test_faults.py": "rehearsal",
    "deployment/test_intruders.py": "rehearsal",
    "deployment/test_rehearsal.py": "rehearsal",
    "end_to_end/test_flwr_run.py": "flwr run",
    "end_to_end/test_resume.py": "flwr run",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(file, file)))
