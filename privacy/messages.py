"""What the devices of a group send, as flat bytes; validated on receipt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from privacy.errors import MessageError
from privacy.keys import (
    KEY_BYTES,
    SEALING_BYTES,
    SEED_BYTES,
    bind,
    check_number,
    check_public_key,
    number_bytes,
)
from privacy.shares import DIGESTS_BYTES, KINDS

SEALED_BYTES = 2 * SEED_BYTES + SEALING_BYTES  # both shares of one sender for one receiver
HANDED_BYTES = SEALED_BYTES + DIGESTS_BYTES  # and what they are compared with
_NUMBER_BYTES = 8


@dataclass(frozen=True)
class PublicKeys:
    """What a device advertises in one round.

    Attributes
    ----------
    masking : bytes
        The X25519 key that pairwise masks are agreed with.
    sealing : bytes
        The X25519 key that shares are sealed with.
    commitment : bytes
        The commitment to the seed of the device's own mask.
    """

    masking: bytes
    sealing: bytes
    commitment: bytes

    def to_record(self) -> dict[str, bytes]:
        """Return the bytes by name, as a Flower ConfigRecord takes them."""
        return {"masking": self.masking, "sealing": self.sealing, "commitment": self.commitment}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "PublicKeys":
        """Validate what a device advertises.

        Raises
        ------
        MessageError
            If a name is missing or unknown, or its value is not a key that is safe to use.
        """
        fields = _bytes_fields(record, {"masking", "sealing", "commitment"})
        for name, value in fields.items():
            if len(value) != KEY_BYTES:
                raise MessageError(f"{name!r} has {len(value)} bytes; allowed are {KEY_BYTES}")
        keys = cls(**fields)
        check_public_key(keys.masking, "masking")
        check_public_key(keys.sealing, "sealing")
        if len(set(keys.each())) != 3:
            raise MessageError("two of its keys are the same; each must be another")
        return keys

    def each(self) -> tuple[bytes, bytes, bytes]:
        """Return the three values."""
        return self.masking, self.sealing, self.commitment

    def to_bytes(self) -> bytes:
        """Return the three values as one, for `pack_by_number`."""
        return b"".join(self.each())

    @classmethod
    def from_bytes(cls, data: bytes) -> "PublicKeys":
        """Return the keys that `to_bytes` joined, which have been validated before.

        Raises
        ------
        MessageError
            If the length is not theirs.
        """
        if len(data) != 3 * KEY_BYTES:
            raise MessageError(f"public keys have {len(data)} bytes; allowed are {3 * KEY_BYTES}")
        return cls(*(data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)))


@dataclass(frozen=True)
class Shares:
    """What a device sends for sharing its seeds.

    Attributes
    ----------
    sealed : dict of int to bytes
        Both shares for each peer, which the peer alone can open.
    digests : dict of int to bytes
        The digests of both shares for each member of the group, the device itself included.
    """

    sealed: Mapping[int, bytes] = field(repr=False)
    digests: Mapping[int, bytes] = field(repr=False)

    def handed_to(self, holder: int) -> bytes:
        """Return what one peer is sent of it: its shares, and the digests that they should have."""
        return self.sealed[holder] + self.digests[holder]

    def to_record(self) -> dict[str, bytes]:
        """Return flat bytes by name, as a Flower ConfigRecord takes them."""
        return {"sealed": pack_by_number(self.sealed), "digests": pack_by_number(self.digests)}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Shares":
        """Validate lengths and numbers.

        Raises
        ------
        MessageError
            If `to_record` cannot have written it.
        """
        fields = _bytes_fields(record, {"sealed", "digests"})
        return cls(
            unpack_by_number(fields["sealed"], SEALED_BYTES),
            unpack_by_number(fields["digests"], DIGESTS_BYTES),
        )


@dataclass(frozen=True)
class Complaints:
    """Whose shares a device holds nothing of.

    Attributes
    ----------
    numbers : frozenset of int
        The devices whose sealed shares do not open, or are not those of the digests.
    """

    numbers: frozenset[int]

    def to_record(self) -> dict[str, bytes]:
        """Return flat bytes by name, as a Flower ConfigRecord takes them."""
        return {"unopened": pack_by_number(dict.fromkeys(self.numbers, b""))}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Complaints":
        """Validate lengths and numbers.

        Raises
        ------
        MessageError
            If `to_record` cannot have written it.
        """
        return cls(frozenset(unpack_by_number(_bytes_fields(record, {"unopened"})["unopened"], 0)))


@dataclass(frozen=True)
class Revealed:
    """The shares that a device reveals.

    Attributes
    ----------
    own_masks : dict of int to bytes
        Of devices that answered, its share of the seed of their own mask.
    masking_keys : dict of int to bytes
        Of devices that dropped out, its share of the seed of their masking key.
    """

    own_masks: Mapping[int, bytes] = field(repr=False)
    masking_keys: Mapping[int, bytes] = field(repr=False)

    def of(self, kind: str) -> Mapping[int, bytes]:
        """Return the shares of one of `privacy.shares.KINDS`."""
        return self.own_masks if kind == KINDS[0] else self.masking_keys

    def to_record(self) -> dict[str, bytes]:
        """Return flat bytes by name, as a Flower ConfigRecord takes them."""
        return {
            "own_masks": pack_by_number(self.own_masks),
            "masking_keys": pack_by_number(self.masking_keys),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Revealed":
        """Validate lengths and numbers.

        Raises
        ------
        MessageError
            If `to_record` cannot have written it.
        """
        fields = _bytes_fields(record, {"own_masks", "masking_keys"})
        return cls(
            unpack_by_number(fields["own_masks"], SEED_BYTES),
            unpack_by_number(fields["masking_keys"], SEED_BYTES),
        )


def pack_by_number(values: Mapping[int, bytes]) -> bytes:
    """Join values of one length, each behind the 8 bytes of its number, in ascending order.

    Examples
    --------
    >>> pack_by_number({2: b"b", 1: b"a"}).hex()
    '000000000000000161000000000000000262'
    """
    return b"".join(number_bytes(number) + values[number] for number in sorted(values))


def unpack_by_number(data: bytes, size: int) -> dict[int, bytes]:
    """Return the values that `pack_by_number` joined, in ascending order of their numbers.

    Parameters
    ----------
    data : bytes
        The joined values.
    size : int
        Bytes of one value.

    Raises
    ------
    MessageError
        If the length is not a multiple of ``8 + size``, or numbers do not ascend.

    Examples
    --------
    >>> unpack_by_number(pack_by_number({2: b"b", 1: b"a"}), size=1)
    {1: b'a', 2: b'b'}
    """
    step = _NUMBER_BYTES + size
    if len(data) % step:
        raise MessageError(f"{len(data)} bytes are no entries of {step} bytes each")
    values: dict[int, bytes] = {}
    last = -1
    for start in range(0, len(data), step):
        number = int.from_bytes(data[start : start + _NUMBER_BYTES], "big")
        if number <= last:
            raise MessageError("the numbers of devices must ascend")
        values[number] = data[start + _NUMBER_BYTES : start + step]
        last = number
    return values


def roster_to_bytes(roster: Mapping[int, PublicKeys]) -> bytes:
    """Return the keys of a group as flat bytes, which each of its devices is sent."""
    return pack_by_number({number: keys.to_bytes() for number, keys in roster.items()})


def roster_from_bytes(data: bytes) -> dict[int, PublicKeys]:
    """Validate what `roster_to_bytes` wrote, each device's keys as `PublicKeys.from_record` does.

    Raises
    ------
    MessageError
        If the length or a key is not one of a roster.
    """
    roster = {}
    for number, joined in unpack_by_number(data, 3 * KEY_BYTES).items():
        try:
            roster[number] = PublicKeys.from_record(PublicKeys.from_bytes(joined).to_record())
        except MessageError as error:
            raise MessageError(f"device {number}: {error}") from None
    return roster


def check_roster(roster: Mapping[int, PublicKeys], threshold: int) -> None:
    """Reject a group that would not keep its members' vectors apart.

    Raises
    ------
    MessageError
        If the group has fewer than 2 members, two of them share a key, or the threshold is not
        more than half of them and at most all: two halves could be asked for different seeds.
    """
    if len(roster) < 2:
        raise MessageError(f"a group of {len(roster)}; allowed are 2 or more")
    if type(threshold) is not int or not len(roster) // 2 < threshold <= len(roster):
        allowed = f"{len(roster) // 2 + 1} to {len(roster)}"
        raise MessageError(
            f"threshold {threshold!r} in a group of {len(roster)}; allowed: {allowed}"
        )
    owners: dict[bytes, int] = {}
    for number, keys in roster.items():
        check_number(number)
        for key in keys.each():
            if (other := owners.setdefault(key, number)) != number:
                raise MessageError(f"devices {other} and {number} have one key; each needs its own")


def roster_digest(roster: Mapping[int, PublicKeys], threshold: int, context: bytes) -> bytes:
    """Return what devices agree on if they were told the same group and threshold."""
    packed = roster_to_bytes(roster)
    return sha256(bind("roster", [context, threshold.to_bytes(4, "big"), packed])).digest()


def _bytes_fields(record: Mapping[str, object], names: set[str]) -> dict[str, bytes]:
    allowed = ", ".join(sorted(names))
    if not isinstance(record, Mapping) or set(record) != names:
        raise MessageError(f"the fields of the message are not: {allowed}")
    fields: dict[str, bytes] = {}
    for name in sorted(names):
        value = record[name]
        if not isinstance(value, bytes):
            raise MessageError(f"{name!r} is of type {type(value).__name__}; allowed are bytes")
        fields[name] = value
    return fields
