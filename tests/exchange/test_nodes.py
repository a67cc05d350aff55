"""Who holds which partition, through `Nodes.gather` on a grid whose nodes come and go."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from federation import LateGrid, ScriptedClient, SimulatedGrid, federation

from core.errors import SettingsError
from exchange.nodes import Nodes, sample_nodes
from exchange.protocol import Declaration
from strategies import FederationError

STATE = {"w": torch.zeros(2, 3)}


def client(partition, of, bits=8, examples=10):
    return ScriptedClient(partition, of, bits, lambda state: state, examples)


def gathered(nodes, grid):
    return {n: d.partition_id for n, d in nodes.gather(grid).items()}


class FirstSpeaks(LateGrid):
    """At the first look, only node 100 has answered."""

    def has_answered(self, node_id):
        return node_id == 100 or self.looks > 1


@pytest.mark.parametrize("claim", [1, 2, 1000])
def test_the_first_node_to_speak_does_not_decide_for_all(claim):
    clients = [client(0, claim), client(1, 4), client(2, 4), client(3, 4)]
    grid = FirstSpeaks(federation(clients, STATE).nodes)
    nodes = Nodes(wait=0.5)
    assert gathered(nodes, grid) == {101: 1, 102: 2, 103: 3}
    assert nodes.num_partitions == 4
    # The number stays, also when nodes come and go.
    for node_id in (101, 102):
        del grid.nodes[node_id]
    grid.nodes |= {node_id: client(0, claim) for node_id in (104, 105)}
    assert gathered(nodes, grid) == {103: 3}


@pytest.mark.parametrize(
    ("claims", "named"),
    [([1, 1000], "1 as 1000 (1 each)"), ([3, 3, 2, 2, 4, 4, 9], "2 as 3 as 4 (2 each)")],
)
def test_a_tie_ends_the_run_in_one_line_that_names_the_numbers(claims, named):
    grid = federation([client(0, claim) for claim in claims], STATE)
    with pytest.raises(FederationError) as caught:
        Nodes(wait=0.3).gather(grid)
    assert str(caught.value) == (
        f"num-partitions: as many nodes declare {named}; every --node-config must hold the same"
    )


def test_a_silent_node_does_not_hide_a_tie():
    grid = federation([client(0, 1), client(0, 1000), client(0, 1)], STATE)
    grid.nodes[102] = lambda message: None
    with pytest.raises(FederationError, match="declare 1 as 1000"):
        Nodes(wait=0.3).gather(grid)


class OthersAreLate(LateGrid):
    """At the first look, only two nodes are there."""

    def is_there(self, node_id):
        return node_id <= 101 or self.looks > 1


def test_no_tie_is_declared_while_others_may_still_come():
    clients = [client(0, 1000), client(0, 4), client(1, 4)]
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, OthersAreLate(federation(clients, STATE).nodes)) == {101: 0, 102: 1}
    assert nodes.num_partitions == 4


def test_a_resumed_run_knows_whom_to_believe_in_a_tie():
    nodes = Nodes(wait=0.3)
    nodes.expect(2)
    assert gathered(nodes, federation([client(0, 2), client(1, 3)], STATE)) == {100: 0}


def test_refused_nodes_need_not_agree():
    clients = [client(0, 2), client(1, 3)]
    for one in clients:
        one.declaration = replace(one.declaration, bits=0, refused="no bits")
    with pytest.raises(FederationError, match="0 nodes can take part, min-nodes is 1: no bits"):
        Nodes(wait=0.3).gather(federation(clients, STATE))


def test_a_silent_node_too_many_is_not_waited_for():
    grid = federation([client(0, 2), client(1, 2), client(0, 2)], STATE)
    grid.nodes[102] = lambda message: None
    assert gathered(Nodes(wait=600), grid) == {100: 0, 101: 1}


def test_a_resumed_run_keeps_its_number_of_partitions():
    nodes = Nodes(wait=0.3)
    nodes.expect(2)
    grid = FirstSpeaks(federation([client(0, 3), client(1, 2), client(2, 3)], STATE).nodes)
    assert gathered(nodes, grid) == {101: 1}
    # Where no node declares it in time, the number is another, which the run then refuses.
    nodes = Nodes(wait=0.3)
    nodes.expect(2)
    nodes.gather(federation([client(i, 3) for i in range(3)], STATE))
    assert nodes.num_partitions == 3


def test_a_former_holder_that_returns_waits_for_the_present_one():
    grid = federation([client(0, 2), client(1, 2)], STATE)
    nodes = Nodes(wait=0.3)
    nodes.gather(grid)
    former = grid.nodes.pop(100)
    grid.nodes[102] = client(0, 2, bits=4)
    assert gathered(nodes, grid) == {101: 1, 102: 0}
    grid.nodes[100] = former
    assert gathered(nodes, grid) == {101: 1, 102: 0}
    assert nodes.widths() == {4: 1, 8: 1}
    del grid.nodes[102]
    assert gathered(nodes, grid) == {100: 0, 101: 1}


def test_two_nodes_of_one_partition_are_not_enough_for_two():
    grid = federation([client(0, 2), client(1, 2)], STATE)
    nodes = Nodes(min_nodes=2, wait=0.3)
    nodes.gather(grid)
    former = grid.nodes.pop(100)
    grid.nodes[102] = client(0, 2)
    nodes.gather(grid)
    grid.nodes[100] = former
    del grid.nodes[101]
    with pytest.raises(FederationError, match="1 nodes can take part, min-nodes is 2"):
        nodes.gather(grid)


def test_a_node_declares_no_more_examples_than_there_are_images():
    nodes = Nodes(wait=0.3, most_examples=1000)
    grid = federation([client(0, 2, examples=1000), client(1, 2, examples=1001)], STATE)
    assert gathered(nodes, grid) == {100: 0}


def thirty_in(partition, parts):
    """A partition of 30 examples, the last part the largest; there is none into more than three."""
    if parts > 3:
        raise SettingsError(f"too few for {parts} clients")
    return [10, 8, 12][partition]


def test_a_node_declares_no_more_examples_than_its_partition_has(caplog):
    nodes = Nodes(wait=0.3, examples_of=thirty_in)
    clients = [client(i, 3, examples=count) for i, count in enumerate((10, 9, 11))]
    grid = federation(clients, STATE)
    assert gathered(nodes, grid) == {100: 0, 102: 2}
    line = "Node 101 is refused: it declares 9 examples; partition 1 of 3 has 8"
    assert line in caplog.text
    # Who comes later is checked against it too, and takes the partition that the first did not get.
    grid.nodes |= {103: client(1, 3, examples=30), 104: client(1, 3, examples=8)}
    assert gathered(nodes, grid) == {100: 0, 102: 2, 104: 1}


def test_a_greedy_node_does_not_keep_the_partitions_own_one_out():
    nodes = Nodes(wait=600, examples_of=thirty_in)
    clients = [client(0, 3, examples=30), client(0, 3), client(1, 3, examples=8), client(2, 3)]
    assert gathered(nodes, federation(clients, STATE)) == {101: 0, 102: 1, 103: 2}


def test_no_partition_is_made_before_it_is_decided_how_many_partitions_there_are():
    asked = []

    def examples_of(partition, parts):
        asked.append(parts)
        return thirty_in(partition, parts)

    nodes = Nodes(wait=600, examples_of=examples_of)
    clients = [client(0, 10**6), client(0, 3), client(1, 3, examples=8), client(2, 3)]
    assert gathered(nodes, FirstSpeaks(federation(clients, STATE).nodes)) == {
        101: 0,
        102: 1,
        103: 2,
    }
    assert set(asked) == {3}


def test_nodes_of_a_number_of_partitions_without_a_partition_are_refused_with_the_reason():
    nodes = Nodes(wait=0.3, examples_of=thirty_in)
    grid = federation([client(i, 4) for i in range(4)], STATE)
    with pytest.raises(FederationError, match=r"0 nodes can take part.*too few for 4 clients"):
        nodes.gather(grid)


def test_the_text_of_a_refusal_is_one_short_line(caplog):
    talker = client(1, 2)
    refused = "x\nINFO: completed\x1b[2J" + "y" * 10_000
    talker.declaration = replace(talker.declaration, refused=refused)
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        Nodes(wait=0.3).gather(federation([client(0, 2), talker], STATE))
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    line = next(m for m in caplog.messages if "is refused" in m)
    assert "x?INFO: completed?[2J" in line
    assert len(line) < 600


class RunsOwnAreLate(LateGrid):
    """At the first looks, only node 100 is there."""

    def is_there(self, node_id):
        return node_id == 100 or self.looks > 2


def test_a_resumed_run_waits_for_the_nodes_that_it_had():
    clients = [client(0, 1), *(client(i, 4) for i in range(4))]
    grid = RunsOwnAreLate(federation(clients, STATE).nodes)
    nodes = Nodes(wait=600)
    nodes.expect(4)
    assert gathered(nodes, grid) == {101: 0, 102: 1, 103: 2, 104: 3}


class ClockOfLooks:
    """Time that passes only while the server sleeps between two looks: a second each."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += 1.0


class OneAnswersALook(LateGrid):
    def has_answered(self, node_id):
        return node_id < 100 + min(self.looks, self.most)


@pytest.mark.parametrize("most", [0, 3, 8])
def test_nodes_are_waited_for_as_long_as_they_answer(most, monkeypatch):
    """Eight answer within a wait of two seconds, one a second; a ninth never does."""
    clock = ClockOfLooks()
    monkeypatch.setattr("exchange.nodes.time", clock)
    grid = OneAnswersALook(federation([client(i, 9) for i in range(9)], STATE).nodes)
    grid.most = most
    nodes = Nodes(min_nodes=9, wait=2.0)
    said = f"{most} nodes can take part, min-nodes is 9: {most} of 9 connected nodes have answered;"
    with pytest.raises(FederationError, match=said):
        nodes.gather(grid)
    assert most <= clock.now <= most + 3


def test_a_federation_without_nodes_is_named():
    with pytest.raises(FederationError, match=r"no node is connected after 0\.01 s"):
        Nodes(wait=0.01).gather(federation([], STATE))
    one = client(0, 1)
    one.declaration = replace(one.declaration, bits=0, refused="no bits")
    with pytest.raises(FederationError, match=r"no bits .1 of 1 connected nodes are refused"):
        Nodes(wait=0.01).gather(federation([one], STATE))


def test_a_simulation_that_does_not_start_in_time_is_not_the_nodes_fault():
    class NotYet(LateGrid, SimulatedGrid):
        def has_answered(self, node_id):
            return False

    grid = NotYet(federation([client(0, 2), client(1, 2)], STATE).nodes)
    said = "none of 2 simulated nodes has answered after 0.01 s (node-wait); Flower's simulation is"
    with pytest.raises(FederationError, match=re.escape(said)):
        Nodes(wait=0.01).gather(grid)


def test_nodes_drawn_each_alone_are_not_told_by_the_seed():
    present = {i: Declaration(i, 400, 4, 10, "") for i in range(400)}
    drawn = [set(sample_nodes(present, 0.25, 0, 1, each_alone=True)) for _ in range(2)]
    # 100 of 400 on average, deviation 8.7; the same twice once in 10**70.
    assert all(40 < len(chosen) < 160 for chosen in drawn)
    assert drawn[0] != drawn[1]
    assert sample_nodes(present, 1.0, 0, 1, each_alone=True) == present
