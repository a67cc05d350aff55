"""Masks against a second implementation: X25519, HKDF and AES-CTR of others, or by hand."""

import hmac
from hashlib import sha256

import numpy as np
import pytest
from Crypto.Cipher import AES
from secure_group import CONTEXT, Group

from privacy.keys import new_seed
from privacy.masks import BLOCK_BYTES, add_masks, own_mask
from privacy.words import to_signed, to_words, unpack, word_type

FIELD = 2**255 - 19


def x25519(scalar, point):
    """RFC 7748, section 5."""
    k = int.from_bytes(scalar, "little") & ~7 & (1 << 255) - 1 | 1 << 254
    u = int.from_bytes(point, "little")
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        x3, z3 = (da + cb) ** 2 % FIELD, u * (da - cb) ** 2 % FIELD
        aa, bb = a * a, b * b
        x2, z2 = aa * bb % FIELD, (aa - bb) * (aa + 121665 * (aa - bb)) % FIELD
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, FIELD - 2, FIELD) % FIELD).to_bytes(32, "little")


def hkdf(secret, length, *fields):
    parts = [b"prowd secure aggregation 1", *fields]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    key = hmac.digest(hmac.digest(bytes(32), secret, sha256), info + b"\1", sha256)
    return key[:length]


def stream(secret, part, count, bits):
    key = hkdf(secret, 16, b"mask of a part", part.to_bytes(4, "big"))
    cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0)
    words = word_type(bits)
    return np.frombuffer(cipher.encrypt(bytes(count * words.itemsize)), words)


def test_the_ladder_is_that_of_rfc_7748():
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    result = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == result


def test_a_masked_vector_is_that_of_another_implementation():
    widths = [(11, 7), (20, 9), (9, 27), (5, 60)]
    group = Group((30, 10, 20), threshold=2, widths=widths).keys().shares().receive()
    payloads = group.make_masked()
    masking = {
        number: hkdf(device._state.seeds.masking, 32, b"masking key", CONTEXT)
        for number, device in group.devices.items()
    }
    base = (9).to_bytes(32, "little")
    public = {number: x25519(private, base) for number, private in masking.items()}
    for number, device in group.devices.items():
        masks = [(hkdf(device._state.seeds.own_mask, 32, b"own mask", CONTEXT), 1)]
        for peer in set(masking) - {number}:
            low, high = sorted((number, peer))
            ends = low.to_bytes(8, "big"), public[low], high.to_bytes(8, "big"), public[high]
            agreed = x25519(masking[number], public[peer])
            secret = hkdf(agreed, 32, b"pairwise mask", CONTEXT, *ends)
            masks.append((secret, 1 if number == low else -1))
        start = 0
        for part, (count, bits) in enumerate(widths):
            size = (count * bits + 7) // 8
            expected = [int(value) for value in group.vectors[number][part][0]]
            for secret, sign in masks:
                mask = stream(secret, part, count, bits)
                expected = [v + sign * int(m) for v, m in zip(expected, mask, strict=True)]
            found = unpack(payloads[number][start : start + size], bits, count)
            assert found.tolist() == [value % 2**bits for value in expected]
            start += size


@pytest.mark.parametrize("bits", [8, 9, 27, 62])
def test_a_mask_goes_on_over_blocks(bits):
    count = BLOCK_BYTES // word_type(bits).itemsize * 2 + 3
    words = np.zeros(count, word_type(bits))
    add_masks([np.zeros(1, np.uint8), words], [(secret := own_mask(new_seed(), b""), 1)])
    np.testing.assert_array_equal(words, stream(secret, 1, count, bits))


def test_what_is_added_is_taken_away_again():
    values = np.arange(-100, 100)
    parts = [to_words(values, 9), to_words(values, 20)]
    masks = [(own_mask(new_seed(), b""), (-1) ** index) for index in range(150)]
    add_masks(parts, masks)
    assert not np.array_equal(to_signed(parts[0], 9), values)
    add_masks(parts, ((secret, -sign) for secret, sign in masks))
    for words, bits in zip(parts, (9, 20), strict=True):
        np.testing.assert_array_equal(to_signed(words, bits), values)


def test_parts_of_one_width_have_masks_of_their_own():
    parts = [np.zeros(64, np.uint16), np.zeros(64, np.uint16)]
    add_masks(parts, [(own_mask(new_seed(), b""), 1)])
    assert not np.array_equal(*parts)
