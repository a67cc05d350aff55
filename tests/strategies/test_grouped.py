"""GroupedAvg: one model a width, averaged by hand."""

import torch
from federation import ScriptedClient, federation, run_round, with_w

from strategies import GroupedAvg

STATE = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}


def add(value):
    return lambda state: {name: t + value for name, t in state.items()}


def test_each_width_has_a_model_of_its_own():
    clients = [
        ScriptedClient(0, 4, 8, add(1.0), examples=10),
        ScriptedClient(1, 4, 8, add(4.0), examples=20),
        ScriptedClient(2, 4, 32, add(10.0)),
        ScriptedClient(3, 4, 32, add(20.0)),
    ]
    strategy = GroupedAvg(context=with_w())
    grid = federation(clients, STATE)
    state = run_round(strategy, grid, STATE, 1)
    # 8 bits: (10 * 1 + 20 * 4) / 30 = 3; 32 bits: (10 + 20) / 2 = 15. Constants are on the grid.
    torch.testing.assert_close(strategy.state_for(8, state)["w"], torch.full((2, 2), 3.0))
    assert strategy.state_for(32, state)["w"].tolist() == [[15.0, 15.0]] * 2
    assert state["w"].tolist() == [[15.0, 15.0]] * 2
    state = run_round(strategy, grid, state, 2)
    # Each width continued from its own model: 3 + 3 and 15 + 15.
    torch.testing.assert_close(strategy.state_for(8, state)["w"], torch.full((2, 2), 6.0))
    assert strategy.state_for(32, state)["b"].tolist() == [30.0, 30.0]


def test_a_width_that_has_not_reported_begins_at_the_common_start():
    clients = [ScriptedClient(0, 1, 32, add(5.0))]
    strategy = GroupedAvg(context=with_w())
    state = run_round(strategy, federation(clients, STATE), STATE, 1)
    assert strategy.state_for(4, state)["w"].tolist() == [[0.0, 0.0]] * 2


def test_a_width_that_is_absent_for_a_round_keeps_its_model():
    clients = [ScriptedClient(0, 2, 8, add(1.0)), ScriptedClient(1, 2, 32, add(10.0))]
    strategy = GroupedAvg(context=with_w(norm_bound=0))  # one moves ten times as far
    grid = federation(clients, STATE)
    state = run_round(strategy, grid, STATE, 1)
    answering = grid.nodes[100]
    grid.nodes[100] = lambda message: None
    state = run_round(strategy, grid, state, 2)
    torch.testing.assert_close(strategy.state_for(8, state)["w"], torch.full((2, 2), 1.0))
    assert strategy.state_for(32, state)["w"].tolist() == [[20.0, 20.0]] * 2
    grid.nodes[100] = answering
    run_round(strategy, grid, state, 3)
    torch.testing.assert_close(strategy.state_for(8, state)["w"], torch.full((2, 2), 2.0))
