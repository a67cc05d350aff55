"""How large a payload's tensors can be, without a look at its codes."""

import pytest
import torch
from specs import difference_of, spec_of_state, to_bits

from quant import (
    Expected,
    QuantizedTensor,
    Update,
    UpdateSpec,
    encode,
    squares_at_most,
)


def test_the_bound_by_hand():
    """Three bits: codes up to 3, so three codes of step 0.5 are 1.5 at most."""
    codes = torch.tensor([[3, -3, 3], [0, 1, -1]], dtype=torch.int8)
    update = Update(
        3,
        "weights",
        {"w": QuantizedTensor(codes, torch.tensor([0.5, 2.0]))},
        {
            "b": torch.tensor([2.0, -1.0]),
            "n.running_mean": torch.tensor([3.0]),
            "n.running_var": torch.tensor([2.0]),
            "n.weight": torch.tensor([4.0]),
        },
    )
    spec = UpdateSpec(
        {"w": (2, 3), "b": (2,), "n.running_mean": (1,), "n.running_var": (1,), "n.weight": (1,)},
        {"w"},
    )
    expected = (3 * 1.5**2 + 3 * 6.0**2 + 5.0 + 16.0, 9.0 + 4.0)
    for coded in (False, True):
        assert squares_at_most(encode(update, coded=coded), Expected(spec, 3)) == expected


def some_model():
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (4, 3, 2, 2), "b": (4,), "none": (0,), "hollow": (0, 5), "c": (2, 7), "d": ()}
    shapes |= {"b.running_mean": (4,), "b.running_var": (4,), "none.running_mean": (0,)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
def test_no_update_is_larger_than_its_bounds(bits):
    model = some_model()
    spec = spec_of_state(model)
    updates = [to_bits(model, bits)]
    updates.append(difference_of(model, bits, torch.Generator().manual_seed(2)))
    for update in updates:
        parameters, statistics = squares_at_most(encode(update), Expected(spec, bits))
        exact = {name: float(v.double().square().sum()) for name, v in update.dequantize().items()}
        of_statistics = sum(square for name, square in exact.items() if "running" in name)
        assert statistics == pytest.approx(of_statistics)
        rest = sum(exact.values()) - of_statistics
        assert parameters >= rest * (1 - 1e-6)
        if bits == 32:
            assert parameters == pytest.approx(rest)


def test_what_has_no_statistics_or_no_floats_has_a_bound():
    for shapes in ({"w": (2, 2)}, {"b": (3,)}, {"n.running_var": (3,)}):
        model = {name: torch.ones(shape) for name, shape in shapes.items()}
        spec, ones = spec_of_state(model), to_bits(model, 8)
        count = torch.Size(*shapes.values()).numel()
        expected = (0.0, count) if "n.running_var" in shapes else (count, 0.0)
        assert squares_at_most(encode(ones), Expected(spec, 8)) == pytest.approx(expected)


def test_a_payload_that_is_cut_short_has_no_bounds():
    spec = spec_of_state(some_model())
    payload = encode(to_bits(some_model(), 4))
    assert squares_at_most(payload[:100], Expected(spec, 4)) == (0.0, 0.0)
    assert squares_at_most(b"", Expected(spec, 4)) == (0.0, 0.0)
