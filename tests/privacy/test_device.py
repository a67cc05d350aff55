"""A device answers the server, but no request that would show its vector."""

import numpy as np
import pytest
from secure_group import CONTEXT, Group

from privacy import Device, MessageError, PublicKeys
from privacy.words import unpack


@pytest.fixture
def group():
    return Group((1, 2, 3, 4), threshold=3, widths=[(3, 9)])


@pytest.fixture
def masked(group):
    group.keys().shares().receive()
    group.payloads = group.make_masked()
    return group


def test_a_device_is_kept_between_all_messages(group):
    def keep():
        for number, device in group.devices.items():
            group.devices[number] = Device.from_bytes(device.to_bytes())
            assert group.devices[number].to_bytes() == device.to_bytes()

    keep()
    group.keys()
    keep()
    group.shares()
    keep()
    group.receive()
    keep()
    for number, payload in group.make_masked().items():
        group.server.take_masked(number, payload)
    keep()
    group.make_revealed()
    keep()
    group.revealed().assert_exact()


@pytest.mark.parametrize("change", [b"", b"x", lambda s: s[:-1], lambda s: b"\1" + s[1:]])
def test_a_damaged_state_is_rejected(group, change):
    state = group.devices[1].to_bytes()
    with pytest.raises(MessageError, match="damaged"):
        Device.from_bytes(change(state) if callable(change) else change)


def test_two_devices_of_one_context_have_nothing_in_common():
    one, other = (Device.begin(CONTEXT).public_keys() for _ in range(2))
    assert not set(one.each()) & set(other.each())


def test_secrets_are_in_no_text(masked):
    for number, payload in masked.payloads.items():
        masked.server.take_masked(number, payload)
    revealed = masked.make_revealed()
    device = masked.devices[1]
    assert repr(device) == str(device) == "Device(step='REVEALED')"
    assert {repr(message) for message in revealed.values()} == {"Revealed()"}
    assert {repr(message) for message in Group().keys().make_shares().values()} == {"Shares()"}
    seeds, member = device._state.seeds, device._state.members[2]
    text = repr(device._state)
    assert member.both_shares is not None
    for secret in (seeds.own_mask, seeds.masking, seeds.sealing, member.both_shares):
        assert repr(secret)[2:-1] not in text


class TestShare:
    def test_its_own_keys_must_be_in_the_roster_unchanged(self, group):
        roster = group.keys().roster
        other = Device.begin(CONTEXT).public_keys()
        device = group.devices[1]
        keys = device.public_keys()
        for changed in (other, PublicKeys(keys.masking, keys.sealing, other.commitment)):
            with pytest.raises(MessageError, match="device 1: the roster does not hold the keys"):
                device.share(1, {**roster, 1: changed}, 3)
        with pytest.raises(MessageError, match="device 7: the roster does not hold"):
            device.share(7, roster, 3)
        with pytest.raises(MessageError, match="device 2: the roster does not hold"):
            device.share(2, roster, 3)
        device.share(1, roster, 3)

    @pytest.mark.parametrize("threshold", [0, 2, 5, None, True, 3.0])
    def test_the_threshold_is_checked(self, group, threshold):
        with pytest.raises(MessageError, match="in a group of 4; allowed: 3 to 4"):
            group.devices[1].share(1, group.keys().roster, threshold)

    def test_it_shares_once(self, group):
        group.keys().make_shares()
        with pytest.raises(MessageError, match="out of order"):
            group.devices[1].share(1, group.roster, 3)


class TestReceive:
    def test_shares_that_do_not_open_cost_their_sender(self, group):
        group.keys().shares()
        sealed = group.server.handed_to(1)
        unopened = group.devices[1].receive({**sealed, 2: bytes(len(sealed[2]))})
        assert unopened == {2: "device 2: what it sealed for device 1 does not open"}

    @pytest.mark.parametrize("message", [b"", bytes(5), bytes(60), bytes(1000), None, "x", 3])
    def test_anything_may_come_instead_of_shares(self, group, message):
        group.keys().shares()
        sealed = {**group.server.handed_to(1), 3: message}
        assert list(group.devices[1].receive(sealed)) == [3]

    def test_swapped_shares_do_not_open(self, group):
        group.keys().shares()
        sealed = group.server.handed_to(1)
        sealed[2], sealed[3] = sealed[3], sealed[2]
        with pytest.raises(MessageError, match=r"2 devices; those of \[2, 3\] do not open"):
            group.devices[1].receive(sealed)
        with pytest.raises(MessageError, match=r"those of \[1, 3, 4\] do not open"):
            group.devices[2].receive({n: group.server.handed_to(4).get(n, b"") for n in (1, 3, 4)})

    def test_shares_of_another_round_do_not_open(self, group):
        other = Group((1, 2, 3, 4), threshold=3).keys().shares()
        group.keys().shares()
        with pytest.raises(MessageError, match="shares of 1 devices"):
            group.devices[1].receive(other.server.handed_to(1))

    def test_shares_of_those_that_were_told_another_group_do_not_open(self, group):
        roster = group.keys().roster
        less = {number: roster[number] for number in (1, 2, 3)}
        handed = {2: group.devices[2].share(2, less, 3).handed_to(1)}
        handed |= {n: group.devices[n].share(n, roster, 3).handed_to(1) for n in (3, 4)}
        group.devices[1].share(1, roster, 3)
        assert list(group.devices[1].receive(handed)) == [2]

    @pytest.mark.parametrize("stranger", [1, 9, "2", None])
    def test_shares_of_no_peer_are_rejected(self, group, stranger):
        group.keys().shares()
        with pytest.raises(MessageError, match="no peer in this group"):
            group.devices[1].receive({**group.server.handed_to(1), stranger: bytes(60)})

    def test_too_few_that_shared(self, group):
        group.keys().shares()
        sealed = group.server.handed_to(1)
        with pytest.raises(MessageError, match="shares of 2 devices; allowed are 3 or more"):
            group.devices[1].receive({2: sealed[2]})
        group.devices[1].receive({2: sealed[2], 3: sealed[3]})


class TestMask:
    def test_one_vector_only(self, masked):
        with pytest.raises(MessageError, match="out of order"):
            masked.devices[1].mask(masked.vectors[1])

    @pytest.mark.parametrize("value", [256, -257])
    def test_a_value_that_does_not_fit_is_refused_and_nothing_is_lost(self, group, value):
        group.keys().shares().receive()
        with pytest.raises(ValueError, match="outside of 9 bits"):
            group.devices[1].mask([(np.array([0, value, 0]), 9)])
        assert len(group.devices[1].mask([(np.array([0, value // 2, 0]), 9)])) == 4

    def test_before_the_shares_there_is_no_mask(self, group):
        for step in (group.keys, group.shares):
            step()
            with pytest.raises(MessageError, match="out of order"):
                group.devices[1].mask(group.vectors[1])

    def test_masked_zeros_are_uniform(self):
        """Chi-square over 2**9 residues: 20 standard deviations away is never seen."""
        group = Group((1, 2), threshold=2, widths=[(1 << 16, 9)]).keys().shares().receive()
        payload = group.devices[1].mask([(np.zeros(1 << 16, np.int64), 9)])
        counts = np.bincount(unpack(payload, 9, 1 << 16), minlength=512)
        expected = (1 << 16) / 512
        statistic = ((counts - expected) ** 2).sum() / expected
        assert abs(statistic - 511) < 20 * np.sqrt(2 * 511)


class TestReveal:
    @pytest.mark.parametrize(
        ("answered", "dropped", "reason"),
        [
            ([1, 2, 3], [3, 4], "both seeds of one device"),
            ([1, 2, 3, 4], [1], "both seeds of one device"),
            ([1, 1, 2, 3], [4], "both seeds of one device"),
            ([1, 2, 3], [4, 4], "both seeds of one device"),
            ([1, 2, 3], [], "other devices than those that shared"),
            ([1, 2, 3], [9], "other devices than those that shared"),
            ([1, 2, 3, 4, 9], [], "other devices than those that shared"),
            (["1", 2, 3], [4], "other devices than those that shared"),
            ([2, 3, 4], [1], "device 1: asked for its key, though it answered"),
            ([1, 2], [3, 4], "2 answered; allowed are 3 or more"),
            ([], [], "other devices than those that shared"),
        ],
    )
    def test_lists_that_would_show_more_than_the_sum(self, masked, answered, dropped, reason):
        with pytest.raises(MessageError, match=reason):
            masked.devices[1].reveal(answered, dropped)
        assert set(masked.devices[1].reveal([1, 2, 3], [4]).masking_keys) == {4}

    @pytest.mark.parametrize("kept", [False, True])
    def test_never_the_other_seed_later(self, masked, kept):
        device = masked.devices[1]
        first = device.reveal([1, 2, 3], [4])
        assert (set(first.own_masks), set(first.masking_keys)) == ({1, 2, 3}, {4})
        if kept:
            device = Device.from_bytes(device.to_bytes())
        for lists in (([1, 2, 3, 4], []), ([1, 2, 4], [3])):
            with pytest.raises(MessageError, match="asked again for other seeds"):
                device.reveal(*lists)
        assert device.reveal([3, 2, 1], [4]) == first

    def test_before_it_answered_it_reveals_nothing(self, group):
        group.keys().shares().receive()
        with pytest.raises(MessageError, match="out of order"):
            group.devices[1].reveal([1, 2, 3, 4], [])

    def test_one_that_sent_only_keys_is_never_asked_for(self):
        group = Group((1, 2, 3, 4), 3, gone={4: 1}).keys().shares().receive()
        group.make_masked()
        with pytest.raises(MessageError, match="other devices than those that shared"):
            group.devices[1].reveal([1, 2, 3], [4])
        assert group.devices[1].reveal([1, 2, 3], []).masking_keys == {}
