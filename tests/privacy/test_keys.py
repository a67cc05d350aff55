import hmac
from hashlib import sha256

import pytest

from privacy.errors import MessageError
from privacy.keys import (
    agree,
    bind,
    check_number,
    check_public_key,
    commit,
    derive,
    new_seed,
    open_sealed,
    private_key,
    public_bytes,
    seal,
)

FIELD = 2**255 - 19
# What u-coordinates of points of low order are: every key agrees with them on zero.
LOW_ORDER = (
    0,
    1,
    FIELD - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)


def pair(seed):
    private = private_key(seed, "sealing", b"context")
    return private, public_bytes(private)


def test_derive_is_hkdf():
    secret = new_seed()
    info = bind("purpose", [b"field"])
    extracted = hmac.digest(bytes(32), secret, "sha256")
    assert derive(secret, "purpose", b"field") == hmac.digest(extracted, info + b"\1", "sha256")


def test_what_is_bound_cannot_be_cut_elsewhere():
    bound = [("a", [b"bc"]), ("ab", [b"c"]), ("a", [b"b", b"c"]), ("a", [b"bc", b""])]
    assert len({bind(*fields) for fields in bound}) == len(bound)


def test_both_ends_agree():
    (one, one_public), (other, other_public) = pair(new_seed()), pair(new_seed())
    assert agree(one, other_public) == agree(other, one_public)


def test_one_seed_gives_another_key_for_each_purpose_and_context():
    seed = new_seed()
    uses = [("masking", b"1"), ("sealing", b"1"), ("masking", b"2")]
    assert len({public_bytes(private_key(seed, *use)) for use in uses}) == 3
    assert commit(seed, b"1") != commit(seed, b"2") != sha256(seed).digest()


@pytest.mark.parametrize("point", LOW_ORDER)
def test_keys_of_low_order_are_rejected(point):
    with pytest.raises(MessageError, match="'masking' has a low order"):
        check_public_key(point.to_bytes(32, "little"), "masking")


def test_other_spellings_of_a_key_are_rejected():
    _, public = pair(new_seed())
    check_public_key(public, "sealing")
    high_bit = public[:-1] + bytes([public[-1] | 0x80])
    for key in (high_bit, (FIELD + 9).to_bytes(32, "little")):
        with pytest.raises(MessageError, match="not in its shortest form"):
            check_public_key(key, "sealing")


def test_only_the_receiver_opens_and_only_as_it_was_sealed():
    (one, one_public), (other, other_public) = pair(new_seed()), pair(new_seed())
    sealed = seal(b"shares", one, 1, 2, other_public, b"roster")
    assert open_sealed(sealed, other, 1, 2, one_public, b"roster") == b"shares"
    assert len(sealed) == 28 + 6
    assert seal(b"shares", one, 1, 2, other_public, b"roster") != sealed
    third, third_public = pair(new_seed())
    wrong = [
        (sealed, third, 1, 2, one_public, b"roster"),
        (sealed, other, 3, 2, one_public, b"roster"),
        (sealed, other, 1, 3, one_public, b"roster"),
        (sealed, other, 2, 1, one_public, b"roster"),
        (sealed, other, 1, 2, third_public, b"roster"),
        (sealed, other, 1, 2, one_public, b"another"),
        (sealed[:-1], other, 1, 2, one_public, b"roster"),
        (sealed[:5], other, 1, 2, one_public, b"roster"),
        (b"", other, 1, 2, one_public, b"roster"),
    ]
    for arguments in wrong:
        with pytest.raises(MessageError, match=r"device \d: what it sealed for device \d does not"):
            open_sealed(*arguments)


@pytest.mark.parametrize("number", [-1, 2**64, True, 1.0, "1", None])
def test_numbers_of_devices_are_integers_of_64_bits(number):
    with pytest.raises(MessageError, match="from 0 to"):
        check_number(number)
