"""Who holds which partition, by the rules alone: no grid, no clock."""

import pytest

from core.errors import FederationError, SettingsError
from exchange.protocol import Declaration
from exchange.seats import Seats


def of(partition, parts, examples=10, bits=8):
    return Declaration(partition, parts, bits, examples, "")


def seats(*declared, most=100, examples_of=None):
    """Seats of nodes 1, 2, ... that declared these."""
    made = Seats(most, examples_of)
    for node_id, declaration in enumerate(declared, 1):
        made.declare(node_id, declaration)
    return made


def held(declarations):
    return {node_id: d.partition_id for node_id, d in declarations.items()}


def test_a_partition_is_held_by_the_first_that_declared_it():
    made = seats(of(0, 2), of(0, 2), of(1, 2))
    assert held(made.taken()) == {1: 0, 3: 1}
    made.end_gathering(made.taken())
    assert made.refused == {2: "partition 0 is held by node 1"}
    made.forget_all_but({2, 3})
    assert held(made.taken()) == {2: 0, 3: 1}


def test_the_number_of_partitions_is_what_most_declare():
    made = seats(of(0, 3), of(1, 3), of(0, 2))
    assert made.num_partitions == 3
    assert held(made.taken()) == {1: 0, 2: 1}
    made.end_gathering(made.taken())
    assert made.refused == {3: "it declares 2 partitions, the others 3"}
    # It is settled: more of another number change nothing.
    for node_id in (4, 5, 6):
        made.declare(node_id, of(node_id - 4, 4))
    assert made.num_partitions == 3


def test_a_tie_has_no_number_and_ends_the_gathering():
    made = seats(of(0, 3), of(0, 2))
    assert made.num_partitions == 0
    with pytest.raises(FederationError, match=r"as many nodes declare 2 as 3 \(1 each\)"):
        made.end_gathering({})
    made.expect(2)
    assert made.num_partitions == 2


def test_nodes_of_own_data_are_numbered_and_alone():
    made = seats(of(-1, 0), of(0, 2), of(-1, 0))
    assert held(made.taken()) == {1: 0, 3: 1}
    made.settle()
    made.forget_all_but({2, 3})
    # A number stays with its node, and data of their own with the run.
    assert held(made.taken()) == {3: 1}


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (of(2, 2), "it declares partition 2 of 2"),
        (of(0, 2, bits=20), "it declares 20 bits; allowed: 2 to 16, or 32"),
        (of(0, 2, examples=101), "it declares 101 examples; allowed: 1 to 100"),
    ],
)
def test_what_cannot_be_is_refused(declared, reason):
    made = seats(declared)
    assert made.refused == {1: reason}
    assert made.taken() == {}
    assert made.heard() == {1}


def test_one_that_claims_too_much_leaves_its_seat_to_the_next():
    def examples_of(partition, parts):
        if partition == 1:
            raise SettingsError("there is no such part")
        return 10

    made = seats(of(0, 2, examples=11), of(0, 2), of(1, 2), examples_of=examples_of)
    assert held(made.taken()) == {1: 0, 3: 1}
    assert held(made.taken_and_fit()) == {2: 0}
    assert made.refused == {
        1: "it declares 11 examples; partition 0 of 2 has 10",
        3: "there is no such part",
    }


def test_a_gathering_waits_for_those_that_may_change_the_number():
    made = seats(of(0, 2), of(1, 2), of(0, 3))
    # One more vote makes a tie.
    assert not made.are_settled(2, unanswered=1)
    assert made.are_settled(2, unanswered=0)
    made.end_gathering(made.taken())
    assert made.are_settled(2, unanswered=1)
