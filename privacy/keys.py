"""Keys: seeds to X25519 key pairs, key agreement, commitments, and sealing for one peer.

Everything that is derived or hashed names its purpose and the context (run, round and group), so
that nothing of one step, round or group can be taken for anything of another.
"""

import secrets
from collections.abc import Iterable
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import MessageError

SEED_BYTES = 16
KEY_BYTES = 32
LARGEST_NUMBER = 2**64 - 1

_NONCE_BYTES, _TAG_BYTES = 12, 16
SEALING_BYTES = _NONCE_BYTES + _TAG_BYTES  # what sealing adds to a message
_FIELD = 2**255 - 19  # public keys are integers below it
# Some key of our own, to find the public keys that agree with every key on the same secret.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(KEY_BYTES))


def check_number(number: object) -> int:
    """Return the number of a device.

    Raises
    ------
    MessageError
        If it is not an integer that 64 bits hold.
    """
    if type(number) is not int or not 0 <= number <= LARGEST_NUMBER:
        raise MessageError("a device has a number that is not an integer from 0 to 2**64 - 1")
    return number


def number_bytes(number: int) -> bytes:
    """Return the 8 bytes that stand for a device in all that is hashed, derived or sent."""
    return number.to_bytes(8, "big")


def bind(purpose: str, fields: Iterable[bytes]) -> bytes:
    """Return bytes that no other purpose and no other fields give."""
    parts = [b"prowd secure aggregation 1", purpose.encode(), *fields]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def derive(secret: bytes, purpose: str, *fields: bytes, length: int = KEY_BYTES) -> bytes:
    """Derive a key from a secret by HKDF-SHA256, for one purpose and what `fields` name.

    Examples
    --------
    >>> derive(bytes(16), "example", b"round 1") == derive(bytes(16), "example", b"round 2")
    False
    """
    return HKDF(SHA256(), length, salt=None, info=bind(purpose, fields)).derive(secret)


def new_seed() -> bytes:
    """Return 16 bytes from the operating system's generator."""
    return secrets.token_bytes(SEED_BYTES)


def private_key(seed: bytes, purpose: str, context: bytes) -> X25519PrivateKey:
    """Return the X25519 key of a seed: who reconstructs the 16 bytes has the key."""
    return X25519PrivateKey.from_private_bytes(derive(seed, f"{purpose} key", context))


def public_bytes(private: X25519PrivateKey) -> bytes:
    """Return the 32 bytes of the public key."""
    return private.public_key().public_bytes_raw()


def check_public_key(key: bytes, name: str) -> None:
    """Reject public keys that would not be a device's own.

    X25519 takes any 32 bytes. Of these, some are other spellings of one key, under which two
    devices could have the same one unseen; and some agree with every key on the same secret, which
    the library refuses when it is too late.

    Raises
    ------
    MessageError
        If it is one of those.
    """
    if int.from_bytes(key, "little") >= _FIELD:
        raise MessageError(f"public key {name!r} is not in its shortest form")
    try:
        agree(_PROBE, key)
    except ValueError:
        raise MessageError(f"public key {name!r} has a low order") from None


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return what both owners of two key pairs can compute, and nobody else."""
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def commit(seed: bytes, context: bytes) -> bytes:
    """Return the commitment to a seed.

    A seed has 128 random bits: its hash hides it.
    """
    return sha256(bind("commitment", [context, seed])).digest()


def seal(
    message: bytes,
    private: X25519PrivateKey,
    sender: int,
    receiver: int,
    public: bytes,
    data: bytes,
) -> bytes:
    """Encrypt and authenticate a message for one receiver, by AES-GCM.

    Parameters
    ----------
    message : bytes
        What only the receiver may read.
    private : X25519PrivateKey
        The sender's sealing key.
    sender, receiver : int
        Their numbers.
    public : bytes
        The receiver's sealing key.
    data : bytes
        What both know and the message is bound to.

    Returns
    -------
    bytes
        `SEALING_BYTES` more than the message.
    """
    pair = number_bytes(sender) + number_bytes(receiver)
    key = derive(agree(private, public), "seal", data, pair, public_bytes(private), public)
    # The key is for one message. The nonce is random nevertheless: a device that is restored from
    # an earlier state and shares again would encrypt two.
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, message, bind("seal", [data, pair]))


def open_sealed(
    sealed: bytes, private: X25519PrivateKey, sender: int, receiver: int, public: bytes, data: bytes
) -> bytes:
    """Decrypt what `seal` wrote; `private` is the receiver's key, `public` the sender's.

    Raises
    ------
    MessageError
        If it was not sealed by this sender for this receiver with this data.
    """
    pair = number_bytes(sender) + number_bytes(receiver)
    key = derive(agree(private, public), "seal", data, pair, public, public_bytes(private))
    nonce, encrypted = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, encrypted, bind("seal", [data, pair]))
    except (InvalidTag, ValueError):
        raise MessageError(
            f"device {sender}: what it sealed for device {receiver} does not open"
        ) from None
