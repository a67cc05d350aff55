"""Packing by torch, as on a GPU, against packing by NumPy: the same bytes."""

import numpy as np
import pytest
import torch
from specs import to_bits

from quant import encode_update, mse_scale, pack, pack_tensor
from quant.codec.device_packing import pack_on_device

WIDTHS = range(2, 17)
BLOCK = 524_288
COUNTS = [0, 1, 7, 8, 50, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 13]
AT_ONCE = 16 * BLOCK


def random_codes(bits, count):
    limit = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(count)
    dtype = torch.int8 if bits <= 8 else torch.int16
    return torch.randint(-limit, limit + 1, (count,), generator=generator, dtype=dtype)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_bytes_are_those_of_pack(bits):
    for count in COUNTS:
        codes = random_codes(bits, count)
        assert pack_on_device(codes, bits).numpy().tobytes() == pack(codes.numpy(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_extremes_of_every_signed_type_and_shape(bits):
    limit = 2 ** (bits - 1) - 1
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        most = min(limit, torch.iinfo(dtype).max)
        codes = torch.tensor([[-most, most, 0], [1, -1, 0]], dtype=dtype).T
        assert pack_on_device(codes, bits).numpy().tobytes() == pack(codes.numpy(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_codes_off_the_grid_are_refused(bits, beyond):
    codes = torch.tensor([0, beyond * 2 ** (bits - 1), 0])
    for refused in (pack_on_device, pack_tensor):
        with pytest.raises(ValueError, match=f"codes of width {bits} must lie in"):
            refused(codes, bits)


@pytest.mark.parametrize("bits", [3, 11])
def test_more_blocks_than_are_packed_at_once(bits):
    codes = random_codes(bits, AT_ONCE + BLOCK + 5)
    assert pack_on_device(codes, bits).numpy().tobytes() == pack(codes.numpy(), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_what_is_no_integer_is_refused(dtype):
    for refused in (pack_on_device, pack_tensor):
        with pytest.raises(ValueError, match="allowed are integers"):
            refused(torch.zeros(4, dtype=dtype), 4)


def test_codes_on_the_cpu_are_packed_there():
    codes = random_codes(5, 1000)
    assert pack_tensor(codes, 5) == pack(codes.numpy(), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_on_the_gpu_are_packed_to_the_same_bytes(bits):
    for count in COUNTS:
        codes = random_codes(bits, count)
        assert pack_tensor(codes.cuda(), bits) == pack(codes.numpy(), bits)


@pytest.mark.gpu
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8, 12, 32])
def test_an_update_on_the_gpu_is_the_same_payload(bits, coded):
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(40, 30, generator=generator),
        "b.weight": torch.randn(8, 3, 3, 3, generator=generator),
        "b.bias": torch.randn(8, generator=generator),
    }
    here = to_bits(state, bits)
    there = to_bits(
        {name: tensor.cuda() for name, tensor in state.items()},
        bits,
        {name: scale.cuda() for name, scale in here.scales.items()},
    )
    start = here if coded else None
    payload = encode_update(here, coded=coded, start=start)
    assert encode_update(there, coded=coded, start=start) == payload
    assert encode_update(here, coded=coded, start=there if coded else None) == payload


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_fitted_on_the_gpu_is_that_of_the_cpu(bits):
    weight = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0))
    here, there = mse_scale(weight, bits), mse_scale(weight.cuda(), bits)
    np.testing.assert_allclose(there.cpu().numpy(), here.numpy(), rtol=1e-3)
