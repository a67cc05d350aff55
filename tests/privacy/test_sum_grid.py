"""The integers that a group sums."""

import numpy as np
import pytest
import torch

from privacy.sum_grid import GridError, SumGrid
from quant import FLOAT_BITS, Update, UpdateSpec, quantize_difference


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_integer_whatever_its_weight(value, weight):
    grid = SumGrid(UpdateSpec({"b": (2,)}), 32, {}, {"b": torch.zeros(2)}, float_bits=16)
    update = Update(32, "weights", {}, {"b": torch.tensor([0.0, value])})
    with pytest.raises(GridError, match=r"^b is not finite; training diverged$"):
        grid.integers(update, weight, np.random.default_rng(0))


@pytest.mark.parametrize("bits", [*range(2, 17), FLOAT_BITS])
def test_differences_on_grids_of_their_own_sum_to_their_mean_within_a_step(bits):
    shape, rng = (3, 40), torch.Generator().manual_seed(bits)
    start = {"w": torch.randn(shape, generator=rng)}
    grid = SumGrid(UpdateSpec({"w": shape}, {"w"}), FLOAT_BITS, {}, start, float_bits=20)
    updates = [
        quantize_difference({"w": torch.randn(shape, generator=rng) * size}, bits, rng, ["w"])
        for size in (0.01, 0.3)
    ]
    parts = [grid.integers(u, 1, np.random.default_rng(bits)) for u in updates]
    moved = grid.mean([sum(of_each) for of_each in zip(*parts, strict=True)], 2)["w"] - start["w"]
    exact = sum(u.dequantize()["w"] for u in updates) / 2
    assert float((moved - exact).abs().max()) <= grid.steps["w"] + 1e-6
    assert float(exact.abs().max()) > 1000 * grid.steps["w"]
