"""How large a payload's tensors can be, without a look at its codes."""

import pytest
import torch

from quant import (
    QuantizedTensor,
    Update,
    UpdateSpec,
    encode_update,
    quantize_difference,
    quantize_state,
    squares_at_most,
)


def test_the_bound_by_hand():
    """Three bits: codes up to 3, so three codes of step 0.5 are 1.5 at most."""
    codes = torch.tensor([[3, -3, 3], [0, 1, -1]], dtype=torch.int8)
    update = Update(
        3,
        "weights",
        {"w": QuantizedTensor(codes, torch.tensor([0.5, 2.0]))},
        {"b": torch.tensor([2.0, -1.0])},
    )
    spec = UpdateSpec({"w": (2, 3), "b": (2,)})
    expected = {"w": 3 * 1.5**2 + 3 * 6.0**2, "b": 5.0}
    for coded in (False, True):
        assert squares_at_most(encode_update(update, coded=coded), spec, 3) == expected


def some_model():
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (4, 3, 2, 2), "b": (4,), "none": (0,), "hollow": (0, 5), "c": (2, 7), "d": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
def test_no_tensor_is_larger_than_its_bound(bits):
    model = some_model()
    spec = UpdateSpec.of(model)
    updates = [quantize_state(model, bits)]
    updates.append(quantize_difference(model, bits, torch.Generator().manual_seed(2)))
    for update in updates:
        bounds = squares_at_most(encode_update(update), spec, bits)
        assert list(bounds) == list(spec.shapes)
        for name, values in update.dequantize().items():
            exact = float(values.double().square().sum())
            assert bounds[name] >= exact * (1 - 1e-6), name
            if name not in update.quantized:
                assert bounds[name] == pytest.approx(exact), name


def test_a_payload_that_is_cut_short_has_no_bounds():
    spec = UpdateSpec.of(some_model())
    payload = encode_update(quantize_state(some_model(), 4))
    assert squares_at_most(payload[:100], spec, 4) == {}
    assert squares_at_most(b"", spec, 4) == {}
