"""The nodes of a federation: asked once what they are, then sampled by partition under the seed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from core.errors import FederationError, SettingsError
from core.seeds import Stream, derive_seed
from exchange.inbox import patiently
from exchange.protocol import DECLARATION, Declaration, ProtocolError, last_line, plain
from exchange.queries import Queries
from exchange.undocumented import is_simulated
from quant import ALLOWED_WIDTHS, is_width

_POLL = 0.1
# A node that has data of its own declares no more: its number travels, and is added up.
MOST_EXAMPLES = 10**9


class Nodes:
    """Declarations of the nodes.

    A partition belongs to the first node that declares it, for as long as that node is connected;
    a second one waits for it. So a device that died and came back under another ID takes part
    again as soon as its old connection has lapsed. A node that was gone is asked again, also if it
    was back before the next look, as its activation time shows: it may have been
    repaired or have another width, and its partition may be another's by now. While a partition
    has no holder, a round waits for the nodes that were asked, within the bounds of `Queries`.

    The number of partitions is the one that most nodes of the first gathering declare. A tie that
    lasts until the wait is over ends the run.

    Parameters
    ----------
    min_nodes : int
        Nodes that must take part.
    wait : float
        Seconds to wait for them, and in all later gatherings together for nodes that came later
        and did not declare themselves.
    most_examples : int
        A node that declares more is refused, as the number is its weight in the mean.
    examples_of : callable or None
        ``f(partition_id, num_partitions)``: how many a partition has, where the server knows; a
        node that declares more is refused. A `SettingsError` says that there is no such
        partition. It may be slow: it is called only for nodes that are about to take part.
    facts : mapping, optional
        Of the task, which nodes are told when they are asked.
    """

    def __init__(
        self,
        min_nodes: int = 1,
        wait: float = 60.0,
        most_examples: int = MOST_EXAMPLES,
        examples_of: Callable[[int, int], int | None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._min_nodes = min_nodes
        self._wait = wait
        self._most_examples = most_examples
        self._examples_of = examples_of
        self._present: dict[int, Declaration] = {}
        # Nodes that were connected at the last look, and when each was activated; what is known of
        # them; declarations in the order in which they came.
        self._connected: dict[int, str] = {}
        self._declared: dict[int, Declaration] = {}
        self._refused: dict[int, str] = {}
        self._refused_parts: dict[int, int] = {}
        self._queries = Queries(wait, facts or {})
        # Of nodes that have data of their own.
        self._numbers: dict[int, int] = {}
        self._own_data = False
        self._before = 0
        self._parts = 0
        self._gathered = False
        self._simulated = False

    def expect(self, num_partitions: int) -> None:
        """Believe the nodes that declare so many partitions, as the run did before its resume."""
        self._before = num_partitions

    def gather(self, grid: Grid) -> dict[int, Declaration]:
        """Return the declarations of the nodes that are connected now and may take part.

        New nodes are asked. The first time, this waits until there are as many as the nodes'
        declarations name (`num_partitions`), or the time since one took another partition is
        up; later it waits only for the declarations of nodes that are connected, or if fewer than
        `min_nodes` are there.

        Raises
        ------
        FederationError
            If fewer than `min_nodes` can take part when the time is up, all were refused, or no
            number of partitions has the most declarations.
        """
        self._simulated = is_simulated(grid)
        deadline, most = time.monotonic() + self._wait, 0
        while True:
            self._look(grid)
            if not self._gathered and (seated := len(self._seated())) > most:
                # As long as they come, more may; there are only so many partitions.
                deadline, most = time.monotonic() + self._wait, seated
            late = time.monotonic() >= deadline
            present = self._taking_part(late)
            complete = self._is_complete(present)
            enough = len(present) >= self._min_nodes
            if enough and (complete or (self._gathered and not self._queries.are_awaited())):
                break
            if complete and not present:
                break
            if late:
                self._queries.give_up()
                break
            time.sleep(_POLL)
        self._queries.end_gathering()
        self._refuse_tie()
        if present and not self._parts:
            self._parts = self.num_partitions
        self._refuse_unseated(present)
        if not enough:
            raise FederationError(
                f"{len(present)} nodes can take part, min-nodes is {self._min_nodes}: "
                f"{self._why_few()}"
            )
        if not self._gathered and not complete:
            expected = self.num_partitions or self._min_nodes
            log(WARNING, "Continuing with %d of %d nodes", len(present), expected)
        self._welcome(present)
        self._own_data = self._is_of_own_data()
        self._gathered = True
        self._present = present
        return present

    def _why_few(self) -> str:
        """Return why no more nodes take part, with how many there are."""
        connected = len(self._connected)
        if not connected:
            return f"no node is connected after {self._wait:g} s"
        heard = len(self._declared.keys() | self._refused.keys())
        if not heard and self._simulated:
            return (
                f"none of {connected} simulated nodes has answered after {self._wait:g} s "
                "(node-wait); Flower's simulation is still starting, or cannot start and its log "
                "says why, as with client-resources-num-cpus=0"
            )
        if self._refused:
            reason = next(iter(self._refused.values()))
            return f"{reason} ({len(self._refused)} of {connected} connected nodes are refused)"
        silent = f"the last {self._wait:g} s (node-wait) brought no other"
        return f"{heard} of {connected} connected nodes have answered; {silent}"

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

    def partitions(self) -> set[int]:
        """Return the partitions of the present nodes."""
        return {declaration.partition_id for declaration in self._present.values()}

    def widths(self) -> dict[int, int]:
        """Return the number of present nodes of each bit-width."""
        widths = sorted(declaration.bits for declaration in self._present.values())
        return {bits: widths.count(bits) for bits in sorted(set(widths))}

    def _votes(self) -> Counter[int]:
        """Nodes by the number of partitions that they declare."""
        if self._is_of_own_data():
            return Counter()
        all_declared = self._declared.values()
        declared = Counter(d.num_partitions for d in all_declared if not _has_own_data(d))
        # Refused nodes count only where there are no others.
        return declared or Counter(parts for parts in self._refused_parts.values() if parts)

    def _is_complete(self, present: dict[int, Declaration]) -> bool:
        """Return whether the first gathering need not wait any longer."""
        if present and self._is_of_own_data():
            # They have data of their own: how many there will be, only `min_nodes` says.
            return not self._queries and len(present) >= self._min_nodes
        expected = self.num_partitions
        if self._before and expected != self._before:
            # Those of the resumed run may still come.
            return False
        heard = len(present)
        if not self._queries:
            # A refused node may stand where another is still to answer.
            heard = len(self._declared.keys() | self._refused.keys())
        elif expected not in (self._parts, self._before):
            votes = self._votes()
            others = max((n for parts, n in votes.items() if parts != expected), default=0)
            if votes[expected] <= others + len(self._queries):
                # Nodes that are still to answer may declare another number.
                return False
        return 0 < expected <= heard

    def _look(self, grid: Grid) -> None:
        """Look which nodes are connected, ask new ones, and take the answers that are there."""
        connected = {node.node_id: node.last_activated_at for node in patiently(grid.get_nodes)}
        self._forget_all_but({n for n, at in connected.items() if self._connected.get(n) == at})
        self._connected = connected
        heard = self._declared.keys() | self._refused.keys()
        self._queries.ask(grid, sorted(connected.keys() - heard))
        for node_id, reply in self._queries.hear(grid):
            if reply.has_error():
                self._refuse(node_id, last_line(reply.error.reason))
            else:
                self._admit(node_id, reply)

    def _forget_all_but(self, unchanged: set[int]) -> None:
        for kept in (self._declared, self._refused, self._refused_parts):
            for node_id in kept.keys() - unchanged:
                del kept[node_id]
        self._queries.forget_all_but(unchanged)

    def _admit(self, node_id: int, reply: Message) -> None:
        record = reply.content.config_records.get(DECLARATION, ConfigRecord())
        try:
            declaration = Declaration.from_record(record)
        except ProtocolError as error:
            self._refuse(node_id, str(error))
            return
        reason = declaration.refused or self._objection(declaration)
        if reason:
            self._refused_parts[node_id] = declaration.num_partitions
            self._refuse(node_id, reason)
            return
        self._declared[node_id] = declaration

    def _objection(self, new: Declaration) -> str:
        if not is_width(new.bits):
            return f"it declares {new.bits} bits; allowed: {ALLOWED_WIDTHS}"
        if not _has_own_data(new) and not 0 <= new.partition_id < new.num_partitions:
            return f"it declares partition {new.partition_id} of {new.num_partitions}"
        most = MOST_EXAMPLES if _has_own_data(new) else self._most_examples
        if not 1 <= new.num_examples <= most:
            return f"it declares {new.num_examples} examples; allowed: 1 to {most}"
        return ""

    def _seated(self) -> dict[int, Declaration]:
        """Give each partition to the first of the connected nodes that declared it.

        Nodes that have data of their own get a number instead, and are alone.
        """
        expected = self.num_partitions
        if self._is_of_own_data():
            own = sorted(n for n, d in self._declared.items() if _has_own_data(d))
            return {n: replace(self._declared[n], partition_id=self._number_of(n)) for n in own}
        holders: dict[int, int] = {}
        for node_id, declaration in self._declared.items():
            if declaration.num_partitions == expected and not _has_own_data(declaration):
                holders.setdefault(declaration.partition_id, node_id)
        return {node_id: self._declared[node_id] for node_id in sorted(holders.values())}

    def _is_of_own_data(self) -> bool:
        """Whether nodes have data of their own: as most of the first gathering, and then always."""
        if self._gathered:
            return self._own_data
        own = sum(map(_has_own_data, self._declared.values()))
        return own > len(self._declared) - own

    def _number_of(self, node_id: int) -> int:
        """Return the number of a node that has data of its own, for as long as the run lasts."""
        return self._numbers.setdefault(node_id, len(self._numbers))

    def _taking_part(self, late: bool) -> dict[int, Declaration]:
        """Return the seated nodes, checked against the partition before they take part.

        A node that does not fit is refused, and the next of the partition is seated.
        """
        present = self._seated()
        if not (late or self._gathered or self._is_complete(present)):
            return present
        while unfit := {n: reason for n, d in present.items() if (reason := self._misfit(d))}:
            for node_id, reason in unfit.items():
                self._refused_parts[node_id] = self._declared.pop(node_id).num_partitions
                self._refuse(node_id, reason)
            present = self._seated()
        return present

    def _misfit(self, declared: Declaration) -> str:
        """Return what of a declaration contradicts the partition; empty if all does."""
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
        own = self._is_of_own_data()
        for node_id, declaration in self._declared.items():
            parts, partition = declaration.num_partitions, declaration.partition_id
            if node_id in present:
                self._refused.pop(node_id, None)
            elif node_id in self._refused:
                continue
            elif _has_own_data(declaration):
                others = "the others hold partitions"
                self._refuse(node_id, f"it has data of its own (data-path); {others}")
            elif own:
                others = "the others have data of their own (data-path)"
                self._refuse(node_id, f"it declares partition {partition} of {parts}; {others}")
            elif parts != expected:
                self._refuse(node_id, f"it declares {parts} partitions, the others {expected}")
            else:
                holder = holders[partition]
                self._refuse(node_id, f"partition {partition} is held by node {holder}")

    def _welcome(self, present: dict[int, Declaration]) -> None:
        for node_id, declaration in present.items():
            if self._present.get(node_id) != declaration:
                where = f"partition {declaration.partition_id} of {declaration.num_partitions}"
                if not declaration.num_partitions:
                    where = f"number {declaration.partition_id}, data of its own"
                log(
                    INFO,
                    "Node %d: %s, %d bits, %d examples",
                    node_id,
                    where,
                    declaration.bits,
                    declaration.num_examples,
                )

    def _refuse(self, node_id: int, reason: str) -> None:
        reason = self._refused[node_id] = plain(reason)
        log(WARNING, "Node %d is refused: %s", node_id, reason)


def _has_own_data(declaration: Declaration) -> bool:
    return (declaration.partition_id, declaration.num_partitions) == (-1, 0)


def _leading(votes: Counter[int]) -> list[int]:
    """Return the numbers that have the most votes, in order."""
    most = max(votes.values(), default=0)
    return sorted(number for number, count in votes.items() if count == most)


def sample_nodes(
    present: dict[int, Declaration], fraction: float, seed: int, *purpose: int
) -> dict[int, Declaration]:
    """Choose nodes: at least one, by partition and seed, whatever the node IDs.

    Parameters
    ----------
    present : dict of int to Declaration
        Nodes by ID, one a partition.
    fraction : float
        Share of them to choose.
    seed : int
        The run's seed.
    *purpose : int
        What they are chosen for, as the round; another purpose gives another choice.
    """
    by_partition = {d.partition_id: n for n, d in present.items()}
    partitions = sorted(by_partition)
    count = max(1, round(fraction * len(partitions)))
    rng = np.random.default_rng(derive_seed(seed, Stream.SAMPLING, *purpose))
    chosen = sorted(rng.choice(partitions, count, replace=False).tolist())
    return {by_partition[p]: present[by_partition[p]] for p in chosen}
