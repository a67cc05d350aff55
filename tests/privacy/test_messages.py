import pytest
from secure_group import CONTEXT

from privacy import (
    SEALED_BYTES,
    Device,
    MessageError,
    PublicKeys,
    Revealed,
    Shares,
    pack_by_number,
    roster_from_bytes,
    roster_to_bytes,
    unpack_by_number,
)
from privacy.messages import check_roster, roster_digest

LAST = 2**64 - 1


@pytest.fixture
def keys():
    return Device.begin(CONTEXT).public_keys()


@pytest.mark.parametrize(
    "message",
    [
        Shares({1: bytes(SEALED_BYTES), LAST: b"\1" * SEALED_BYTES}, {0: bytes(32), 1: bytes(32)}),
        Revealed({3: bytes(16)}, {1: bytes(16), 2: b"\2" * 16}),
        Revealed({}, {}),
    ],
)
def test_messages_come_back(message):
    assert type(message).from_record(message.to_record()) == message


def test_public_keys_come_back(keys):
    assert PublicKeys.from_record(keys.to_record()) == keys
    assert PublicKeys.from_bytes(keys.to_bytes()) == keys
    with pytest.raises(MessageError, match="95 bytes; allowed are 96"):
        PublicKeys.from_bytes(keys.to_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"masking": bytes(31)}, "'masking' has 31 bytes; allowed are 32"),
        ({"sealing": b""}, "'sealing' has 0 bytes; allowed are 32"),
        ({"commitment": bytes(33)}, "'commitment' has 33 bytes; allowed are 32"),
        ({"sealing": "x" * 32}, "'sealing' is of type str; allowed are bytes"),
        ({"sealing": None}, "'sealing' is of type NoneType; allowed are bytes"),
        ({"more": b""}, "fields of the message are not: commitment, masking, sealing"),
        ({"masking": bytes(32)}, "'masking' has a low order"),
        ({"sealing": b"\xff" * 32}, "'sealing' is not in its shortest form"),
    ],
)
def test_other_keys_are_rejected(keys, change, reason):
    with pytest.raises(MessageError, match=reason):
        PublicKeys.from_record({**keys.to_record(), **change})


def test_one_key_for_two_purposes_is_rejected(keys):
    with pytest.raises(MessageError, match="two of its keys are the same"):
        PublicKeys.from_record({**keys.to_record(), "sealing": keys.masking})


@pytest.mark.parametrize("record", [None, [], {}, {"own_masks": b""}, b"", {1: b"", 2: b""}])
def test_what_is_no_record_is_rejected(record):
    with pytest.raises(MessageError, match="fields of the message are not: masking_keys, own_mas"):
        Revealed.from_record(record)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(9), "9 bytes are no entries of 10 bytes"),
        (bytes(20), "must ascend"),
        (pack_by_number({2: b"bb"}) + pack_by_number({1: b"aa"}), "must ascend"),
    ],
)
def test_entries_that_are_not_in_order_are_rejected(data, reason):
    with pytest.raises(MessageError, match=reason):
        unpack_by_number(data, 2)


@pytest.mark.parametrize(("count", "allowed"), [(2, {2}), (3, {2, 3}), (4, {3, 4}), (5, {3, 4, 5})])
def test_a_threshold_is_more_than_half_and_at_most_all(count, allowed):
    roster = {number: Device.begin(CONTEXT).public_keys() for number in range(count)}
    for threshold in range(-1, count + 2):
        if threshold in allowed:
            check_roster(roster, threshold)
        else:
            with pytest.raises(
                MessageError, match=f"in a group of {count}; allowed: {min(allowed)}"
            ):
                check_roster(roster, threshold)


def test_a_group_of_one_is_rejected(keys):
    with pytest.raises(MessageError, match="a group of 1; allowed are 2 or more"):
        check_roster({1: keys}, 1)


def test_a_key_of_two_devices_is_rejected(keys):
    other = Device.begin(CONTEXT).public_keys()
    twin = PublicKeys(other.masking, keys.masking, other.commitment)
    with pytest.raises(MessageError, match="devices 1 and 2 have one key"):
        check_roster({1: keys, 2: twin}, 2)


def test_a_roster_is_known_by_its_digest(keys):
    other = Device.begin(CONTEXT).public_keys()
    of = [({1: keys, 2: other}, 2, b"a"), ({1: keys, 3: other}, 2, b"a")]
    of += [({1: other, 2: keys}, 2, b"a"), ({1: keys, 2: other}, 3, b"a")]
    of += [({1: keys, 2: other}, 2, b"b")]
    assert len({roster_digest(*fields) for fields in of}) == len(of)
    assert roster_digest({2: other, 1: keys}, 2, b"a") == roster_digest(*of[0])


def test_a_roster_comes_back_and_is_validated(keys):
    other = Device.begin(CONTEXT).public_keys()
    roster = {1: keys, LAST: other}
    assert roster_from_bytes(roster_to_bytes(roster)) == roster
    low = PublicKeys(bytes(32), keys.sealing, keys.commitment)
    with pytest.raises(MessageError, match="device 7: public key 'masking' has a low order"):
        roster_from_bytes(roster_to_bytes({1: other, 7: low}))
    with pytest.raises(MessageError, match="no entries of 104 bytes"):
        roster_from_bytes(roster_to_bytes(roster)[1:])
