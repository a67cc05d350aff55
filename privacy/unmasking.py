"""Which masks are left in a sum, from the shares that devices revealed."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from privacy.errors import MessageError, UnmaskingError
from privacy.keys import commit, private_key, public_bytes
from privacy.masks import Mask, own_mask, pairwise_mask
from privacy.messages import PublicKeys, Revealed, Shares
from privacy.shares import DIGEST_BYTES, KINDS, digest, reconstruct_all


@dataclass
class Unmasking:
    """The last step of a group, on the server.

    Attributes
    ----------
    context : bytes
        Run, round and group.
    threshold : int
        Shares that give a seed back.
    keys : mapping of int to PublicKeys
        The roster.
    shares : mapping of int to Shares
        What each device that shared sent.
    joined : collection of int
        The devices that were to mask their vectors.
    answered : collection of int
        The devices whose masked vectors are in the sum.
    revealed : dict of int to Revealed
        What was taken so far, by the device that revealed it.
    """

    context: bytes
    threshold: int
    keys: Mapping[int, PublicKeys]
    shares: Mapping[int, Shares] = field(repr=False)
    joined: Collection[int]
    answered: Collection[int]
    revealed: dict[int, Revealed] = field(default_factory=dict)

    @property
    def dropped(self) -> list[int]:
        """The devices that were to mask and did not answer."""
        return sorted(set(self.joined) - set(self.answered))

    def take(self, number: int, record: Mapping[str, object]) -> None:
        """Take what one device reveals.

        Raises
        ------
        MessageError
            If it reveals what it was not asked for, or a share of its own seed that is not the one
            whose digest it sent. A wrong share of another device may be that one's fault.
        """
        revealed = Revealed.from_record(record)
        if not set(revealed.own_masks) <= set(self.answered):
            raise MessageError("reveals own masks of other devices than those that answered")
        if not set(revealed.masking_keys) <= set(self.dropped):
            raise MessageError("reveals masking keys of other devices than those that dropped")
        if not self._is_right(KINDS[0], number, number, revealed):
            raise MessageError("its share of its own seed does not match the digest it sent")
        self.revealed[number] = revealed

    def masks(self) -> Iterator[Mask]:
        """Return the masks that are left in the sum, each with the sign that takes it away.

        Raises
        ------
        UnmaskingError
            If the shares of one device do not give back what it advertised.
        """
        own, masking = KINDS
        return self._masks(self._seeds(own, self.answered), self._seeds(masking, self.dropped))

    def _masks(
        self, self_seeds: Mapping[int, bytes], masking_seeds: Mapping[int, bytes]
    ) -> Iterator[Mask]:
        for seed in self_seeds.values():
            yield own_mask(seed, self.context), -1
        for dropped, seed in masking_seeds.items():
            private = private_key(seed, "masking", self.context)
            for peer in sorted(self.answered):
                # What the one that dropped out would have added is what its peer took away.
                yield pairwise_mask(private, dropped, peer, self.keys[peer].masking, self.context)

    def _seeds(self, kind: str, owners: Collection[int]) -> dict[int, bytes]:
        """Reconstruct one kind of seed and compare it with what its device published."""
        chosen = {owner: self._right_shares(kind, owner) for owner in sorted(owners)}
        for owner, shares in chosen.items():
            if len(shares) < self.threshold:
                raise UnmaskingError(
                    owner,
                    f"{len(shares)} of its revealed shares match the digests it sent; "
                    f"{self.threshold} are needed",
                )
        seeds = reconstruct_all(chosen)
        for owner, seed in seeds.items():
            if not self._is_advertised(kind, owner, seed):
                reason = f"its shares of the {kind}'s seed do not give what it advertised"
                raise UnmaskingError(owner, reason)
        return seeds

    def _is_advertised(self, kind: str, owner: int, seed: bytes) -> bool:
        if kind == KINDS[0]:
            return commit(seed, self.context) == self.keys[owner].commitment
        private = private_key(seed, "masking", self.context)
        return public_bytes(private) == self.keys[owner].masking

    def _right_shares(self, kind: str, owner: int) -> dict[int, bytes]:
        """Return as many shares as are needed, by point, that match the digests of their owner."""
        right: dict[int, bytes] = {}
        # Where a member stands in the roster, counted from 1, is the point of its shares.
        for point, holder in enumerate(sorted(self.keys), 1):
            revealed = self.revealed.get(holder)
            if revealed and self._is_right(kind, owner, holder, revealed):
                right[point] = revealed.of(kind)[owner]
            if len(right) == self.threshold:
                break
        return right

    def _is_right(self, kind: str, owner: int, holder: int, revealed: Revealed) -> bool:
        start = KINDS.index(kind) * DIGEST_BYTES
        expected = self.shares[owner].digests[holder][start : start + DIGEST_BYTES]
        share = revealed.of(kind).get(owner)
        return share is not None and expected == digest(share, kind, self.context, owner, holder)
