"""The server's side of a secure aggregation of one group, without input and output of its own.

Masked vectors are added as they arrive: the server holds one sum, however many devices there are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum

import numpy as np

from privacy.complaints import holders_against, out_by_complaints
from privacy.errors import MessageError, NotEnoughError
from privacy.keys import check_number
from privacy.masks import add_masks
from privacy.messages import Complaints, PublicKeys, Shares
from privacy.unmasking import Unmasking
from privacy.words import check_width, packed_size, to_signed, unpack, word_type


class Stage(IntEnum):
    """What the server takes."""

    KEYS = 0
    SHARES = 1
    OPENED = 2
    MASKED = 3
    REVEALED = 4
    DONE = 5


_NAMES = ("keys", "shares", "word on the shares", "masked vector", "revealed shares")


class GroupAggregation:
    """The sum of the vectors of one group of devices in one round.

    The server takes what devices send at each step, in any order, and ends the step by asking for
    what comes next: `roster`, `handed_to`, `without`, `to_reveal`, `total`. A device of which
    nothing valid has come by then is out of the round. A message that raises `MessageError` has
    changed nothing but that its sender is out; of two valid ones the first one counts.

    Parameters
    ----------
    context : bytes
        What names run, round and group, as the devices were told.
    members : collection of int
        The devices that were asked to take part.
    threshold : int
        Devices that must be left, more than half of the members and at least 2.
    widths : sequence of (int, int)
        For each part of the vector, its number of values and the bits m that hold their sum.

    Raises
    ------
    ValueError
        If the threshold or a width is none of these.

    Examples
    --------
    See `privacy.device.Device`.
    """

    def __init__(
        self,
        context: bytes,
        members: Collection[int],
        threshold: int,
        widths: Sequence[tuple[int, int]],
    ) -> None:
        self._members = sorted({check_number(number) for number in members})
        least = max(2, len(self._members) // 2 + 1)
        if not least <= threshold <= len(self._members):
            allowed = f"{least} to {len(self._members)}"
            raise ValueError(
                f"threshold {threshold} for {len(self._members)} devices; allowed: {allowed}"
            )
        self._context, self._threshold = context, threshold
        self._widths = [(int(count), check_width(bits)) for count, bits in widths]
        self._sum = [np.zeros(count, word_type(bits)) for count, bits in self._widths]
        self._total: list[np.ndarray] | None = None
        self._stage = Stage.KEYS
        self._left_out: dict[int, str] = {}
        self._ignored: dict[int, str] = {}
        self._keys: dict[int, PublicKeys] = {}
        self._shares: dict[int, Shares] = {}
        self._complaints: dict[int, frozenset[int]] = {}
        self._joined: set[int] = set()
        self._answered: set[int] = set()
        self._unmasking = Unmasking(
            context, threshold, self._keys, self._shares, self._joined, self._answered
        )

    @property
    def payload_bytes(self) -> int:
        """How many bytes a masked vector has."""
        return sum(packed_size(count, bits) for count, bits in self._widths)

    @property
    def left_out(self) -> dict[int, str]:
        """The devices whose vectors are not in the sum so far, and why."""
        return dict(self._left_out)

    @property
    def ignored(self) -> dict[int, str]:
        """The devices whose revealed shares are not used, and why; their vectors are in the sum."""
        return dict(self._ignored)

    @property
    def spare(self) -> int:
        """How many more devices may fail at this step; below 0, the sum is lost already."""
        if self._stage < Stage.REVEALED:
            return len(self._members) - len(self._left_out) - self._threshold
        return len(self._answered) - len(self._ignored) - self._threshold

    def check(self) -> None:
        """Raise `NotEnoughError` as soon as it is certain that too few devices will be left."""
        if self.spare < 0:
            left, gone = self.spare + self._threshold, {**self._left_out, **self._ignored}
            reasons = "; ".join(f"device {number}: {gone[number]}" for number in sorted(gone)[:3])
            more = f"; and {len(gone) - 3} more" if len(gone) > 3 else ""
            raise NotEnoughError(
                f"{left} of {len(self._members)} devices are left, and the sum can be unmasked "
                f"with {self._threshold} or more ({reasons}{more})"
            )

    def take_keys(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `PublicKeys` record."""
        self._sender(number, Stage.KEYS, self._keys)
        try:
            keys = PublicKeys.from_record(record)
            for other, its in self._keys.items():
                if set(its.each()) & set(keys.each()):
                    raise MessageError(f"has a key of device {other}; each needs its own")
        except MessageError as error:
            raise self._leave_out(number, error) from None
        self._keys[number] = keys

    def roster(self) -> dict[int, PublicKeys]:
        """End the step of keys: return those of the group, which each of its devices is sent."""
        self._end(Stage.KEYS, self._keys)
        return {number: self._keys[number] for number in sorted(self._keys)}

    def take_shares(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `Shares` record."""
        self._sender(number, Stage.SHARES, self._shares)
        try:
            shares = Shares.from_record(record)
            if set(shares.digests) != set(self._keys):
                raise MessageError("digests are not of each device in the group")
            if set(shares.sealed) != set(self._keys) - {number}:
                raise MessageError("sealed shares are not for each of its peers")
        except MessageError as error:
            raise self._leave_out(number, error) from None
        self._shares[number] = shares

    def handed_to(self, number: int) -> dict[int, bytes]:
        """End the step of shares: return those for one device, by sender."""
        self._end(Stage.SHARES, self._shares)
        if number not in self._shares:
            raise ValueError(f"device {number} has not shared: it takes no further part")
        return {n: s.handed_to(number) for n, s in sorted(self._shares.items()) if n != number}

    def take_complaints(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `Complaints` record: whose shares it cannot open."""
        self._sender(number, Stage.OPENED, self._complaints)
        try:
            unopened = Complaints.from_record(record).numbers
            if not unopened <= set(self._shares) - {number}:
                raise MessageError("complains of others than its peers that shared")
            if (opened := len(self._shares) - len(unopened)) < self._threshold:
                raise MessageError(
                    f"holds shares of {opened} devices, as it says; allowed are "
                    f"{self._threshold} or more"
                )
        except MessageError as error:
            raise self._leave_out(number, error) from None
        self._complaints[number] = unopened

    def complaints(self) -> dict[int, list[int]]:
        """Return the devices whose shares others say that they do not hold, and these."""
        return holders_against(self._complaints)

    def without(self) -> list[int]:
        """End the step of complaints: return who shared and takes no part in the masking.

        That is who was silent, and who is out by complaints. None of their secrets is ever asked
        for.
        """
        if self._stage is Stage.OPENED:
            for owner, holders in out_by_complaints(self._complaints, self._threshold).items():
                named = ", ".join(map(str, holders))
                self._left_out[owner] = f"its shares do not open, as said by {named}"
        self._end(Stage.OPENED, self._complaints)
        self._joined.update(self._complaints.keys() - self._left_out.keys())
        return sorted(self._shares.keys() - self._joined)

    def take_masked(self, number: int, payload: object) -> None:
        """Take a device's masked vector and add it to the sum."""
        self._sender(number, Stage.MASKED, self._answered)
        try:
            if not isinstance(payload, bytes):
                raise MessageError("masked vector is no bytes")
            if len(payload) != self.payload_bytes:
                raise MessageError(
                    f"masked vector has {len(payload)} bytes; allowed are {self.payload_bytes}"
                )
            parts = list(self._unpacked(memoryview(payload)))
        except MessageError as error:
            raise self._leave_out(number, error) from None
        for so_far, words in zip(self._sum, parts, strict=True):
            so_far += words
        self._answered.add(number)

    def to_reveal(self) -> tuple[list[int], list[int]]:
        """End the step of masked vectors: return the devices that answered, and that dropped out.

        The former are asked to reveal their shares of both.
        """
        self._end(Stage.MASKED, self._answered)
        return sorted(self._answered), self._unmasking.dropped

    def take_revealed(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `Revealed` record; if it is rejected, the device stays in the sum."""
        self._sender(number, Stage.REVEALED, self._unmasking.revealed)
        try:
            self._unmasking.take(number, record)
        except MessageError as error:
            self._ignored[number] = str(error)
            raise MessageError(f"device {number}: {error}") from None

    def total(self) -> list[np.ndarray]:
        """Unmask the sum over the devices that answered.

        Returns
        -------
        list of ndarray
            The parts, as signed int64.

        Raises
        ------
        NotEnoughError
            If fewer devices than the threshold revealed their shares.
        UnmaskingError
            If one device's shares do not give back the seed that it committed to.
        """
        if self._total is None:
            if self._stage is Stage.REVEALED:
                silent = self._answered - set(self._unmasking.revealed) - set(self._ignored)
                for number in silent:
                    self._ignored[number] = "sent no revealed shares"
            self._end(Stage.REVEALED, self._unmasking.revealed)
            add_masks(self._sum, self._unmasking.masks())
            self._total = [
                to_signed(words, bits)
                for words, (_, bits) in zip(self._sum, self._widths, strict=True)
            ]
            self._sum = []
        return self._total

    def _sender(self, number: int, stage: Stage, taken: Collection[int]) -> None:
        """Reject a message of somebody who may not send it now."""
        what = _NAMES[stage]
        if number not in self._members:
            raise MessageError(f"device {number!r}: {what} of a device that is not in the group")
        if number in self._left_out:
            raise MessageError(f"device {number}: out of the round: {self._left_out[number]}")
        if number in self._ignored:
            raise MessageError(f"device {number}: rejected before: {self._ignored[number]}")
        if self._stage is not stage:
            when = "too late" if self._stage > stage else "too early"
            raise MessageError(f"device {number}: {what} came {when}")
        if number in taken:
            raise MessageError(f"device {number}: {what} came again; the first one counts")

    def _leave_out(self, number: int, error: MessageError) -> MessageError:
        self._left_out[number] = str(error)
        return MessageError(f"device {number}: {error}")

    def _end(self, stage: Stage, taken: Collection[int]) -> None:
        """End a step, unless it has ended: who has not sent anything is out."""
        if self._stage < stage:
            raise RuntimeError(f"{_NAMES[stage]} are not asked for yet")
        if self._stage is stage:
            if stage < Stage.REVEALED:
                for number in self._members:
                    if number not in taken and number not in self._left_out:
                        self._left_out[number] = f"sent no {_NAMES[stage]}"
            self.check()
            self._stage = Stage(stage + 1)

    def _unpacked(self, payload: memoryview) -> Iterator[np.ndarray]:
        start = 0
        for count, bits in self._widths:
            end = start + packed_size(count, bits)
            yield unpack(payload[start:end], bits, count)
            start = end
