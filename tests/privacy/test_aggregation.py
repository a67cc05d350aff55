"""The server's side: exact sums whoever drops out, and blame for those that break the protocol."""

import pickle

import numpy as np
import pytest
from secure_group import CONTEXT, Group

from privacy import (
    Device,
    GroupAggregation,
    MessageError,
    NotEnoughError,
    PublicKeys,
    Revealed,
    Shares,
    packed_size,
)

NUMBERS = (1, 2, 3, 4)


def group_of(**fields):
    return Group(NUMBERS, **{"threshold": 3, "widths": [(3, 9)], **fields})


class TestSum:
    @pytest.mark.parametrize("bits", [2, 3, 8, 9, 12, 16, 17, 27, 32, 33, 48, 62])
    @pytest.mark.parametrize("count", [0, 1, 17])
    def test_it_is_exact_at_every_width(self, bits, count):
        Group((9, 2), threshold=2, widths=[(count, bits)], seed=bits).run().assert_exact()

    def test_it_is_exact_over_several_parts_and_blocks(self):
        Group(widths=[(70_001, 9), (0, 4), (40_003, 27), (9, 62)]).run().assert_exact()

    def test_both_ends_of_the_range_are_reached(self):
        group = Group((1, 2), threshold=2, widths=[(2, 9)])
        group.vectors = {n: [(np.array([-128, 127]), 9)] for n in (1, 2)}
        [total] = group.run().server.total()
        assert total.tolist() == [-256, 254]

    @pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
    @pytest.mark.parametrize("which", [(1,), (2, 4), (6, 7)])
    def test_it_is_exact_when_devices_drop_out_after_any_step(self, after, which):
        gone = dict.fromkeys(which, after)
        group = Group(range(1, 8), 5, [(20, 9), (3, 30)], gone).run()
        group.assert_exact()
        said = ("keys", "shares", "word on the shares", "masked vector")
        expected = dict.fromkeys(which, f"sent no {said[after]}") if after < 4 else {}
        assert group.server.left_out == expected
        assert group.server.ignored == (
            dict.fromkeys(which, "sent no revealed shares") if after == 4 else {}
        )

    def test_one_drops_out_after_each_step(self):
        group = Group(range(10, 19), 5, [(11, 13)], {10: 0, 12: 1, 14: 3, 18: 4}).run()
        group.assert_exact()
        assert sorted(group.server.left_out) == [10, 12, 14]

    def test_what_arrives_in_another_order_gives_the_same(self):
        group = Group((2, 2**64 - 1, 0), threshold=2)
        group.numbers.reverse()
        group.run().assert_exact()

    def test_twenty_devices_at_the_default_threshold(self):
        Group(range(20), 14, [(64, 9)], {3: 3, 5: 2, 17: 4, 19: 1}).run().assert_exact()

    def test_it_can_be_asked_for_again(self):
        group = Group().run()
        group.assert_exact()
        group.assert_exact()


class TestThreshold:
    @pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
    def test_one_fewer_than_the_threshold_is_not_enough(self, after):
        group = group_of(gone={1: after, 4: after})
        with pytest.raises(NotEnoughError, match=r"^2 of 4 devices are left.* with 3 or more \("):
            group.run().server.total()
        assert group.server.spare == -1

    @pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
    def test_as_many_are_enough(self, after):
        group_of(gone={1: after}).run().assert_exact()

    def test_it_is_said_as_soon_as_it_is_certain(self):
        server = group_of().server
        server.check()
        for number, left in ((1, 0), (2, -1)):
            with pytest.raises(MessageError):
                server.take_keys(number, {})
            assert server.spare == left
        with pytest.raises(NotEnoughError, match="device 1: the fields of the message are not"):
            server.check()

    @pytest.mark.parametrize("threshold", [1, 2, 5])
    def test_other_thresholds_are_refused(self, threshold):
        with pytest.raises(ValueError, match="for 4 devices; allowed: 3 to 4"):
            GroupAggregation(CONTEXT, NUMBERS, threshold, [(1, 4)])

    def test_one_device_has_no_sum_of_its_own(self):
        with pytest.raises(ValueError, match="threshold 1 for 1 devices"):
            GroupAggregation(CONTEXT, [1], 1, [(1, 4)])


class TestSteps:
    def test_messages_before_and_after_their_step_are_rejected(self):
        group = group_of(gone={4: 0})
        late = group.devices[4].public_keys().to_record()
        with pytest.raises(MessageError, match="device 1: shares came too early"):
            group.server.take_shares(1, {})
        with pytest.raises(MessageError, match="device 1: masked vector came too early"):
            group.server.take_masked(1, b"")
        with pytest.raises(MessageError, match="device 1: revealed shares came too early"):
            group.server.take_revealed(1, {})
        group.keys()
        with pytest.raises(MessageError, match="device 4: out of the round: sent no keys"):
            group.server.take_keys(4, late)
        with pytest.raises(MessageError, match="device 1: keys came too late"):
            group.server.take_keys(1, late)
        group.shares().masked().revealed().assert_exact()

    def test_a_masked_vector_that_comes_too_late_stays_out(self):
        group = group_of().keys().shares().receive()
        payloads = group.make_masked()
        for number in (1, 2, 3):
            group.server.take_masked(number, payloads[number])
        revealed = group.make_revealed()
        with pytest.raises(MessageError, match="device 4: out of the round: sent no masked vector"):
            group.server.take_masked(4, payloads[4])
        for number, message in revealed.items():
            group.server.take_revealed(number, message.to_record())
        group.assert_exact(without=[4])

    def test_a_message_that_comes_again_counts_once(self):
        group = group_of()
        for number in group.numbers:
            group.server.take_keys(number, group.devices[number].public_keys().to_record())
        with pytest.raises(MessageError, match="device 2: keys came again; the first one counts"):
            group.server.take_keys(2, Device.begin(CONTEXT).public_keys().to_record())
        group.roster = group.server.roster()
        shares = group.make_shares()
        for number, message in shares.items():
            group.server.take_shares(number, message.to_record())
        with pytest.raises(MessageError, match="device 2: shares came again"):
            group.server.take_shares(2, shares[2].to_record())
        group.receive()
        payloads = group.make_masked()
        for number, payload in payloads.items():
            group.server.take_masked(number, payload)
        with pytest.raises(MessageError, match="device 2: masked vector came again"):
            group.server.take_masked(2, payloads[2])
        group.revealed()
        with pytest.raises(MessageError, match="device 2: revealed shares came again"):
            group.server.take_revealed(2, Revealed({}, {}).to_record())
        group.assert_exact()
        assert group.server.left_out == group.server.ignored == {}

    def test_strangers_are_rejected_and_cost_nothing(self):
        group = group_of()
        for take in ("keys", "shares", "masked", "revealed"):
            with pytest.raises(MessageError, match=r"device 9: .* that is not in the group"):
                getattr(group.server, f"take_{take}")(9, {})
        group.run().assert_exact()

    def test_steps_are_not_skipped(self):
        server = group_of().server
        for step in (server.to_reveal, server.total, lambda: server.handed_to(1)):
            with pytest.raises(RuntimeError, match="are not asked for yet"):
                step()

    def test_one_that_has_not_shared_is_handed_no_shares(self):
        group = group_of(gone={4: 1}).keys().shares()
        with pytest.raises(ValueError, match="device 4 has not shared"):
            group.server.handed_to(4)


class TestKeys:
    @pytest.mark.parametrize("name", ["masking", "sealing", "commitment"])
    def test_a_key_of_another_costs_the_second_one(self, name):
        group = group_of(gone={4: 0})
        stolen = group.devices[1].public_keys().to_record()
        group.server.take_keys(1, stolen)
        keys = {**group.devices[4].public_keys().to_record(), name: stolen[name]}
        with pytest.raises(MessageError, match="device 4: has a key of device 1; each needs its"):
            group.server.take_keys(4, keys)
        with pytest.raises(MessageError, match="device 4: out of the round: has a key of device 1"):
            group.server.take_keys(4, group.devices[4].public_keys().to_record())
        group.gone[1] = 0
        group.server.take_keys(2, group.devices[2].public_keys().to_record())
        assert sorted(group.server.left_out) == [4]

    def test_a_key_of_another_under_another_name(self):
        group = group_of()
        one, other = (group.devices[n].public_keys() for n in (1, 2))
        group.server.take_keys(1, one.to_record())
        twin = PublicKeys(one.sealing, other.sealing, other.commitment)
        with pytest.raises(MessageError, match="device 2: has a key of device 1"):
            group.server.take_keys(2, twin.to_record())


class TestShares:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda s: Shares({}, s.digests), "sealed shares are not for each of its peers"),
            (lambda s: Shares({**s.sealed, 4: bytes(60)}, s.digests), "not for each of its peers"),
            (lambda s: Shares(s.sealed, {**s.digests, 9: bytes(32)}), "not of each device in"),
            (lambda s: Shares(s.sealed, {}), "digests are not of each device in the group"),
            (lambda s: Shares({n: b[:-1] for n, b in s.sealed.items()}, s.digests), "no entries"),
        ],
    )
    def test_other_shares_cost_their_sender(self, change, reason):
        group = group_of().keys()
        for number, shares in group.make_shares().items():
            if number == 4:
                with pytest.raises(MessageError, match=f"device 4: .*{reason}"):
                    group.server.take_shares(4, change(shares).to_record())
            else:
                group.server.take_shares(number, shares.to_record())
        group.gone = {4: 1}
        group.masked().revealed().assert_exact()
        assert list(group.server.left_out) == [4]


class TestMasked:
    @pytest.mark.parametrize(
        ("payload", "reason"),
        [
            (b"", "masked vector has 0 bytes; allowed are 4"),
            (bytes(3), "masked vector has 3 bytes; allowed are 4"),
            (bytes(5), "masked vector has 5 bytes; allowed are 4"),
            (b"\0\0\0\x80", "the bits after 3 words of 9 bits are not zero"),
            (None, "masked vector is no bytes"),
            ("1234", "masked vector is no bytes"),
        ],
    )
    def test_another_payload_costs_its_sender(self, payload, reason):
        group = group_of().keys().shares().receive()
        assert group.server.payload_bytes == packed_size(3, 9) == 4
        for number, masked in group.make_masked().items():
            if number == 2:
                with pytest.raises(MessageError, match=f"device 2: {reason}"):
                    group.server.take_masked(2, payload)
                with pytest.raises(MessageError, match="device 2: out of the round"):
                    group.server.take_masked(2, masked)
            else:
                group.server.take_masked(number, masked)
        assert group.server.to_reveal() == ([1, 3, 4], [2])
        group.revealed().assert_exact(without=[2])


def test_the_server_holds_no_vector():
    """All that it received and holds: no run of plain residues is in it, masked or packed."""
    group = Group((1, 2, 3), threshold=2, widths=[(64, 16)])
    group.keys().shares().receive()
    payloads = group.make_masked()
    for number, payload in payloads.items():
        group.server.take_masked(number, payload)
    values = {n: group.vectors[n][0][0].astype("<u2") for n in payloads}
    held = group.server._sum[0]
    for number, plain in values.items():
        masked = np.frombuffer(payloads[number], np.uint8).reshape(2, 64)
        words = masked[0] + masked[1].astype(np.uint16) * np.uint16(256)
        # 64 residues of 16 bits: chance gives more than 8 equal ones with less than 2**-90.
        assert (words == plain).sum() < 8
        assert (held == plain).sum() < 8
        for other in set(payloads) - {number}:
            assert ((words - plain) == (held - values[other])).sum() < 8
    state = pickle.dumps(group.server)
    assert not any(payload in state for payload in payloads.values())
