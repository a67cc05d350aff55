"""Devices that complain of the shares of others, rightly or not: who is out, and what is shown."""

import random

import pytest
from secure_group import Group

from privacy import Complaints, MessageError, Shares

SEVEN = tuple(range(1, 8))


def opened(numbers, threshold, garbage=None, lies=None, gone=None):
    """A group after its complaints: who seals garbage for whom, and who complains of whom."""
    group = Group(numbers, threshold, [(3, 9)], gone).keys()
    for number, shares in group.make_shares().items():
        for_them = (garbage or {}).get(number, ())
        sealed = {n: bytes(60) if n in for_them else one for n, one in shares.sealed.items()}
        group.server.take_shares(number, Shares(sealed, shares.digests).to_record())
    for number, unopened in group.opened():
        said = Complaints(frozenset({*unopened, *(lies or {}).get(number, ())}))
        try:
            group.server.take_complaints(number, said.to_record())
        except MessageError:
            assert number in lies
    group.without = group.server.without()
    return group


def unmasked(group):
    for number, payload in group.make_masked().items():
        group.server.take_masked(number, payload)
    return group.revealed()


def test_one_whose_shares_nobody_can_open_is_out_alone():
    group = opened((1, 2, 3, 4), 3, garbage={2: (1, 3, 4)})
    assert group.server.left_out == {2: "its shares do not open, as said by 1, 3, 4"}
    unmasked(group).assert_exact()


def test_one_whose_shares_one_cannot_open_is_in_the_sum():
    group = opened(SEVEN, 5, garbage={2: (1,)})
    assert group.server.complaints() == {2: [1]}
    unmasked(group).assert_exact()
    assert group.without == []


def test_shares_that_are_not_those_of_their_digests_are_complained_of():
    group = Group((1, 2, 3, 4), 3).keys()
    for number, shares in group.make_shares().items():
        digests = {**shares.digests, 1: bytes(32)} if number == 2 else shares.digests
        group.server.take_shares(number, Shares(shares.sealed, digests).to_record())
    reason = "device 2: its shares do not match the digests it sent"
    assert dict(group.opened())[1] == {2: reason}


def test_one_that_complains_of_everybody_is_out_alone():
    group = opened(SEVEN, 5, lies={4: set(SEVEN) - {4}})
    assert group.server.left_out == {
        4: "holds shares of 1 devices, as it says; allowed are 5 or more"
    }
    unmasked(group).assert_exact()


@pytest.mark.parametrize("of", [(9,), (4,), (1, 9)])
def test_complaints_of_others_than_peers_cost_their_sender(of):
    group = opened(SEVEN, 5, lies={4: of})
    assert group.server.left_out == {4: "complains of others than its peers that shared"}
    unmasked(group).assert_exact()


def test_nobody_is_out_by_the_word_of_one():
    group = opened(SEVEN, 5, lies={4: (1, 2)})
    assert group.without == []
    unmasked(group).assert_exact()


@pytest.mark.parametrize("gone", [{}, {2: 3}])
def test_it_is_enough_if_as_many_as_the_threshold_hold_shares(gone):
    """Also if the one at fault then fails: its key is needed."""
    group = opened(SEVEN, 5, garbage={2: (1,)}, gone=gone)
    assert group.without == []
    unmasked(group).assert_exact()
    group = opened(SEVEN, 5, garbage={2: (1, 3)}, gone=gone)
    assert group.without == [2]
    unmasked(group).assert_exact()


def test_of_two_that_complain_of_each_other_one_is_out():
    group = opened((1, 2, 3, 4), 3, garbage={2: (3,)}, lies={2: (3,)})
    assert group.without in ([2], [3])
    unmasked(group).assert_exact()


def test_nothing_of_one_that_is_out_is_ever_revealed():
    group = opened(SEVEN, 5, garbage={2: (1, 3, 4)})
    payloads = group.make_masked()
    assert 2 not in payloads
    for number, payload in payloads.items():
        group.server.take_masked(number, payload)
    left = [n for n in SEVEN if n != 2]
    for lists in ((SEVEN, []), (left, [2])):
        with pytest.raises(MessageError, match="other devices than those that shared"):
            group.devices[5].reveal(*lists)
    for revealed in group.make_revealed().values():
        assert 2 not in {*revealed.own_masks, *revealed.masking_keys}


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ([5], "without itself"),
        ([9], "one that has not shared"),
        (["1"], "one that has not shared"),
        ([1, 2, 3], "in a group of 4; allowed are 5 or more"),
    ],
)
def test_a_device_masks_with_a_group_of_the_threshold_only(without, reason):
    group = opened(SEVEN, 5)
    with pytest.raises(MessageError, match=reason):
        group.devices[5].mask(group.vectors[5], without)
    assert group.devices[5].mask(group.vectors[5], [1, 2])


@pytest.mark.parametrize("seed", range(40))
def test_as_many_as_there_are_to_spare_may_do_what_they_like(seed):
    """Of nine at a threshold of six, two: no honest one is out, and the sum is exact."""
    rng, numbers = random.Random(seed), tuple(range(9))

    def some(number, most):
        return set(rng.sample([n for n in numbers if n != number], rng.randrange(most + 1)))

    liars = rng.sample(numbers, 2)
    garbage = {n: some(n, 8) for n in liars}
    lies = {n: some(n, rng.choice((3, 8))) for n in liars}
    gone = {n: rng.choice((2, 3, 4, 9)) for n in liars}
    group = opened(numbers, 6, garbage, lies, gone)
    assert set(group.without) <= set(liars)
    unmasked(group).assert_exact()
