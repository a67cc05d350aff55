import numpy as np
import pytest
import torch
from grids import FITS, WIDTHS, weights

from quant import (
    absmax_scale,
    check_bits,
    dequantize,
    fake_quantize,
    largest_code,
    quantize_nearest,
    quantize_stochastic,
)


def bits_of(values):
    """The float32 bit patterns: unlike ==, they tell -0.0 from 0.0."""
    return values.view(torch.int32)


@pytest.mark.parametrize(("bits", "code"), [(2, 1), (3, 3), (4, 7), (8, 127), (16, 32767)])
def test_largest_code(bits, code):
    # 2**(k-1) - 1, worked out.
    assert largest_code(bits) == code


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32, 4.0, "4", None, True])
def test_widths_without_a_grid_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16"):
        check_bits(bits)


@pytest.mark.parametrize(("bits", "fit"), FITS)
def test_fake_quantize_is_dequantized_nearest_bit_for_bit(bits, fit):
    # torch's own fake-quantize kernel against this project's codes; outliers clip.
    weight = weights(bits, 7, 5, 3, 3)
    scale = fit(weight, bits)
    weight = torch.cat([weight, weight * 1.5])
    scale = torch.cat([scale, scale])
    expected = dequantize(quantize_nearest(weight, scale, bits), scale)
    assert torch.equal(bits_of(fake_quantize(weight, scale, bits)), bits_of(expected))


@pytest.mark.parametrize("bits", WIDTHS)
def test_fake_quantize_is_dequantized_nearest_on_ties_and_neighbours(bits):
    # Every half-integer multiple of an awkward scale, and the floats next to it.
    limit = largest_code(bits)
    half_steps = torch.arange(-2 * min(limit, 2000) - 3, 2 * min(limit, 2000) + 4) / 2
    scale = torch.tensor([0.1, 1 / 3, 7e-6])
    weight = scale[:, None] * half_steps
    up = torch.nextafter(weight, torch.tensor(torch.inf))
    weight = torch.cat([weight, up, -up], 1)
    expected = dequantize(quantize_nearest(weight, scale, bits), scale)
    assert torch.equal(bits_of(fake_quantize(weight, scale, bits)), bits_of(expected))


@pytest.mark.parametrize("bits", WIDTHS)
def test_nearest_equals_numpy_round_and_clip(bits):
    # Scales are powers of two: the quotient is exact, so that np.rint (ties to even) is the truth.
    scale = torch.tensor([0.25, 2.0, 2.0**-7])
    span = largest_code(bits) * 1.3 + 2
    rng = np.random.default_rng(bits)
    quotient = np.concatenate(
        [rng.uniform(-span, span, (3, 500)), np.tile(np.arange(-40, 41) / 2, (3, 1))], 1
    ).astype(np.float32)
    limit = 2 ** (bits - 1) - 1
    expected = np.clip(np.rint(quotient), -limit, limit)
    codes = quantize_nearest(torch.from_numpy(quotient) * scale[:, None], scale, bits)
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert np.array_equal(codes.numpy(), expected)


def test_nearest_by_hand():
    # 2-bit codes -1, 0, 1, scale 0.5: quotients 0.4, 0.5 (tie to even: 0), 0.6, 1.5, -9.
    weight = torch.tensor([[0.2, 0.25, 0.3, 0.75, -4.5]])
    codes = quantize_nearest(weight, torch.tensor([0.5]), 2)
    assert codes.tolist() == [[0, 0, 1, 1, -1]]
    assert dequantize(codes, torch.tensor([0.5])).tolist() == [[0, 0, 0.5, 0.5, -0.5]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_stochastic_rounding_is_unbiased(bits):
    # The code is floor(x) + Bernoulli(frac): its mean over n draws has the known deviation
    # sqrt(f (1 - f) / n). Power-of-two scales make the quotients exact.
    draws = 40_000
    quotient = torch.tensor([0.1, -0.3, 0.5, -0.97, 0.85]) + 0.0
    if bits > 2:
        quotient = torch.cat([quotient, torch.tensor([1.25, -2.0625]) * (largest_code(bits) // 3)])
    scale = torch.full((quotient.numel(),), 2.0**-5)
    weight = (quotient * 2.0**-5)[:, None].expand(-1, draws)
    codes = quantize_stochastic(weight, scale, bits, torch.Generator().manual_seed(bits))
    exact = quotient.double()
    share = exact - exact.floor()
    deviation = (share * (1 - share) / draws).sqrt()
    assert ((codes.double().mean(1) - exact).abs() <= 5 * deviation + 1e-12).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_stochastic_rounding_stays_within_one_code_and_on_the_grid(bits):
    weight = weights(6, 5, 2000)
    scale = absmax_scale(weight, bits) * 0.8
    codes = quantize_stochastic(weight, scale, bits, torch.Generator().manual_seed(1))
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert codes.abs().max() == limit
    clipped = (weight.double() / scale.double()[:, None]).clamp(-limit, limit)
    assert ((codes.double() - clipped).abs() < 1 + 1e-3).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_stochastic_rounding_leaves_weights_on_the_grid_alone(bits):
    # The expected code of a weight on level c is c, and rounding to c + 1 would bias it.
    limit = largest_code(bits)
    codes = torch.linspace(-limit, limit, 2 * limit + 1).round().repeat(400_000 // limit)[None]
    scale = torch.tensor([2.0**-6])
    drawn = quantize_stochastic(codes * scale, scale, bits, torch.Generator().manual_seed(2))
    assert int((drawn != codes).sum()) == 0


def test_stochastic_rounding_is_reproducible_by_seed():
    weight = weights(7, 4, 500)
    scale = absmax_scale(weight, 4)

    def draw(seed):
        return quantize_stochastic(weight, scale, 4, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("bits", WIDTHS)
def test_straight_through_gradient(bits):
    # In levels of the grid: inside, on the last level, rounding onto it, and beyond it (clipped).
    limit = 2.0 ** (bits - 1) - 1
    ends = [limit, limit + 0.375, limit + 0.625, limit + 9]
    quotient = torch.tensor([[0.0, 0.25, -0.75, *ends, *[-e for e in ends]]])
    weight = (quotient * 0.5).requires_grad_()
    upstream = torch.arange(1.0, quotient.numel() + 1)[None]
    fake_quantize(weight, torch.tensor([0.5]), bits).backward(upstream)
    passes = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]])
    assert torch.equal(weight.grad, upstream * passes)


@pytest.mark.parametrize(
    "shape", [(3, 70_000), (200, 1000), (1, 200_001), (70_000, 1), (5, 3, 80, 80)]
)
@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16])
def test_large_tensors_give_the_codes_and_values_of_their_channels(bits, shape):
    weight = weights(6, *shape)
    scale = absmax_scale(weight, bits) * 0.8  # some are clipped
    codes = quantize_nearest(weight, scale, bits)
    limit = largest_code(bits)
    steps = scale.reshape(-1, *[1] * (weight.ndim - 1))
    expected = (weight * (1 / steps)).round().clamp(-limit, limit)
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(codes.float(), expected)
    assert torch.equal(bits_of(dequantize(codes, scale)), bits_of(codes.float() * steps))
    assert torch.equal(
        quantize_nearest(weight.transpose(0, -1).contiguous().transpose(0, -1), scale, bits), codes
    )
