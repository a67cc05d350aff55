"""A device's side of a secure aggregation: five answers, no input and output of its own.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017,
for a server that is honest but curious, and devices that may drop out after any step.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from privacy import shares as shamir
from privacy.device_state import Member, Seeds, State, Step
from privacy.errors import MessageError
from privacy.keys import (
    SEED_BYTES,
    check_number,
    commit,
    new_seed,
    open_sealed,
    private_key,
    public_bytes,
    seal,
)
from privacy.masks import Mask, add_masks, own_mask, pairwise_mask
from privacy.messages import (
    HANDED_BYTES,
    SEALED_BYTES,
    PublicKeys,
    Revealed,
    Shares,
    check_roster,
    roster_digest,
)
from privacy.words import pack, to_words

Parts = Sequence[tuple[np.ndarray, int]]
"""What is summed: arrays of signed integers, and for each the bits m that hold its sum."""


class Device:
    """One device's secrets in one round and group.

    Its methods are called once each, in the order in which they stand here. `to_bytes` keeps it
    between two messages; no state is to be used again after a later step has been taken from it.

    Examples
    --------
    The whole protocol, with the messages handed over directly::

        devices = {number: Device.begin(context) for number in (1, 2, 3)}
        server = GroupAggregation(context, devices, threshold=2, widths=[(4, 9)])
        for number, device in devices.items():
            server.take_keys(number, device.public_keys().to_record())
        roster = server.roster()
        for number, device in devices.items():
            server.take_shares(number, device.share(number, roster, 2).to_record())
        for number, device in devices.items():
            unopened = device.receive(server.handed_to(number))
            server.take_complaints(number, Complaints(frozenset(unopened)).to_record())
        without = server.without()
        for number, device in devices.items():
            server.take_masked(number, device.mask([(np.array([1, 2, 3, -4]), 9)], without))
        answered, dropped = server.to_reveal()
        for number in answered:
            revealed = devices[number].reveal(answered, dropped)
            server.take_revealed(number, revealed.to_record())
        server.total()  # [array([ 3, 6, 9, -12])]
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._masking = private_key(state.seeds.masking, "masking", state.context)
        self._sealing = private_key(state.seeds.sealing, "sealing", state.context)

    def __repr__(self) -> str:
        return f"Device(step={self._state.step.name!r})"

    @classmethod
    def begin(cls, context: bytes) -> "Device":
        """Begin a round with fresh secrets.

        Parameters
        ----------
        context : bytes
            What names run, round and group: every key, share and mask is bound to it.
        """
        return cls(State(context, Seeds(new_seed(), new_seed(), new_seed())))

    def public_keys(self) -> PublicKeys:
        """Return what the device advertises."""
        return PublicKeys(
            public_bytes(self._masking),
            public_bytes(self._sealing),
            commit(self._state.seeds.own_mask, self._state.context),
        )

    def share(self, number: int, roster: Mapping[int, PublicKeys], threshold: int) -> Shares:
        """Share both seeds with the group.

        Parameters
        ----------
        number : int
            The device's own.
        roster : mapping of int to PublicKeys
            The group's keys by number, the device's own included.
        threshold : int
            Shares that give a seed back, more than half of the group.

        Raises
        ------
        MessageError
            If the device's keys are not in the roster as it advertised them, or the group is not
            one of `privacy.messages.check_roster`.
        """
        self._expect(Step.BEGUN)
        check_number(number)
        check_roster(roster, threshold)
        if roster.get(number) != self.public_keys():
            raise MessageError(f"device {number}: the roster does not hold the keys it advertised")
        ordered, context = sorted(roster), self._state.context
        own = shamir.split(self._state.seeds.own_mask, threshold, len(ordered))
        masking = shamir.split(self._state.seeds.masking, threshold, len(ordered))
        bound_to = roster_digest(roster, threshold, context)
        members = {peer: Member(roster[peer]) for peer in ordered}
        sealed, digests = {}, {}
        for holder, *both in zip(ordered, own, masking, strict=True):
            joined = b"".join(both)
            digests[holder] = shamir.digests(joined, context, number, holder)
            if holder == number:
                members[number] = Member(roster[number], shared=True, both_shares=joined)
                continue
            public = roster[holder].sealing
            sealed[holder] = seal(joined, self._sealing, number, holder, public, bound_to)
        state = self._state
        state.number, state.threshold, state.members = number, threshold, members
        state.step = Step.SHARED
        return Shares(sealed, digests)

    def receive(self, handed: Mapping[int, bytes]) -> dict[int, str]:
        """Take the shares of the peers that shared; with some of these alone the device will mask.

        Parameters
        ----------
        handed : mapping of int to bytes
            By sender (`privacy.messages.Shares.handed_to`).

        Returns
        -------
        dict of int to str
            The senders whose shares do not open or are not those of their digests, and the reason:
            what the device complains of. It has none of their shares to reveal.

        Raises
        ------
        MessageError
            If a sender is not of the group, or the device would hold shares of fewer devices than
            the threshold.
        """
        self._expect(Step.SHARED)
        state = self._state
        if strangers := [n for n in handed if n not in state.members or n == state.number]:
            raise MessageError(f"shares of device {strangers[0]!r}, which is no peer in this group")
        roster = {number: member.keys for number, member in state.members.items()}
        bound_to = roster_digest(roster, state.threshold, state.context)
        opened, unopened = {}, {}
        for sender, message in handed.items():
            try:
                opened[sender] = self._open(sender, message, roster[sender].sealing, bound_to)
            except MessageError as error:
                unopened[sender] = str(error)
        if len(opened) + 1 < state.threshold:
            some = f"; those of {sorted(unopened)} do not open" if unopened else ""
            allowed = f"allowed are {state.threshold} or more"
            raise MessageError(f"shares of {len(opened) + 1} devices{some}; {allowed}")
        for sender in handed:
            state.members[sender].shared = True
            state.members[sender].both_shares = opened.get(sender)
        state.step = Step.RECEIVED
        return unopened

    def _open(self, sender: int, message: object, public: bytes, bound_to: bytes) -> bytes:
        if not isinstance(message, bytes) or len(message) != HANDED_BYTES:
            raise MessageError(f"device {sender}: its sealed shares are not {SEALED_BYTES} bytes")
        sealed, announced = message[:SEALED_BYTES], message[SEALED_BYTES:]
        number, context = self._state.number, self._state.context
        both = open_sealed(sealed, self._sealing, sender, number, public, bound_to)
        if shamir.digests(both, context, sender, number) != announced:
            raise MessageError(f"device {sender}: its shares do not match the digests it sent")
        return both

    def mask(self, vector: Parts, without: Collection[int] = ()) -> bytes:
        """Return a vector under its masks, each part packed to its m bits.

        Parameters
        ----------
        vector : sequence of (ndarray, int)
            Arrays of signed integers, each with the m bits that hold the sum over the group.
        without : collection of int
            Devices that shared and send no vector, by complaints or as they were silent since: no
            mask is shared with them, and nothing of theirs is revealed.

        Raises
        ------
        MessageError
            If the device is among them, one has not shared, or fewer than the threshold are left.
        ValueError
            If a value does not fit its m bits, or m is not 1 to 62.
        """
        self._expect(Step.RECEIVED)
        members = self._state.members
        left = {n for n, member in members.items() if member.shared} - set(without)
        if self._state.number not in left or any(
            n not in members or not members[n].shared for n in without
        ):
            raise MessageError("asked to mask without itself, or without one that has not shared")
        if len(left) < self._state.threshold:
            allowed = f"allowed are {self._state.threshold} or more"
            raise MessageError(f"asked to mask in a group of {len(left)}; {allowed}")
        parts = [to_words(values, bits) for values, bits in vector]
        # From here on there is no second time: two vectors under one mask show their difference.
        self._state.step = Step.MASKED
        for number in without:
            members[number].shared = False
        add_masks(parts, self._masks())
        return b"".join(pack(words, bits) for words, (_, bits) in zip(parts, vector, strict=True))

    def reveal(self, answered: Collection[int], dropped: Collection[int]) -> Revealed:
        """Reveal the shares by which the server unmasks the sum, and the sum only.

        Of a device, its share of one seed or of the other is revealed, never both: with both, the
        server would see that device's vector.

        Parameters
        ----------
        answered : collection of int
            Devices whose masked vectors arrived: of these, shares of their own mask's seed.
        dropped : collection of int
            Devices that shared and did not answer: of these, shares of their masking key's seed.

        Raises
        ------
        MessageError
            If the lists overlap, are not together the devices that mask, hold fewer that
            answered than the threshold, or differ from those of an earlier call.
        """
        if self._state.step is not Step.REVEALED:
            self._expect(Step.MASKED)
        one, other = set(answered), set(dropped)
        if len(one) != len(answered) or len(other) != len(dropped) or one & other:
            raise MessageError("asked for both seeds of one device; allowed is one of them")
        if one | other != {n for n, member in self._state.members.items() if member.shared}:
            raise MessageError("asked for other devices than those that shared")
        if self._state.number not in one:
            raise MessageError(
                f"device {self._state.number}: asked for its key, though it answered"
            )
        if len(one) < self._state.threshold:
            raise MessageError(f"{len(one)} answered; allowed are {self._state.threshold} or more")
        for number, member in self._state.members.items():
            kind = 1 if number in one else 2 if number in other else 0
            if member.asked not in (0, kind):
                raise MessageError("asked again for other seeds than before")
        for number in self._state.members:
            self._state.members[number].asked = 1 if number in one else 2 if number in other else 0
        self._state.step = Step.REVEALED
        held = {n: member.both_shares for n, member in self._state.members.items()}
        return Revealed(
            {n: both[:SEED_BYTES] for n in one if (both := held[n])},
            {n: both[SEED_BYTES:] for n in other if (both := held[n])},
        )

    def to_bytes(self) -> bytes:
        """Return all that the device knows, its secrets included: it must not leave the device."""
        return self._state.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Device":
        """Return the device that `to_bytes` wrote.

        Raises
        ------
        MessageError
            If the bytes are not those.
        """
        return cls(State.from_bytes(data))

    def _expect(self, step: Step) -> None:
        if self._state.step is not step:
            now, wanted = self._state.step.name.lower(), step.name.lower()
            raise MessageError(f"the device has {now} where it must have {wanted}; out of order")

    def _masks(self) -> list[Mask]:
        masks = [(own_mask(self._state.seeds.own_mask, self._state.context), 1)]
        for peer, member in self._state.members.items():
            if member.shared and peer != self._state.number:
                public = member.keys.masking
                masks.append(
                    pairwise_mask(
                        self._masking, self._state.number, peer, public, self._state.context
                    )
                )
        return masks
