"""Codes in one run: the same tensors, and the same sums, as one by one."""

import numpy as np
import pytest
import torch
from specs import spec_of_state, to_bits

from quant import (
    FlatUpdate,
    UpdateSpec,
    WeightedMean,
    decode,
    encode,
)
from quant.codec.layout import FlatCodes, FlatFloats, layout_of

SHAPES = {
    "conv": (8, 3, 3, 3),
    "same length": (5, 27),
    "longer than a block": (2, 70_001),
    "many blocks": (70, 2_000),
    "one value a channel": (6, 1),
    "no channel": (0, 27),
    "empty channels": (4, 0),
    "bias": (8,),
}


def model(seed=0, shapes=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def filled(shapes):
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16])
def test_a_decoded_update_holds_the_tensors_that_were_sent(bits):
    state = model(shapes=filled(SHAPES))
    sent = to_bits(state, bits)
    got = decode(encode(sent), spec_of_state(state), bits)
    assert isinstance(got, FlatUpdate)
    assert set(got.quantized) == set(sent.quantized)
    assert len(got.quantized) == len(sent.quantized)
    for name, tensor in sent.quantized.items():
        assert torch.equal(got.quantized[name].codes, tensor.codes)
        assert torch.equal(got.quantized[name].scale, tensor.scale)
    with pytest.raises(KeyError):
        got.quantized["bias"]


def test_the_form_is_taken_as_it_is_and_made_where_it_is_not_there():
    sent = to_bits(model(shapes=filled(SHAPES)), 4)
    made = FlatUpdate.of(sent)
    assert made.quantized.codes.numel() == sum(t.codes.numel() for t in sent.quantized.values())
    for name, tensor in sent.quantized.items():
        assert torch.equal(made.quantized[name].codes, tensor.codes)
    assert torch.equal(made.floats["bias"], sent.floats["bias"])
    assert FlatUpdate.of(made) is made
    wide = FlatUpdate.of(to_bits(model(), 32))
    assert len(wide.quantized) == 0
    assert list(wide.floats) == list(UpdateSpec(SHAPES).shapes)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_mean_of_updates_is_that_of_their_values(bits, monkeypatch):
    """Against float64, tensor by tensor, with shapes that no block fits and some without values."""
    monkeypatch.setattr("quant.codec.layout._BLOCK", 1 << 16)
    rng = np.random.default_rng(0)
    spec = UpdateSpec(SHAPES)
    limit = 2 ** (bits - 1) - 1
    mean, expected = WeightedMean(), dict.fromkeys(SHAPES, 0.0)
    for weight, width in ((1.0, bits), (600.0, bits), (0.3, 32), (0.7, bits)):
        layout = layout_of(spec, width)
        codes = rng.integers(-limit, limit + 1, layout.num_codes).astype(np.int16)
        scales = rng.uniform(0.01, 1, layout.num_scales).astype(np.float32)
        floats = rng.normal(size=layout.num_floats).astype(np.float32)
        quantized = FlatCodes(layout, torch.from_numpy(codes), torch.from_numpy(scales))
        values = FlatFloats(layout, torch.from_numpy(floats))
        mean.add_update(FlatUpdate(width, "weights", quantized, values), weight)
        for name, tensor in quantized.items():
            steps = tensor.scale.double().reshape(-1, *[1] * (tensor.codes.ndim - 1))
            expected[name] = expected[name] + weight * tensor.codes.double() * steps
        for name, value in values.items():
            expected[name] = expected[name] + weight * value.double()
    got = mean.mean()
    assert got.keys() == SHAPES.keys()
    for name, tensor in got.items():
        assert tensor.shape == SHAPES[name]
        largest = float(expected[name].abs().max()) if tensor.numel() else 0.0
        total = tensor.double() * 602.0
        torch.testing.assert_close(total, expected[name], rtol=0, atol=1e-6 * largest)
