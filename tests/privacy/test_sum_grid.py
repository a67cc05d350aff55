"""The integers that a group sums."""

import numpy as np
import pytest
import torch

from privacy.sum_grid import GridError, SumGrid
from quant import Update, UpdateSpec


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_integer_whatever_its_weight(value, weight):
    grid = SumGrid(UpdateSpec({"b": (2,)}), 32, {}, {"b": torch.zeros(2)}, float_bits=16)
    update = Update(32, "weights", {}, {"b": torch.tensor([0.0, value])})
    with pytest.raises(GridError, match=r"^b is not finite; training diverged$"):
        grid.integers(update, weight, np.random.default_rng(0))
