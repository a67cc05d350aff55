"""Shamir shares of 16-byte seeds, and the digests by which the server knows a right one.

Splitting is pycryptodome's. Reconstruction is ours: its `Shamir.combine` finds the weights of the
shares anew for every seed, seconds for the hundred seeds of a hundred devices, where they are the
same for all seeds whose shares came from the same devices. It is over the same field, GF(2**128)
modulo ``x**128 + x**7 + x**2 + x + 1``, and what it returns is compared with a commitment.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir

from privacy.keys import SEED_BYTES, bind, number_bytes

DIGEST_BYTES = 16
DIGESTS_BYTES = 2 * DIGEST_BYTES
KINDS = "own mask", "masking key"  # what the seeds that a device shares are for
_BITS = 8 * SEED_BYTES
_MODULUS = (1 << _BITS) | 0b10000111


def split(seed: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a seed into shares, of which any `threshold` give it back and fewer say nothing of it.

    Parameters
    ----------
    seed : bytes
        16 bytes.
    threshold : int
        Shares that are needed, at most `count`.
    count : int
        Shares to make.

    Returns
    -------
    list of bytes
        16 bytes each; the first one is the share at point 1.

    Examples
    --------
    >>> shares = split(b"sixteen byte key", threshold=2, count=3)
    >>> reconstruct([1, 3], [[shares[0], shares[2]]])
    [b'sixteen byte key']
    """
    return [bytes(share) for _, share in Shamir.split(threshold, count, seed, False)]


def digest(share: bytes, kind: str, context: bytes, owner: int, holder: int) -> bytes:
    """Return what the server compares a revealed share with.

    A share has 128 random bits: its hash hides it. 16 bytes of SHA-256 are enough, as two shares
    of one digest are of no use to a device: only the one it sealed is ever revealed.
    """
    numbers = number_bytes(owner), number_bytes(holder)
    return sha256(bind(f"{kind} share", [context, *numbers, share])).digest()[:DIGEST_BYTES]


def digests(shares: bytes, context: bytes, owner: int, holder: int) -> bytes:
    """Return those of both shares that an owner has for a holder, joined as the shares are."""
    parts = shares[:SEED_BYTES], shares[SEED_BYTES:]
    kinds = zip(parts, KINDS, strict=True)
    return b"".join(digest(share, kind, context, owner, holder) for share, kind in kinds)


def reconstruct(points: Sequence[int], shares: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Reconstruct seeds whose shares are at the same points.

    Parameters
    ----------
    points : sequence of int
        Where the shares are, counted from 1; as many as the threshold, all different.
    shares : sequence of sequence of bytes
        For each seed, its share at each of the points.

    Returns
    -------
    list of bytes
        The seeds.

    Notes
    -----
    A seed is the sum of its shares, each times the weight of its point. Multiplication by a weight
    is linear over the bits, so all seeds are one product of matrices of bits, modulo 2.
    """
    if not shares:
        return []
    rows = [row for weight in weights(points) for row in _multiples(weight)]
    matrix = np.unpackbits(np.frombuffer(b"".join(rows), np.uint8)).reshape(-1, _BITS)
    joined = np.frombuffer(b"".join(map(b"".join, shares)), np.uint8)
    bits = np.unpackbits(joined).reshape(len(shares), -1)
    # Exact: a sum of ones, far fewer than 2**24.
    sums = bits.astype(np.float32) @ matrix.astype(np.float32)
    seeds = np.packbits(sums.astype(np.int32).astype(np.uint8) & np.uint8(1), axis=1)
    return [seed.tobytes() for seed in seeds]


def reconstruct_all(shares: Mapping[int, Mapping[int, bytes]]) -> dict[int, bytes]:
    """Reconstruct one seed a device, from the shares at points that may differ between devices.

    Parameters
    ----------
    shares : mapping
        For each device the shares of its seed by point, as many as the threshold.

    Returns
    -------
    dict
        The seeds by device.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for owner, by_point in shares.items():
        alike.setdefault(tuple(sorted(by_point)), []).append(owner)
    seeds: dict[int, bytes] = {}
    for points, owners in alike.items():
        of_each = [[shares[owner][point] for point in points] for owner in owners]
        seeds.update(zip(owners, reconstruct(points, of_each), strict=True))
    return seeds


def weights(points: Sequence[int]) -> list[int]:
    """Return what the share at each point is multiplied with: Lagrange's polynomials at 0."""
    found = []
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = _times(above, other)
                below = _times(below, other ^ point)
        found.append(_times(above, _inverse(below)))
    return found


def _times(left: int, right: int) -> int:
    """Multiply in the field; the shorter factor had better be the right one."""
    product = 0
    while right:
        if right & 1:
            product ^= left
        right >>= 1
        left <<= 1
        if left >> _BITS:
            left ^= _MODULUS
    return product


def _inverse(element: int) -> int:
    """Invert in the field, by Euclid's algorithm for polynomials."""
    high, low, of_high, of_low = _MODULUS, element, 0, 1
    while low != 1:
        shift = high.bit_length() - low.bit_length()
        if shift < 0:
            high, low, of_high, of_low = low, high, of_low, of_high
            continue
        high ^= low << shift
        of_high ^= of_low << shift
        if high.bit_length() < low.bit_length():
            high, low, of_high, of_low = low, high, of_low, of_high
    return of_low


def _multiples(weight: int) -> list[bytes]:
    """Return a weight times each bit of a share, the highest bit first."""
    multiples = []
    for _ in range(_BITS):
        multiples.append(weight.to_bytes(SEED_BYTES, "big"))
        weight <<= 1
        if weight >> _BITS:
            weight ^= _MODULUS
    return multiples[::-1]
