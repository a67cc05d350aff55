"""Shamir shares against pycryptodome and against Lagrange by hand."""

import secrets
from itertools import combinations

import pytest
from Crypto.Protocol.SecretSharing import Shamir

from privacy.keys import LARGEST_NUMBER
from privacy.shares import digest, reconstruct, reconstruct_all, split, weights


def times(left, right):
    """Multiply in GF(2**128) as polynomials, then divide by the modulus."""
    product = 0
    for bit in range(128):
        if right >> bit & 1:
            product ^= left << bit
    for degree in range(product.bit_length() - 1, 127, -1):
        if product >> degree & 1:
            product ^= ((1 << 128) | 0x87) << (degree - 128)
    return product


def inverse(element):
    """By Fermat: to the power 2**128 - 2."""
    power, result = element, 1
    for _ in range(127):
        power = times(power, power)
        result = times(result, power)
    return result


def lagrange(shares):
    seed = 0
    for x, y in shares:
        term = int.from_bytes(y, "big")
        for other, _ in shares:
            if other != x:
                term = times(term, times(other, inverse(x ^ other)))
        seed ^= term
    return seed.to_bytes(16, "big")


def test_any_three_of_five_give_the_seed_back_by_three_implementations():
    seed = secrets.token_bytes(16)
    shares = dict(enumerate(split(seed, 3, 5), 1))
    for points in combinations(shares, 3):
        of_points = [shares[point] for point in points]
        pairs = list(zip(points, of_points, strict=True))
        assert reconstruct(points, [of_points]) == [seed]
        assert lagrange(pairs) == Shamir.combine(pairs) == seed


def test_two_of_five_give_another_seed():
    seed = secrets.token_bytes(16)
    shares = split(seed, 3, 5)
    assert reconstruct([1, 2], [shares[:2]]) != [seed]


def test_a_line_by_hand():
    # seed + x * 2 in the field: at 1 it is seed ^ 2, at 3 seed ^ 6.
    points = {1: 5 ^ 2, 3: 5 ^ 6}
    shares = [[value.to_bytes(16, "big") for value in points.values()]]
    assert reconstruct(list(points), shares) == [(5).to_bytes(16, "big")]


def test_weights_add_up_to_one():
    # The polynomial that is 1 everywhere is 1 at 0.
    total = 0
    for weight in weights([2, 3, 7, 90, 255, 1000]):
        total ^= weight
    assert total == 1


@pytest.mark.parametrize(("threshold", "count"), [(2, 2), (2, 3), (14, 20), (67, 100)])
def test_many_seeds_from_the_last_shares(threshold, count):
    seeds = [secrets.token_bytes(16), bytes(16)] if count == 100 else [bytes([255] * 16), bytes(16)]
    points = list(range(count - threshold + 1, count + 1))
    shares = [split(seed, threshold, count)[-threshold:] for seed in seeds]
    assert reconstruct(points, shares) == seeds


def test_seeds_whose_shares_are_of_different_devices():
    seeds = {number: secrets.token_bytes(16) for number in (4, 5, 6)}
    points = {4: (1, 2), 5: (2, 3), 6: (1, 2)}
    shares = {}
    for number, seed in seeds.items():
        of_all = split(seed, 2, 3)
        shares[number] = {point: of_all[point - 1] for point in points[number]}
    assert reconstruct_all(shares) == seeds
    assert reconstruct_all({}) == {}


def test_a_digest_is_of_its_share_kind_context_owner_and_holder_alone():
    share = bytes(16)
    of = [
        (share, "own mask", b"a", 1, 2),
        (share, "masking key", b"a", 1, 2),
        (share, "own mask", b"b", 1, 2),
        (share, "own mask", b"a", 2, 1),
        (share, "own mask", b"a", 1, LARGEST_NUMBER),
        (b"\1" * 16, "own mask", b"a", 1, 2),
    ]
    assert len({digest(*fields) for fields in of}) == len(of)
    assert digest(*of[0]) == digest(*of[0])
    assert len(digest(*of[0])) == 16
