"""The other tasks where features cross: strategy, broadcast and training, with a resume."""

import pytest
from matrix.cells import FEW, Cell
from matrix.invariants import (
    completes_with_everybody,
    is_finite,
    is_the_same_run,
    records_its_bytes,
)
from matrix.running import run

SMALL = {"samples_per_client": 12}
TASKS = {
    "text": {"task_options": "context = 8, width = 8, depth = 1, heads = 2"},
    "table": {"task_options": "width = 8"},
    "my_tasks:Signals": {"validation_samples": 0, "samples_per_client": 12},
}
CELLS = [
    Cell("prowd", "calibrated", "strict", FEW),
    Cell("fedcom", "nearest", "qat", FEW),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_any_kind_runs_and_resumes(task, cell, tmp_path):
    settings = {**SMALL, "task": task, **TASKS[task], "optimizer": "adamw"}
    straight = run(cell, tmp_path / "straight", killed=tmp_path / "killed", **settings)
    for invariant in (completes_with_everybody, is_finite, records_its_bytes):
        invariant(straight)
    is_the_same_run(straight, run(cell, tmp_path / "killed", resume=True, **settings))
