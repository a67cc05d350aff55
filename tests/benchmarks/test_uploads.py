"""The measurement of uploads, on weights whose rounding is known by hand."""

import pytest
import torch

from benchmarks.uploads import UPLOADS, Figures, measure, split_error

# A start, what the client stores of it, and what it stores after training.
START = {"w": torch.tensor([[0.125, 0.375, -0.4375, 0.0]])}
HELD = {"w": START["w"].clone()}
END = {"w": HELD["w"] + torch.tensor([[0.0625, 0.0, 0.0, 0.25]])}


def figures_of(name):
    [upload] = [upload for upload in UPLOADS if upload.name == name]
    found = Figures()
    measure(upload, [(HELD, END)], START, found)
    return found


def test_fedavg_of_rounded_weights_is_pulled_by_the_levels():
    found = figures_of("rounded to nearest, FedAvg")
    # Sent: 0, 0.5, -0.5, 0 or 0.5 (a tie, to even: 0). Seen less moved, by hand:
    error = torch.tensor([-0.125 - 0.0625, 0.125, -0.0625, -0.25])
    toward = torch.tensor([-0.125, 0.125, -0.0625, 0.0])
    pull, left = split_error(error, toward)
    moved = 0.0625**2 + 0.25**2
    assert found.pull == pytest.approx([pull])
    assert found.bias == pytest.approx([(float(left @ left) / moved) ** 0.5])
    assert found.deviation == [0.0]


def test_the_start_takes_the_pull_away_and_not_the_bias():
    found = figures_of("rounded to nearest, from the start")
    # Nothing is seen of either movement.
    error, toward = torch.tensor([-0.0625, 0, 0, -0.25]), torch.tensor([-0.125, 0.125, -0.0625, 0])
    pull, left = split_error(error, toward)
    assert found.pull == pytest.approx([pull])
    assert found.bias == pytest.approx([(float(left @ left) / (0.0625**2 + 0.25**2)) ** 0.5])


def test_a_dither_has_no_bias_and_stored_weights_no_error():
    assert figures_of("stored, FedAvg") == Figures(pull=[0.0], bias=[0.0], deviation=[0.0])
    dithered = figures_of("dithered, from the start")
    assert dithered.bias[0] < 1.5 * dithered.deviation[0] / 8**0.5
    # The same dither on start and end: it moves by half a unit with a chance of twice its movement.
    chances = torch.tensor([2 * 0.0625, 2 * 0.25])
    variance = float((0.25 * chances * (1 - chances)).sum())
    assert dithered.deviation[0] == pytest.approx(
        (variance / (0.0625**2 + 0.25**2)) ** 0.5, rel=0.6
    )
