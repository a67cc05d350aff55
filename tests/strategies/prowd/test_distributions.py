"""Histograms of weights, worked by hand; taking them changes nothing."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, federation, with_w
from specs import to_bits

from exchange.states import to_arrays, to_state
from strategies import ProWD
from strategies.prowd.distributions import BINS, REACH, WeightDistributions


def test_bins_are_in_units_of_the_layers_deviation_in_the_high_bit_group():
    # Standard deviation of 2, so that a bin is 2 * 4 / 64 * 2 = 0.25 wide and bin 32 begins at 0.
    high = {"w": torch.tensor([[2.0, -2.0, 2.0, -2.0]])}
    low = {"w": torch.tensor([[0.1, 0.3, -0.1, 99.0]])}
    dequantized = {"w": torch.tensor([[0.1, 0.1, -8.0, 8.0]])}
    record = WeightDistributions({3: low, 32: high}, ["w"]).to_record({3: dequantized, 32: high})
    assert (record["reach"], record["unit"], record["high"]) == (4.0, {"w": 2.0}, 32)

    def filled(counts):
        assert len(counts["w"]) == BINS
        return {i: n for i, n in enumerate(counts["w"]) if n}

    counts = record["counts"]
    assert filled(counts["high"]) == {24: 2, 40: 2}
    assert filled(counts["before"]["3"]) == {31: 1, 32: 1, 33: 1, 63: 1}
    assert filled(counts["after"]["3"]) == {0: 1, 32: 2, 63: 1}


def test_bins_are_numpys():
    generator = torch.Generator().manual_seed(0)
    groups = {b: {"w": 0.3 * torch.randn(40, 50, generator=generator)} for b in (2, 32)}
    counts = WeightDistributions(groups, ["w"]).to_record(groups)["counts"]
    unit = groups[32]["w"].numpy().astype(np.float64).std()
    values = (groups[2]["w"].numpy().astype(np.float64) / unit).clip(-REACH, REACH)
    expected, _ = np.histogram(values, BINS, (-REACH, REACH))
    # A value on a border may fall to either side of it.
    assert np.abs(expected - counts["before"]["2"]["w"]).sum() <= 2


def test_a_layer_without_a_deviation_is_left_out():
    groups = {b: {"w": torch.ones(2, 2), "v": torch.eye(2)} for b in (4, 32)}
    record = WeightDistributions(groups, ["w", "v"]).to_record(groups)
    assert list(record["unit"]) == list(record["counts"]["high"]) == ["v"]


@pytest.mark.parametrize("detailed", [True, False])
def test_prowd_notes_the_weights_of_a_detailed_round(detailed):
    strategy, _ = a_round(detailed)
    assert bool(strategy.round_log.weights) == detailed
    if detailed:
        counts = strategy.round_log.weights["counts"]
        assert sum(counts["high"]["w"]) == 16 * 24
        # Int2 weights stand on three levels a channel; dequantized they do not.
        filled = {when: np.count_nonzero(counts[when]["2"]["w"]) for when in ("before", "after")}
        assert filled["before"] < filled["after"]


def test_noting_the_weights_changes_no_bit_of_the_model():
    (_, plain), (_, noted) = a_round(False), a_round(True)
    assert all(torch.equal(plain[name], noted[name]) for name in plain)


def a_round(detailed):
    """One round of ProWD with an Int2 and a Float32 client that move at random."""
    generator = torch.Generator().manual_seed(5)
    start = {"w": torch.randn(16, 24, generator=generator), "b": torch.zeros(16)}
    move = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in start.items()}
    moved = {name: tensor + move[name] for name, tensor in start.items()}
    clients = [
        ScriptedClient(0, 2, 2, lambda _: to_bits(moved, 2)),
        ScriptedClient(1, 2, 32, lambda _: moved),
    ]
    grid = federation(clients, start)
    strategy = ProWD(context=with_w(detailed=lambda server_round: detailed))
    messages = strategy.configure_train(1, to_arrays(start), None, grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    return strategy, to_state(arrays)
