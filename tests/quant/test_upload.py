"""What a low-bit client sends of its weights: widths, forms, and the same rounding of its start."""

import numpy as np
import pytest
import torch

from quant import quantize_state, start_of, ternary_scales, upload_bits

FORMS = ("forward", "dithered", "stored")
DRAWS = 4000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", ["qat", "strict", "integer"])
def test_a_float32_client_sends_float32(training, form):
    assert upload_bits(32, training, form) == 32


@pytest.mark.parametrize(
    ("training", "form", "expected"),
    [
        ("qat", "forward", 3),
        ("qat", "dithered", 3),
        ("qat", "stored", 32),  # Its latent weights.
        ("integer", "forward", 2),  # Ternary ones.
        ("integer", "dithered", 2),
        ("integer", "stored", 3),
        ("strict", "forward", 3),
        ("strict", "dithered", 3),
        ("strict", "stored", 3),
    ],
)
def test_widths(training, form, expected):
    assert upload_bits(3, training, form) == expected


def test_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match="bits: 33 is not allowed"):
        upload_bits(33, "qat", "forward")


def dithered(weights, scale, dither, bits=4):
    update = quantize_state({"w": weights}, bits, {"w": scale}, dither=dither)
    return update.quantized["w"]


def test_a_dither_is_noise_that_both_sides_can_draw():
    """floor(w / s) and one more where the noise is below what is left, the noise from the seed."""
    weights, scale = torch.randn(3, 5), torch.tensor([0.3, 0.5, 0.7])
    got = dithered(weights, scale, dither=9).codes.numpy()
    noise = torch.rand(3, 5, generator=torch.Generator().manual_seed(9)).numpy()
    steps = weights.numpy() / scale.numpy()[:, None]
    assert np.array_equal(got, np.clip(np.floor(steps) + (noise < steps - np.floor(steps)), -7, 7))


def test_a_dithered_weight_is_right_on_average_and_one_to_nearest_is_not():
    weights, scale = torch.tensor([[0.1, -0.31, 0.74, 1.0]]), torch.tensor([0.5])
    mean = sum(dithered(weights, scale, seed).dequantize() for seed in range(1, DRAWS)) / DRAWS
    # A deviation of half a step at most, over so many draws.
    assert (mean - weights).abs().max() < 5 * 0.25 / DRAWS**0.5
    nearest = quantize_state({"w": weights}, 4, {"w": scale}).quantized["w"].dequantize()
    assert (nearest - weights).abs().max() > 0.2


def test_a_weight_that_did_not_move_shows_no_movement_under_its_dither():
    start = {"w": torch.randn(4, 6)}
    moved = start["w"].clone()
    moved[0, 0] += 1.0
    scale = torch.full((4,), 0.4)
    update = quantize_state({"w": moved}, 4, {"w": scale}, dither=7)
    began = start_of(update, start, dither=7)
    seen = update.dequantize()["w"] - began.dequantize()["w"]
    assert (seen != 0).nonzero().tolist() == [[0, 0]]
    other = start_of(update, start, dither=8).dequantize()["w"]
    assert (update.dequantize()["w"] != other).sum() > 3


def test_ternary_weights_are_codes_of_two_bits():
    stored = {"w": torch.tensor([[0.5, -0.26, 0.25, 0.0]])}
    update = quantize_state(stored, 2, ternary_scales(stored, ["w"]))
    # Half of a half is a tie, which goes to the even code.
    assert update.quantized["w"].codes.tolist() == [[1, -1, 0, 0]]
    assert update.dequantize()["w"].tolist() == [[0.5, -0.5, 0.0, 0.0]]


def test_an_integer_client_first_brings_its_start_to_what_it_stores():
    """0.2505 is 32 of 128ths, whose ternary weight is 0; by itself it would be 0.5."""
    start = {"w": torch.tensor([[0.2505]])}
    update = quantize_state({"w": torch.tensor([[0.5]])}, 2, ternary_scales(start, ["w"]))
    assert start_of(update, start, stored_bits=8).quantized["w"].codes.tolist() == [[0]]
    assert start_of(update, start).quantized["w"].codes.tolist() == [[1]]
