"""Who holds which partition: of the nodes that declared themselves, one each, under one number."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from logging import WARNING

from flwr.common.logger import log

from core.errors import FederationError, SettingsError
from exchange.protocol import Declaration, plain
from quant import ALLOWED_WIDTHS, is_width

# A node that has data of its own declares no more: its number travels, and is added up.
MOST_EXAMPLES = 10**9


class Seats:
    """The partitions of a run, and the nodes that hold them or are refused.

    Parameters
    ----------
    most_examples, examples_of
        As of `exchange.nodes.Nodes`.

    Attributes
    ----------
    refused : dict of int to str
        Nodes that cannot take part, with the reason.
    """

    def __init__(
        self, most_examples: int, examples_of: Callable[[int, int], int | None] | None
    ) -> None:
        self._most_examples = most_examples
        self._examples_of = examples_of
        # In the order in which they came.
        self._declared: dict[int, Declaration] = {}
        self.refused: dict[int, str] = {}
        self._refused_parts: dict[int, int] = {}
        # Of nodes that have data of their own.
        self._numbers: dict[int, int] = {}
        # Once a gathering has settled it.
        self._own_data: bool | None = None
        self._before = 0
        self._parts = 0

    def expect(self, num_partitions: int) -> None:
        """Believe the nodes that declare so many partitions, as the run did before its resume."""
        self._before = num_partitions

    def heard(self) -> set[int]:
        """Return the nodes that need not be asked again."""
        return self._declared.keys() | self.refused.keys()

    def declare(self, node_id: int, declaration: Declaration) -> None:
        """Take a node's declaration, or refuse it."""
        reason = declaration.refused or self._objection(declaration)
        if reason:
            self._refused_parts[node_id] = declaration.num_partitions
            self.refuse(node_id, reason)
        else:
            self._declared[node_id] = declaration

    def refuse(self, node_id: int, reason: str) -> None:
        """Note why a node cannot take part, and say it."""
        reason = self.refused[node_id] = plain(reason)
        log(WARNING, "Node %d is refused: %s", node_id, reason)

    def forget_all_but(self, unchanged: set[int]) -> None:
        """Forget what nodes said that have gone, or come back."""
        for kept in (self._declared, self.refused, self._refused_parts):
            for node_id in kept.keys() - unchanged:
                del kept[node_id]

    @property
    def num_partitions(self) -> int:
        """Partitions of the data; 0 while no number has the most declarations, and without any."""
        if self._parts:
            return self._parts
        votes = self._votes()
        if self._before in votes:
            return self._before
        leading = _leading(votes)
        # Nodes that are refused need not agree.
        return 0 if self._declared and len(leading) > 1 else max(leading, default=0)

    @property
    def are_of_own_data(self) -> bool:
        """Whether nodes have data of their own: as most of the first gathering, and then always."""
        if self._own_data is not None:
            return self._own_data
        own = sum(map(_has_own_data, self._declared.values()))
        return own > len(self._declared) - own

    def settle(self) -> None:
        """Keep to what the first gathering found: data of the nodes' own, or partitions."""
        self._own_data = self.are_of_own_data

    def taken(self) -> dict[int, Declaration]:
        """Give each partition to the first of the connected nodes that declared it.

        Nodes that have data of their own get a number instead, and are alone.
        """
        expected = self.num_partitions
        if self.are_of_own_data:
            own = sorted(n for n, d in self._declared.items() if _has_own_data(d))
            return {n: replace(self._declared[n], partition_id=self._number_of(n)) for n in own}
        holders: dict[int, int] = {}
        for node_id, declaration in self._declared.items():
            if declaration.num_partitions == expected and not _has_own_data(declaration):
                holders.setdefault(declaration.partition_id, node_id)
        return {node_id: self._declared[node_id] for node_id in sorted(holders.values())}

    def taken_and_fit(self) -> dict[int, Declaration]:
        """Return the same, without nodes that contradict the partition.

        Such a node is refused, and the next of its partition is seated.
        """
        present = self.taken()
        while unfit := {n: reason for n, d in present.items() if (reason := self._misfit(d))}:
            for node_id, reason in unfit.items():
                self._refused_parts[node_id] = self._declared.pop(node_id).num_partitions
                self.refuse(node_id, reason)
            present = self.taken()
        return present

    def are_settled(self, present: int, unanswered: int) -> bool:
        """Return whether no more nodes are waited for.

        Parameters
        ----------
        present : int
            Seated nodes.
        unanswered : int
            Nodes that are still to declare themselves.
        """
        expected = self.num_partitions
        if self._before and expected != self._before:
            # Those of the resumed run may still come.
            return False
        heard = present
        if not unanswered:
            # A refused node may stand where another is still to answer.
            heard = len(self.heard())
        elif expected not in (self._parts, self._before):
            votes = self._votes()
            others = max((n for parts, n in votes.items() if parts != expected), default=0)
            if votes[expected] <= others + unanswered:
                # Nodes that are still to answer may declare another number.
                return False
        return 0 < expected <= heard

    def end_gathering(self, present: dict[int, Declaration]) -> None:
        """Fix the number of partitions, and refuse the nodes that have no seat.

        Raises
        ------
        FederationError
            If no number of partitions has the most declarations.
        """
        self._refuse_tie()
        if present and not self._parts:
            self._parts = self.num_partitions
        self._refuse_unseated(present)

    def _votes(self) -> Counter[int]:
        """Nodes by the number of partitions that they declare."""
        if self.are_of_own_data:
            return Counter()
        all_declared = self._declared.values()
        declared = Counter(d.num_partitions for d in all_declared if not _has_own_data(d))
        # Refused nodes count only where there are no others.
        return declared or Counter(parts for parts in self._refused_parts.values() if parts)

    def _objection(self, new: Declaration) -> str:
        if not is_width(new.bits):
            return f"it declares {new.bits} bits; allowed: {ALLOWED_WIDTHS}"
        if not _has_own_data(new) and not 0 <= new.partition_id < new.num_partitions:
            return f"it declares partition {new.partition_id} of {new.num_partitions}"
        most = MOST_EXAMPLES if _has_own_data(new) else self._most_examples
        if not 1 <= new.num_examples <= most:
            return f"it declares {new.num_examples} examples; allowed: 1 to {most}"
        return ""

    def _number_of(self, node_id: int) -> int:
        """Return the number of a node that has data of its own, for as long as the run lasts."""
        return self._numbers.setdefault(node_id, len(self._numbers))

    def _misfit(self, declared: Declaration) -> str:
        """Return what of a declaration contradicts the partition; empty if nothing does."""
        if self._examples_of is None:
            return ""
        partition, parts = declared.partition_id, declared.num_partitions
        if not parts:
            return ""
        try:
            most = self._examples_of(partition, parts)
        except SettingsError as error:
            return str(error)
        claim = f"it declares {declared.num_examples} examples"
        too_many = most is not None and declared.num_examples > most
        return f"{claim}; partition {partition} of {parts} has {most}" if too_many else ""

    def _refuse_tie(self) -> None:
        """End the run where as many nodes declare one number of partitions as another."""
        if self._votes() and not self.num_partitions:
            votes = self._votes()
            leading = _leading(votes)
            raise FederationError(
                f"num-partitions: as many nodes declare {' as '.join(map(str, leading))} "
                f"({votes[leading[0]]} each); every --node-config must hold the same"
            )

    def _refuse_unseated(self, present: dict[int, Declaration]) -> None:
        """Say once why a node whose declaration is good is not among those present."""
        expected = self.num_partitions
        holders = {d.partition_id: node_id for node_id, d in present.items()}
        own = self.are_of_own_data
        for node_id, declaration in self._declared.items():
            parts, partition = declaration.num_partitions, declaration.partition_id
            if node_id in present:
                self.refused.pop(node_id, None)
            elif node_id in self.refused:
                continue
            elif _has_own_data(declaration):
                others = "the others hold partitions"
                self.refuse(node_id, f"it has data of its own (data-path); {others}")
            elif own:
                others = "the others have data of their own (data-path)"
                self.refuse(node_id, f"it declares partition {partition} of {parts}; {others}")
            elif parts != expected:
                self.refuse(node_id, f"it declares {parts} partitions, the others {expected}")
            else:
                holder = holders[partition]
                self.refuse(node_id, f"partition {partition} is held by node {holder}")


def _has_own_data(declaration: Declaration) -> bool:
    return (declaration.partition_id, declaration.num_partitions) == (-1, 0)


def _leading(votes: Counter[int]) -> list[int]:
    """Return the numbers that have the most votes, in order."""
    most = max(votes.values(), default=0)
    return sorted(number for number, count in votes.items() if count == most)
