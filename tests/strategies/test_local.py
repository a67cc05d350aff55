"""Local training: no update travels, the model travels once."""

import torch
from federation import ScriptedClient, federation, run_round, with_w

from strategies import Local

STATE = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}


def never(_):
    raise AssertionError("a local client is never asked for its weights")


def test_only_the_first_round_sends_a_model_and_nothing_comes_back():
    clients = [ScriptedClient(i, 2, bits, never) for i, bits in enumerate((8, 32))]
    strategy = Local(context=with_w())
    grid = federation(clients, STATE)
    assert run_round(strategy, grid, STATE, 1) is None
    assert strategy.round_log.downlink_bytes[32] > 0
    assert sum(strategy.round_log.uplink_bytes.values()) == 0
    assert run_round(strategy, grid, STATE, 2) is None
    assert strategy.round_log.downlink_bytes == {}
    assert [i.downlink_bits for i in clients[0].instructions] == [32, 0]
    assert strategy.round_log.aggregated == [0, 1]
