"""Who holds which partition, through `Nodes.gather` on a grid whose nodes come and go."""

import logging
from dataclasses import replace

import pytest
import torch
from federation import InProcessGrid, ScriptedClient, federation

from strategies import FederationError
from strategies.nodes import Nodes

STATE = {"w": torch.zeros(2, 3)}


def client(partition, of, bits=8, examples=10):
    return ScriptedClient(partition, of, bits, lambda state: state, examples)


def gathered(nodes, grid):
    return {n: d.partition_id for n, d in nodes.gather(grid).items()}


class FirstSpeaks(InProcessGrid):
    """At the first look, only node 100 has answered."""

    looks = 0

    def get_node_ids(self):
        self.looks += 1
        return super().get_node_ids()

    def pull_messages(self, message_ids):
        asked = {i: self._waiting[i].metadata.dst_node_id for i in message_ids}
        return super().pull_messages([i for i in asked if self.looks > 1 or asked[i] == 100])


class SlowToAnswer(InProcessGrid):
    """Node 101 answers at the third look, as a device whose program has to start first."""

    looks = 0
    answers_at = 3

    def get_node_ids(self):
        self.looks += 1
        return super().get_node_ids()

    def pull_messages(self, message_ids):
        asked = {i: self._waiting[i].metadata.dst_node_id for i in message_ids}
        late = {i for i in asked if asked[i] == 101 and self.looks < self.answers_at}
        return super().pull_messages(asked.keys() - late)


@pytest.mark.parametrize("claim", [1, 2, 1000])
def test_the_first_node_to_speak_does_not_decide_for_all(claim):
    clients = [client(0, claim), client(1, 4), client(2, 4), client(3, 4)]
    grid = FirstSpeaks(federation(clients, STATE).nodes)
    nodes = Nodes(wait=0.5)
    assert gathered(nodes, grid) == {101: 1, 102: 2, 103: 3}
    assert nodes.num_partitions == 4
    # The number stays, whoever comes and goes.
    for node_id in (101, 102):
        del grid.nodes[node_id]
    grid.nodes |= {node_id: client(0, claim) for node_id in (104, 105)}
    assert gathered(nodes, grid) == {103: 3}


def test_of_equally_many_those_that_speak_of_more_are_believed():
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, federation([client(0, 1), client(1, 2)], STATE)) == {101: 1}
    assert nodes.num_partitions == 2


def test_a_silent_node_too_many_is_not_waited_for():
    grid = federation([client(0, 2), client(1, 2), client(0, 2)], STATE)
    grid.nodes[102] = lambda message: None
    assert gathered(Nodes(wait=600), grid) == {100: 0, 101: 1}


def test_a_resumed_run_keeps_its_number_of_partitions():
    nodes = Nodes(wait=0.3)
    nodes.expect(2)
    grid = FirstSpeaks(federation([client(0, 3), client(1, 2), client(2, 3)], STATE).nodes)
    assert gathered(nodes, grid) == {101: 1}
    # Where nobody speaks of it, the number is another, which the run then refuses.
    nodes = Nodes(wait=600)
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


def test_a_refused_node_that_was_repaired_takes_part_under_the_same_id():
    broken = client(1, 2)
    good = broken.declaration
    broken.declaration = replace(good, bits=0, num_examples=0, refused="no bits")
    grid = federation([client(0, 2), broken], STATE)
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    node = grid.nodes.pop(101)
    nodes.gather(grid)
    broken.declaration = good
    grid.nodes[101] = node
    assert gathered(nodes, grid) == {100: 0, 101: 1}


def test_a_node_that_returns_with_another_width_is_asked_anew():
    changed = client(1, 2)
    grid = federation([client(0, 2), changed], STATE)
    nodes = Nodes(wait=0.3)
    nodes.gather(grid)
    node = grid.nodes.pop(101)
    nodes.gather(grid)
    changed.declaration = replace(changed.declaration, bits=4)
    grid.nodes[101] = node
    nodes.gather(grid)
    assert nodes.widths() == {4: 1, 8: 1}


def test_a_query_that_was_lost_with_its_node_is_sent_again():
    grid = federation([client(0, 2), client(1, 2)], STATE)
    node, grid.nodes[101] = grid.nodes[101], lambda message: None
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    del grid.nodes[101]
    nodes.gather(grid)
    grid.nodes[101] = node
    assert gathered(nodes, grid) == {100: 0, 101: 1}


def test_a_round_waits_for_a_node_that_came_back():
    grid = SlowToAnswer(federation([client(0, 2), client(1, 2)], STATE).nodes)
    nodes = Nodes(wait=600)
    nodes.gather(grid)
    node = grid.nodes.pop(101)
    assert gathered(nodes, grid) == {100: 0}
    grid.nodes[101], grid.looks = node, 0
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert grid.looks == 3


def test_a_node_that_stays_silent_is_waited_for_once():
    grid = SlowToAnswer(federation([client(0, 2), client(1, 2)], STATE).nodes)
    grid.answers_at = 1000
    nodes = Nodes(wait=0.3)
    assert gathered(nodes, grid) == {100: 0}
    for _ in range(3):
        grid.looks = 0
        assert gathered(nodes, grid) == {100: 0}
        assert grid.looks == 1


def test_nobody_is_waited_for_where_every_partition_is_held():
    grid = SlowToAnswer(federation([client(0, 2), client(1, 2)], STATE).nodes)
    nodes = Nodes(wait=600)
    nodes.gather(grid)
    grid.nodes[102], grid.looks = lambda message: None, 0
    assert gathered(nodes, grid) == {100: 0, 101: 1}
    assert grid.looks == 1


def test_a_node_declares_no_more_examples_than_there_are_images():
    nodes = Nodes(wait=0.3)
    nodes.most_examples = 1000
    grid = federation([client(0, 2, examples=1000), client(1, 2, examples=1001)], STATE)
    assert gathered(nodes, grid) == {100: 0}


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
