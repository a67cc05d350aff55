"""GroupedAvg-Asymmetric: the mean of the widest for them, the mean of all for the others."""

import torch
from federation import ScriptedClient, federation, run_round, with_w

from strategies import GroupedAvgAsymmetric

STATE = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}


def add(value):
    return lambda state: {name: t + value for name, t in state.items()}


def made(*clients):
    strategy = GroupedAvgAsymmetric(context=with_w(norm_bound=0))
    return strategy, federation(list(clients), STATE)


def test_low_bit_clients_get_the_mean_of_all_and_the_widest_their_own():
    strategy, grid = made(
        ScriptedClient(0, 4, 4, add(1.0), examples=10),
        ScriptedClient(1, 4, 8, add(4.0), examples=20),
        ScriptedClient(2, 4, 32, add(10.0)),
        ScriptedClient(3, 4, 32, add(20.0)),
    )
    state = run_round(strategy, grid, STATE, 1)
    # (10 * 1 + 20 * 4 + 10 * 10 + 10 * 20) / 50 = 7.8; of the widest (10 + 20) / 2 = 15.
    for bits in (4, 8):
        torch.testing.assert_close(strategy.state_for(bits, state)["b"], torch.full((2,), 7.8))
    assert state["b"].tolist() == strategy.state_for(32, state)["b"].tolist() == [15.0, 15.0]
    state = run_round(strategy, grid, state, 2)
    # Each went on from what it got: (10 * 8.8 + 20 * 11.8 + 10 * 25 + 10 * 35) / 50 = 18.48.
    torch.testing.assert_close(strategy.state_for(4, state)["b"], torch.full((2,), 18.48))
    assert state["b"].tolist() == [30.0, 30.0]


def test_a_width_that_has_not_reported_gets_the_mean_of_all():
    strategy, grid = made(ScriptedClient(0, 2, 8, add(2.0)), ScriptedClient(1, 2, 32, add(4.0)))
    assert strategy.state_for(4, STATE) is STATE
    state = run_round(strategy, grid, STATE, 1)
    assert strategy.state_for(4, state)["b"].tolist() == [3.0, 3.0]


def test_what_it_keeps_is_taken_back():
    strategy, grid = made(ScriptedClient(0, 2, 8, add(2.0)), ScriptedClient(1, 2, 32, add(4.0)))
    state = run_round(strategy, grid, STATE, 1)
    again = GroupedAvgAsymmetric(context=with_w())
    again.restore(*strategy.checkpoint())
    for bits in (4, 8, 32):
        assert torch.equal(again.state_for(bits, state)["w"], strategy.state_for(bits, state)["w"])
