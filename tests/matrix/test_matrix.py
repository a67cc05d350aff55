"""Strategy x broadcast x low-bit training, on clients of 2, 4, 8 and 32 bits; with a resume."""

import pytest
from matrix.cells import CELLS, MIXED
from matrix.checking import check_cell


@pytest.mark.parametrize("cell", [c for c in CELLS if c.widths == MIXED], ids=str)
def test_cell(cell, tmp_path):
    check_cell(cell, tmp_path)
