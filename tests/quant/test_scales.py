import numpy as np
import pytest
import torch
from grids import CLIPPED, FITS, WIDTHS, weights

from quant import (
    absmax_scale,
    dequantize,
    fake_quantize,
    fit_scale,
    mse_scale,
    quantize_nearest,
)


def mse(row, scale, bits):
    """Mean squared error of one channel's grid, in float64 numpy."""
    limit = 2 ** (bits - 1) - 1
    return ((row - np.clip(np.rint(row / scale), -limit, limit) * scale) ** 2).mean()


@pytest.mark.parametrize("bits", WIDTHS)
def test_absmax_puts_the_largest_magnitude_on_the_largest_code(bits):
    weight = weights(1, 20, 3, 5)
    scale = absmax_scale(weight, bits)
    codes = quantize_nearest(weight, scale, bits).flatten(1).int()
    place = weight.flatten(1).abs().argmax(1, keepdim=True)
    sign = weight.flatten(1).gather(1, place).sign().int()
    limit = 2 ** (bits - 1) - 1
    assert torch.equal(codes.gather(1, place), sign * limit)
    # The scale by hand: the channel's absolute maximum over the largest code.
    by_hand = np.abs(weight.numpy().reshape(20, -1)).max(1) / limit
    np.testing.assert_allclose(scale.numpy(), by_hand, rtol=1e-6)


@pytest.mark.parametrize("bits", CLIPPED)
def test_mse_scale_is_never_worse_than_absmax(bits):
    # Short channels, where chance decides what is best, and long ones, some with an outlier.
    for channels, length in [(4000, 1), (4000, 9), (4000, 27), (400, 144), (40, 3000)]:
        weight = weights(length, channels, length)
        weight[:3, 0] = 8.0
        fitted, absmax = (
            ((dequantize(quantize_nearest(weight, s, bits), s) - weight).double() ** 2).sum(1)
            for s in (mse_scale(weight, bits), absmax_scale(weight, bits))
        )
        # Nothing but float32's rounding, of errors that are zero to begin with.
        assert (fitted <= absmax * (1 + 1e-5) + 1e-10).all()


@pytest.mark.parametrize("bits", CLIPPED)
def test_mse_scale_of_a_diverged_channel_is_not_finite_and_disturbs_no_other(bits):
    weight = weights(3, 4, 50)
    weight[1, 7], weight[2, 7] = torch.nan, torch.inf
    scale = mse_scale(weight, bits)
    assert scale.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(scale[[0, 3]], mse_scale(weight[[0, 3]], bits))


@pytest.mark.parametrize("bits", [k for k in WIDTHS if k not in CLIPPED])
def test_mse_scale_is_for_the_widths_that_clip(bits):
    with pytest.raises(ValueError, match="2 to 4"):
        mse_scale(weights(0, 3, 10), bits)


@pytest.mark.parametrize("fit", [absmax_scale, mse_scale])
def test_scales_of_weights_without_memory_have_their_shape(fit):
    scale = fit(torch.empty(3, 4, device="meta"), 4)
    assert scale.shape == (3,)
    assert scale.device.type == "meta"


@pytest.mark.parametrize("bits", CLIPPED)
@pytest.mark.parametrize("family", ["normal", "laplace", "uniform", "student", "sparse", "outlier"])
def test_mse_scale_is_within_a_percent_of_a_sweep_over_clips(bits, family):
    # Brute force: 500 clipping points from 1 % to 120 % of the channel's maximum.
    rng = np.random.default_rng(5)
    rows = {
        "normal": lambda: rng.normal(size=(3, 400)),
        "laplace": lambda: rng.laplace(size=(3, 400)),
        "uniform": lambda: rng.uniform(-1, 1, (3, 400)),
        "student": lambda: rng.standard_t(3, (3, 400)),
        "sparse": lambda: rng.normal(size=(3, 400)) * (rng.random((3, 400)) < 0.3),
        "outlier": lambda: np.where(np.arange(2000) == 7, 30, rng.normal(size=(3, 2000))),
    }[family]()
    rows = rows.astype(np.float32)
    fitted = mse_scale(torch.from_numpy(rows), bits).numpy()
    rows = rows.astype(np.float64)
    for row, scale in zip(rows, fitted, strict=True):
        clips = np.abs(row).max() * np.linspace(0.01, 1.2, 500) / (2 ** (bits - 1) - 1)
        assert mse(row, scale, bits) <= 1.01 * min(mse(row, s, bits) for s in clips)


@pytest.mark.parametrize("bits", WIDTHS)
def test_fit_scale_clips_up_to_four_bits(bits):
    weight = weights(3, 4, 300)
    if bits in CLIPPED:
        assert torch.equal(fit_scale(weight, bits), mse_scale(weight, bits))
        assert (fit_scale(weight, bits) < absmax_scale(weight, bits)).all()
    else:
        assert torch.equal(fit_scale(weight, bits), absmax_scale(weight, bits))


@pytest.mark.parametrize(("bits", "fit"), FITS)
def test_all_zero_channels_stay_zero_and_disturb_no_other(bits, fit):
    weight = weights(4, 3, 4, 2)
    weight[1] = 0
    scale = fit(weight, bits)
    assert scale.dtype == torch.float32
    assert scale.shape == (3,)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert scale.reciprocal().isfinite().all()
    on_grid = fake_quantize(weight, scale, bits)
    assert not on_grid[1].any()
    assert on_grid.isfinite().all()
    assert torch.equal(scale[[0, 2]], fit(weight[[0, 2]], bits))


@pytest.mark.parametrize("fit", [absmax_scale, mse_scale])
def test_one_channel_with_one_weight_is_exact(fit):
    # A single weight w lies on the largest code when the scale is |w| / limit: no error at all.
    weight = torch.tensor([[-0.75]])
    scale = fit(weight, 4)
    assert quantize_nearest(weight, scale, 4).tolist() == [[-7]]
    np.testing.assert_allclose(scale.numpy(), [0.75 / 7], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_half_precision_weights_are_float32(dtype):
    """Else their inverse would be off by steps at the wider widths."""
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for bits in (3, 12, 16):
        scale = fit_scale(weight, bits)
        assert scale.dtype == torch.float32
        error = quantize_nearest(weight, scale, bits) * scale[:, None] - weight.float()
        if bits > 4:
            assert error.abs().max() <= 0.51 * scale.max()
