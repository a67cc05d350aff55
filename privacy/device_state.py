"""What a device knows between two messages, as bytes."""

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256

from privacy.errors import MessageError
from privacy.keys import SEED_BYTES
from privacy.messages import PublicKeys

_HEAD = struct.Struct(">BQII16s16s16sI")
_MEMBER = struct.Struct(">Q96sB32s")
_CHECKSUM_BYTES = 16


class Step(IntEnum):
    """How far a device is."""

    BEGUN = 0
    SHARED = 1
    RECEIVED = 2
    MASKED = 3
    REVEALED = 4


@dataclass(frozen=True, repr=False)
class Seeds:
    """What all of a device's secrets in a round come from, 16 bytes each."""

    own_mask: bytes
    masking: bytes
    sealing: bytes


@dataclass
class Member:
    """What a device knows of one member of its group.

    Attributes
    ----------
    keys : PublicKeys
        What it advertised.
    shared : bool
        Whether it takes part in the masking.
    both_shares : bytes or None
        The device's shares of its own mask's seed and of its masking key's; None: unopened.
    asked : int
        At the last step: 1 as one that answered, 2 as one that dropped out.
    """

    keys: PublicKeys
    shared: bool = False
    both_shares: bytes | None = field(default=None, repr=False)
    asked: int = 0


@dataclass
class State:
    """All that a device knows."""

    context: bytes
    seeds: Seeds
    step: Step = Step.BEGUN
    number: int = 0
    threshold: int = 0
    members: dict[int, Member] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the state with a checksum."""
        numbers = self.step, self.number, self.threshold, len(self.members)
        seeds = self.seeds.own_mask, self.seeds.masking, self.seeds.sealing
        state = _HEAD.pack(*numbers, *seeds, len(self.context)) + self.context
        for number, member in self.members.items():
            flags = member.shared | (member.both_shares is not None) << 1 | member.asked << 2
            both = member.both_shares or bytes(2 * SEED_BYTES)
            state += _MEMBER.pack(number, member.keys.to_bytes(), flags, both)
        return state + sha256(state).digest()[:_CHECKSUM_BYTES]

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """Return the state that `to_bytes` wrote.

        Raises
        ------
        MessageError
            If the bytes are not those.
        """
        packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if len(packed) < _HEAD.size or sha256(packed).digest()[:_CHECKSUM_BYTES] != checksum:
            raise MessageError("the state of a device is damaged")
        step, number, threshold, count, own, masking, sealing, length = _HEAD.unpack_from(packed)
        end = _HEAD.size + length
        seeds = Seeds(own, masking, sealing)
        state = cls(packed[_HEAD.size : end], seeds, Step(step), number, threshold)
        for index in range(count):
            peer, keys, flags, both = _MEMBER.unpack_from(packed, end + index * _MEMBER.size)
            state.members[peer] = Member(
                PublicKeys.from_bytes(keys),
                shared=bool(flags & 1),
                both_shares=both if flags & 2 else None,
                asked=flags >> 2,
            )
        return state
