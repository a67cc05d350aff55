"""The check of one cell: a run left in peace, and the same one killed in a round and resumed."""

from pathlib import Path

from matrix.cells import Cell
from matrix.invariants import OF_EVERY_RUN, is_the_same_run
from matrix.running import Trace, run


def check_cell(cell: Cell, folder: Path) -> Trace:
    """Run a cell in both ways, and check all that has to hold; return the run left in peace."""
    straight = run(cell, folder / "straight", killed=folder / "killed")
    for invariant in OF_EVERY_RUN:
        invariant(straight)
    is_the_same_run(straight, run(cell, folder / "killed", resume=True))
    return straight
