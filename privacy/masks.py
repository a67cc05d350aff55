"""Masks: streams of words from a secret, added to words and taken away again.

A stream is AES-128 in counter mode under a key of its own for every secret and part. As words are
computed modulo a power of two, its bytes are words as they are, and all of them equally likely.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from privacy.keys import agree, derive, number_bytes, public_bytes

BLOCK_BYTES = 1 << 17  # of a stream at a time: three such blocks stay in the cache
_STREAMS = 64  # at once, so that memory does not grow with the number of devices
_COUNTER = bytes(16)

Mask = tuple[bytes, int]
"""The secret of a mask, and 1 or -1: whether it is added or taken away."""


def own_mask(self_seed: bytes, context: bytes) -> bytes:
    """Return the secret of the mask that only one device adds."""
    return derive(self_seed, "own mask", context)


def pairwise_mask(
    private: X25519PrivateKey, number: int, peer: int, peer_public: bytes, context: bytes
) -> Mask:
    """Return the mask that a device has with a peer: the lower number adds it, the other subtracts.

    Parameters
    ----------
    private : X25519PrivateKey
        The device's masking key.
    number, peer : int
        Both numbers.
    peer_public : bytes
        The peer's masking key.
    context : bytes
        Run, round and group.
    """
    ends = [(number, public_bytes(private)), (peer, peer_public)]
    fields = [part for end, public in sorted(ends) for part in (number_bytes(end), public)]
    secret = derive(agree(private, peer_public), "pairwise mask", context, *fields)
    return secret, 1 if number < peer else -1


def add_masks(parts: Sequence[np.ndarray], masks: Iterable[Mask]) -> None:
    """Add masks to the words of all parts, in place, modulo the type of the words.

    Parameters
    ----------
    parts : sequence of ndarray
        Words of `privacy.words.word_type`, contiguous.
    masks : iterable of (bytes, int)
        Each mask's secret, and 1 to add it or -1 to take it away.
    """
    masks = iter(masks)
    while some := list(islice(masks, _STREAMS)):
        for index, words in enumerate(parts):
            _add_streams(words, [(_part_key(secret, index), sign) for secret, sign in some])


def _part_key(secret: bytes, part: int) -> bytes:
    return derive(secret, "mask of a part", part.to_bytes(4, "big"), length=16)


def _add_streams(words: np.ndarray, keys: Sequence[Mask]) -> None:
    if not words.size:
        return
    streams = [(Cipher(AES(key), CTR(_COUNTER)).encryptor(), sign) for key, sign in keys]
    at_once = BLOCK_BYTES // words.itemsize
    zeros = bytes(min(words.nbytes, BLOCK_BYTES))
    # The library wants room for a block that it does not fill.
    stream = np.empty(len(zeros) + 16, np.uint8)
    for start in range(0, words.size, at_once):
        block = words[start : start + at_once]
        plain = memoryview(zeros)[: block.nbytes]
        mask = stream[: block.nbytes].view(words.dtype)
        for encryptor, sign in streams:
            encryptor.update_into(plain, stream.data)
            if sign > 0:
                block += mask
            else:
                block -= mask
