"""The measurement of secure aggregation, with a model of which all is counted by hand."""

import pytest
import torch

from benchmarks.secure import Fleet, Seconds, flowers_bytes, one_round, plain_bytes
from exchange.states import to_arrays

# A row of eight weights and one bias.
MODEL = {"0.weight": torch.arange(8.0).reshape(1, 8), "0.bias": torch.zeros(1)}


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("drops", [True, False])
def test_what_each_device_does_is_counted_apart(bits, secure, drops):
    fleet = Fleet(MODEL, bits, 6, drops)
    one_round(fleet, to_arrays(MODEL), True)
    done = one_round(fleet, to_arrays(MODEL), secure)
    assert done.devices.keys() == set(range(1, 7))
    assert min(done.server, *done.devices.values()) > 0


def test_the_round_is_over_when_its_slowest_part_is():
    seconds = Seconds(0.25, {1: 0.5, 2: 1.5})
    assert seconds.device == 1.0
    assert seconds.with_training(3.0) == 4.25


def test_bytes_in_the_clear_and_of_flower():
    # Eight codes of 4 bits are four bytes less than nine values of 32, but for a scale.
    assert plain_bytes(MODEL, 32) - plain_bytes(MODEL, 4) == 8 * 4 - 4 - 4
    # Flower sends masked values as int64, each array in NumPy's format, of 128 bytes and more.
    assert flowers_bytes(MODEL) == 9 * 8 + 2 * 128
