"""Which nodes are asked anew, and how long answers are waited for, through `Nodes.gather`."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from federation import (
    InProcessGrid,
    LateGrid,
    ScriptedClient,
    SimulatedGrid,
    federation,
    run_round,
    with_w,
)
from flwr.app import Error, Message
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from exchange.nodes import Nodes
from exchange.undocumented import is_simulated
from strategies import FedAvg

STATE = {"w": torch.linspace(-1, 1, 6).reshape(2, 3)}


class Clock:
    """Time passes only in `sleep`."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    for module in ("nodes", "queries"):
        monkeypatch.setattr(f"exchange.{module}.time", clock)
    return clock


def client(partition, of, bits=8):
    return ScriptedClient(partition, of, bits, lambda state: state)


def gathered(nodes, grid):
    return {n: d.partition_id for n, d in nodes.gather(grid).items()}


def silent(message):
    return None


def two_nodes():
    return federation([client(0, 2), client(1, 2)], STATE)


def come_again(grid, node_id):
    """As after an unnoticed restart: the same ID, another activation."""
    grid.activated[node_id] = str(int(grid.activated.get(node_id, "0")) + 1)


def go_and_return(nodes, grid, node_id):
    """As after a restart that was seen."""
    node = grid.nodes.pop(node_id)
    nodes.gather(grid)
    grid.nodes[node_id] = node


class SlowToAnswer(LateGrid):
    """Node 101 answers at the third look, as a device whose program has to start first."""

    answers_at = 3

    def has_answered(self, node_id):
        return node_id != 101 or self.looks >= self.answers_at


# --- who is asked anew -------------------------------------------------------------------------


@pytest.mark.parametrize("database", [FLWR_IN_MEMORY_DB_NAME, ":memory:"])
def test_flowers_grids_tell_when_a_node_was_activated(database):
    """In simulation and in deployment; a heartbeat changes nothing, another start does."""
    factory = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database))
    state = factory.state()
    run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, "serverapp")
    run = SimpleNamespace(run_id=run_id)
    node_id = state.create_node("", "", b"key", 30.0)
    simulated, networked = InMemoryGrid(factory), HttpGrid(token="any")
    simulated._run = run
    networked._client = SimpleNamespace(
        GetNodes=lambda request: runtime_handlers.get_nodes(request, state, run)
    )
    for grid in (simulated, networked):
        state.activate_node(node_id, 30.0)
        [first] = grid.get_nodes()
        state.acknowledge_node_heartbeat(node_id, 30.0)
        [same] = grid.get_nodes()
        state.deactivate_node(node_id)
        state.activate_node(node_id, 30.0)
        [again] = grid.get_nodes()
        assert first.node_id == again.node_id == node_id
        assert "" != first.last_activated_at == same.last_activated_at
        assert first.last_activated_at < again.last_activated_at


@pytest.mark.parametrize("seen", [True, False])
def test_a_refused_node_that_was_repaired_takes_part_under_the_same_id(seen):
    broken = client(1, 2)
    good = broken.declaration
    broken.declaration = replace(good, bits=0, num_examples=0, refused="no bits")
    grid = federation([client(0, 2), broken], STATE)
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    broken.declaration = good
    go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
    assert gathered(nodes, grid) == {100: 0, 101: 1}


@pytest.mark.parametrize("seen", [True, False])
def test_a_node_that_returns_with_another_width_is_asked_anew(seen):
    changed = client(1, 2)
    grid = federation([client(0, 2), changed], STATE)
    nodes = Nodes(wait=0.3)
    nodes.gather(grid)
    changed.declaration = replace(changed.declaration, bits=4)
    go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
    nodes.gather(grid)
    assert nodes.widths() == {4: 1, 8: 1}


@pytest.mark.parametrize("seen", [True, False])
def test_a_query_that_was_lost_with_its_node_is_sent_again(seen):
    grid = two_nodes()
    node, grid.nodes[101] = grid.nodes[101], silent
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    grid.nodes[101] = node
    assert gathered(nodes, grid) == {100: 0}, "it never saw the question"
    go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
    assert gathered(nodes, grid) == {100: 0, 101: 1}


def test_updates_of_a_width_that_changed_between_two_rounds_are_used():
    changed = client(1, 2)
    grid = federation([client(0, 2), changed], STATE)
    strategy = FedAvg(context=with_w(node_wait=0.3))
    run_round(strategy, grid, STATE, 1)
    changed.declaration = replace(changed.declaration, bits=4)
    come_again(grid, 101)
    run_round(strategy, grid, STATE, 2)
    assert (strategy.round_log.aggregated, strategy.round_log.rejected) == ([0, 1], {})


def test_nodes_that_stay_are_asked_once():
    grid = two_nodes()
    grid.activated = {100: "1"}
    nodes = Nodes(wait=0.3)
    for _ in range(3):
        nodes.gather(grid)
    assert len(grid.sent) == 2


# --- how long an answer is waited for ----------------------------------------------------------


def test_a_round_waits_for_a_node_that_came_back():
    grid = SlowToAnswer(two_nodes().nodes)
    nodes = Nodes(wait=600)
    nodes.gather(grid)
    node = grid.nodes.pop(101)
    assert gathered(nodes, grid) == {100: 0}
    grid.nodes[101], grid.looks = node, 0
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert grid.looks == 3


@pytest.mark.parametrize("seen", [True, False])
def test_a_node_that_answers_is_waited_for_however_often_it_comes_back(seen, clock):
    grid = SlowToAnswer(two_nodes().nodes)
    nodes = Nodes(wait=0.4)
    nodes.gather(grid)
    began = clock.now
    for _ in range(4):
        go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
        grid.looks = 0
        assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert clock.now - began == pytest.approx(4 * 0.2), "twice what a silent one is waited for"


def test_a_node_that_stays_silent_is_waited_for_once():
    grid = SlowToAnswer(two_nodes().nodes)
    grid.answers_at = 1000
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    for _ in range(3):
        grid.looks = 0
        assert gathered(nodes, grid) == {100: 0}
        assert grid.looks == 1


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("silent_at_first", [True, False])
def test_a_silent_node_that_comes_and_goes_is_waited_for_once(seen, silent_at_first, clock):
    grid = two_nodes()
    nodes = Nodes(wait=0.5)
    if not silent_at_first:
        nodes.gather(grid)
        go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
    grid.nodes[101] = silent
    began = clock.now
    nodes.gather(grid)
    for _ in range(4):
        go_and_return(nodes, grid, 101) if seen else come_again(grid, 101)
        nodes.gather(grid)
    assert clock.now - began == pytest.approx(0.5)


def test_a_node_that_vanishes_while_it_is_waited_for_is_not_waited_for_again():
    class Flapping(LateGrid):
        def is_there(self, node_id):
            return node_id == 100 or self.looks % 2

    grid = two_nodes()
    nodes = Nodes(wait=1.0)
    nodes.gather(grid)
    grid.nodes[101] = silent
    go_and_return(nodes, grid, 101)
    flapping = Flapping(grid.nodes)
    nodes.gather(flapping)
    assert flapping.looks == 2
    flapping.looks = 0
    nodes.gather(flapping)
    assert flapping.looks == 1


def test_silent_nodes_under_ever_new_ids_are_waited_for_so_long_in_all(clock):
    grid = two_nodes()
    nodes = Nodes(wait=0.5)
    nodes.gather(grid)
    del grid.nodes[101]
    nodes.gather(grid)
    began = clock.now
    for node_id in range(200, 206):
        grid.nodes[node_id] = silent
        nodes.gather(grid)
    assert clock.now - began == pytest.approx(0.5)
    # One that answers takes part all the same, in the round after the one in which it was asked.
    grid = SlowToAnswer(grid.nodes | {101: client(1, 2)})
    assert gathered(nodes, grid) == {100: 0}
    grid.looks = 2
    assert gathered(nodes, grid) == {100: 0, 101: 1}


def test_a_node_that_answered_at_last_is_waited_for_again():
    grid = SlowToAnswer(two_nodes().nodes)
    grid.answers_at = 10
    nodes = Nodes(wait=0.4)
    assert gathered(nodes, grid) == {100: 0}, "waited for in vain"
    grid.looks = 9
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    come_again(grid, 101)
    grid.looks, grid.answers_at = 0, 3
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert grid.looks == 3


def test_no_node_is_waited_for_where_every_partition_is_held():
    grid = SlowToAnswer(two_nodes().nodes)
    nodes = Nodes(wait=600)
    nodes.gather(grid)
    grid.nodes[102], grid.looks = silent, 0
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert grid.looks == 1


class FailsAtFirst:
    """A node whose program raises so often before it answers."""

    def __init__(self, times, node):
        self.left = times
        self.node = node

    def __call__(self, message):
        self.left -= 1
        if self.left >= 0:
            return Message(Error(code=2, reason="too little memory"), reply_to=message)
        return self.node(message)


def test_a_query_may_fail_twice():
    grid = two_nodes()
    nodes = Nodes(wait=0.5)
    nodes.gather(grid)
    node = grid.nodes[101]
    grid.nodes[101] = FailsAtFirst(2, node)
    come_again(grid, 101)
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    grid.nodes[101] = FailsAtFirst(3, node)
    come_again(grid, 101)
    assert gathered(nodes, grid) == {100: 0}
    assert gathered(nodes, grid) == {100: 0}, "refused until it is started again"
    come_again(grid, 101)
    assert gathered(nodes, grid) == {100: 0, 101: 1}


class Slow(SimulatedGrid):
    """Nodes answer at the look after the one that asked them; notes how many were open."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.most_open, self.ripe = 0, set()

    def get_nodes(self):
        self.ripe = set(self._waiting)
        return super().get_nodes()

    def push_messages(self, messages):
        pushed = super().push_messages(messages)
        self.most_open = max(self.most_open, len(self._waiting))
        return pushed

    def pull_messages(self, message_ids):
        return super().pull_messages(self.ripe & set(message_ids))


def test_a_simulation_is_asked_few_questions_at_a_time_and_all_in_the_end():
    """It goes over all open ones for every node, in the server's process, which then starves."""
    grid = Slow(federation([client(i, 100) for i in range(100)], STATE).nodes)
    assert len(gathered(Nodes(wait=600), grid)) == 100
    assert grid.most_open == 32
    assert len(grid.sent) == 100


def test_networked_nodes_are_asked_at_once():
    """So that no silent one stands before another."""
    grid = federation([client(0, 100), client(1, 100)], STATE)
    grid.nodes |= {200 + i: silent for i in range(98)}
    grid.nodes[300] = grid.nodes.pop(101)
    assert gathered(Nodes(wait=0.3), grid) == {100: 0, 300: 1}


def test_what_a_grid_is_does_not_depend_on_ray():
    assert is_simulated(SimulatedGrid({}))
    assert not is_simulated(InProcessGrid({}))
    assert not is_simulated(HttpGrid(token="any"))
