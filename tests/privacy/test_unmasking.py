"""Shares that devices reveal: the wrong ones are not used, and the device at fault is named."""

from dataclasses import replace

import pytest
from secure_group import Group

from privacy import MessageError, Revealed, UnmaskingError

NUMBERS = (1, 2, 3, 4)


def group_of(**fields):
    return Group(NUMBERS, **{"threshold": 3, "widths": [(3, 9)], **fields})


def reveal(group, change, number=2, message=None):
    """Hand over all revealed shares, those of one device changed."""
    for each, revealed in group.keys().shares().masked().make_revealed().items():
        if each != number:
            group.server.take_revealed(each, revealed.to_record())
        elif message is None:
            group.server.take_revealed(each, change(revealed).to_record())
        else:
            with pytest.raises(MessageError, match=f"device {number}: .*{message}"):
                group.server.take_revealed(each, change(revealed).to_record())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: Revealed({**r.own_masks, 4: bytes(16)}, {}), "than those that answered"),
        (lambda r: Revealed(r.own_masks, {1: bytes(16)}), "than those that dropped"),
        (lambda r: Revealed({**r.own_masks, 9: bytes(16)}, {}), "than those that answered"),
        (lambda r: Revealed({}, {}), "share of its own seed does not match"),
        (lambda r: Revealed({**r.own_masks, 2: bytes(16)}, {}), "does not match the digest"),
        (lambda r: Revealed({1: bytes(15)}, {}), "no entries"),
    ],
)
def test_what_was_not_asked_for_costs_its_sender(change, reason):
    numbers = (1, 2, 3, 4, 5)
    group = Group(numbers, 3, gone={4: 3})
    reveal(group, change, 2, reason)
    group.assert_exact()
    assert list(group.server.ignored) == [2]
    assert list(group.server.left_out) == [4]


@pytest.mark.parametrize("kind", ["own_masks", "masking_keys"])
def test_a_share_that_was_changed_is_not_used(kind):
    group = Group((1, 2, 3, 4, 5), 3, gone={5: 3})
    owner = 3 if kind == "own_masks" else 5

    def change(revealed):
        kinds = {"own_masks": dict(revealed.own_masks), "masking_keys": revealed.masking_keys}
        return Revealed(**{**kinds, kind: {**kinds[kind], owner: bytes(16)}})

    reveal(group, change, 1)
    group.assert_exact()


def test_without_one_to_spare_the_owner_is_named():
    group = group_of()
    group.gone = {4: 4}
    reveal(group, lambda r: Revealed({**r.own_masks, 3: bytes(16)}, {}), 1)
    with pytest.raises(UnmaskingError, match="device 3: 2 of its revealed shares match") as info:
        group.server.total()
    assert info.value.number == 3


@pytest.mark.parametrize(("kind", "gone"), [("own mask", {}), ("masking key", {2: 3})])
def test_shares_of_another_secret_name_the_device_that_shared_them(kind, gone):
    """Device 2 shares other seeds than it committed to; its digests match its shares."""
    group = group_of(gone=gone)
    liar = group.devices[2]
    keys = liar.public_keys()
    name = "own_mask" if kind == "own mask" else "masking"
    liar._state.seeds = replace(liar._state.seeds, **{name: bytes(16)})
    liar.public_keys = lambda: keys
    with pytest.raises(UnmaskingError, match=f"device 2: its shares of the {kind}'s") as info:
        group.run().server.total()
    assert info.value.number == 2
    with pytest.raises(UnmaskingError):
        group.server.total()
