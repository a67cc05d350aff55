"""The mean of updates, summed without their float32 values ever being in memory."""

import pytest
import torch
from specs import to_bits

from exchange.protocol import Declaration, Report
from exchange.replies import ClientUpdate
from quant import Update, WeightedMean
from strategies.fedavg import mean_of


def updates(bits):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"small": (3, 4), "large": (40, 50, 3, 3), "b": (3,)}
        model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        yield to_bits(model, bits)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_updates_and_their_float32_values_have_the_same_mean(bits):
    packed, dequantized = WeightedMean(), WeightedMean()
    for weight, update in enumerate(updates(bits), start=1):
        packed.add_update(update, 0.1 * weight)
        dequantized.add(update.dequantize(), 0.1 * weight)
    assert (packed.count, packed.weight) == (dequantized.count, dequantized.weight)
    assert packed.mean().keys() == dequantized.mean().keys()
    for name, mean in packed.mean().items():
        torch.testing.assert_close(mean, dequantized.mean()[name], rtol=1e-5, atol=1e-6)


def test_the_mean_by_hand():
    mean = WeightedMean()
    mean.add({"a": torch.tensor([1.0, 2.0])}, 1.0)
    mean.add({"a": torch.tensor([5.0, 6.0])}, 3.0)
    assert mean.mean()["a"].tolist() == [4.0, 5.0]
    assert WeightedMean().mean() == {}


def test_updates_of_all_widths_have_one_mean():
    """Whichever comes first: a tensor that is codes in one update and float32 in another."""
    for order in ([4, 8, 32], [32, 8, 4]):
        together, expected = WeightedMean(), WeightedMean()
        for weight, bits in enumerate(order, start=1):
            update = next(updates(bits))
            together.add_update(update, weight)
            expected.add(update.dequantize(), weight)
        assert together.mean().keys() == expected.mean().keys()
        for name, mean in together.mean().items():
            torch.testing.assert_close(mean, expected.mean()[name], rtol=1e-5, atol=1e-6)


def test_a_client_that_sent_nothing_is_not_in_the_mean():
    """It was asked for nothing, as one that trains for itself alone may be."""
    client, report = Declaration(0, 3, 4, 10, ""), Report(1, 10, 1.0, 0.5, 1.0)
    sent = [Update(32, "weights", {}, {}), next(updates(4)), Update(32, "weights", {}, {})]
    mean = mean_of(ClientUpdate(client, update, report) for update in sent)
    for name, value in next(updates(4)).dequantize().items():
        torch.testing.assert_close(mean[name], value)
