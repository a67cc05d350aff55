"""The server's side of a secure aggregation of one group, without input and output of its own.

Masked vectors are added as they arrive: the server holds one sum, however many devices there are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum

import numpy as np

from privacy.errors import MessageError, NotEnoughError, UnmaskingError
from privacy.keys import check_number, commit, private_key, public_bytes
from privacy.masks import Mask, add_masks, own_mask, pairwise_mask
from privacy.messages import PublicKeys, Revealed, Shares
from privacy.shares import DIGEST_BYTES, KINDS, digest, reconstruct_all
from privacy.words import check_width, packed_size, to_signed, unpack, word_type


class Stage(IntEnum):
    """What the server takes."""

    KEYS = 0
    SHARES = 1
    MASKED = 2
    REVEALED = 3
    DONE = 4


_NAMES = ("keys", "shares", "masked vector", "revealed shares")


class GroupAggregation:
    """The sum of the vectors of one group of devices in one round.

    The server takes what devices send at each step, in any order, and ends the step by asking for
    what comes next: `roster`, `sealed_for`, `to_reveal`, `total`. A device of which nothing valid
    has come by then is out of the round. A message that raises `MessageError` has changed nothing
    but that its sender is out; of two valid ones the first one counts.

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
        self._answered: set[int] = set()
        self._revealed: dict[int, Revealed] = {}
        # The roster in ascending order: where a member stands is the point of its shares.
        self._points: dict[int, int] = {}

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
        self._points = {number: point for point, number in enumerate(sorted(self._keys), 1)}
        return {number: self._keys[number] for number in self._points}

    def take_shares(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `Shares` record."""
        self._sender(number, Stage.SHARES, self._shares)
        try:
            shares = Shares.from_record(record)
            if set(shares.digests) != set(self._points):
                raise MessageError("digests are not of each device in the group")
            if set(shares.sealed) != set(self._points) - {number}:
                raise MessageError("sealed shares are not for each of its peers")
        except MessageError as error:
            raise self._leave_out(number, error) from None
        self._shares[number] = shares

    def sealed_for(self, number: int) -> dict[int, bytes]:
        """End the step of shares: return those for one device, by sender."""
        self._end(Stage.SHARES, self._shares)
        if number not in self._shares:
            raise ValueError(f"device {number} has not shared: it takes no further part")
        return {n: s.sealed[number] for n, s in sorted(self._shares.items()) if n != number}

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
        return sorted(self._answered), sorted(set(self._shares) - self._answered)

    def take_revealed(self, number: int, record: Mapping[str, object]) -> None:
        """Take a device's `Revealed` record; if it is rejected, the device stays in the sum."""
        self._sender(number, Stage.REVEALED, self._revealed)
        try:
            revealed = Revealed.from_record(record)
            if not set(revealed.own_masks) <= self._answered:
                raise MessageError("reveals own masks of other devices than those that answered")
            if not set(revealed.masking_keys) <= set(self._shares) - self._answered:
                raise MessageError("reveals masking keys of other devices than those that dropped")
            if not self._is_right(KINDS[0], number, number, revealed):
                raise MessageError("its share of its own seed does not match the digest it sent")
        except MessageError as error:
            self._ignored[number] = str(error)
            raise MessageError(f"device {number}: {error}") from None
        self._revealed[number] = revealed

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
                for number in self._answered - set(self._revealed) - set(self._ignored):
                    self._ignored[number] = "sent no revealed shares"
            self._end(Stage.REVEALED, self._revealed)
            own, masking = KINDS
            self_seeds = self._seeds(own, self._answered)
            masking_seeds = self._seeds(masking, set(self._shares) - self._answered)
            add_masks(self._sum, self._masks(self_seeds, masking_seeds))
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

    def _seeds(self, kind: str, owners: Collection[int]) -> dict[int, bytes]:
        """Reconstruct one kind of seed and compare it with what its device published."""
        chosen = {owner: self._right_shares(kind, owner) for owner in sorted(owners)}
        for owner, shares in chosen.items():
            if len(shares) < self._threshold:
                raise UnmaskingError(
                    owner,
                    f"{len(shares)} of its revealed shares match the digests it sent; "
                    f"{self._threshold} are needed",
                )
        seeds = reconstruct_all(chosen)
        for owner, seed in seeds.items():
            keys = self._keys[owner]
            if kind == KINDS[0]:
                right = commit(seed, self._context) == keys.commitment
            else:
                private = private_key(seed, "masking", self._context)
                right = public_bytes(private) == keys.masking
            if not right:
                raise UnmaskingError(
                    owner, f"its shares of the {kind}'s seed do not give what it advertised"
                )
        return seeds

    def _right_shares(self, kind: str, owner: int) -> dict[int, bytes]:
        """Return as many shares as are needed, by point, that match the digests of their owner."""
        right: dict[int, bytes] = {}
        for holder in sorted(self._revealed):
            if self._is_right(kind, owner, holder, self._revealed[holder]):
                right[self._points[holder]] = self._revealed[holder].of(kind)[owner]
            if len(right) == self._threshold:
                break
        return right

    def _is_right(self, kind: str, owner: int, holder: int, revealed: Revealed) -> bool:
        start = KINDS.index(kind) * DIGEST_BYTES
        expected = self._shares[owner].digests[holder][start : start + DIGEST_BYTES]
        share = revealed.of(kind).get(owner)
        return share is not None and expected == digest(share, kind, self._context, owner, holder)

    def _masks(
        self, self_seeds: Mapping[int, bytes], masking_seeds: Mapping[int, bytes]
    ) -> Iterator[Mask]:
        """Yield the masks that are left in the sum, each with the sign that takes it away."""
        for seed in self_seeds.values():
            yield own_mask(seed, self._context), -1
        for dropped, seed in masking_seeds.items():
            private = private_key(seed, "masking", self._context)
            for peer in sorted(self._answered):
                # What the one that dropped out would have added is what its peer took away.
                yield pairwise_mask(private, dropped, peer, self._keys[peer].masking, self._context)
