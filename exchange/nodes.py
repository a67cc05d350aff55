"""The nodes of a federation: asked once what they are, then sampled by partition under the seed."""

import time
from collections.abc import Callable, Mapping
from logging import INFO, WARNING
from secrets import SystemRandom
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from core.errors import FederationError
from core.seeds import Stream, derive_seed
from exchange.inbox import patiently
from exchange.protocol import DECLARATION, Declaration, ProtocolError, last_line
from exchange.queries import Queries
from exchange.seats import MOST_EXAMPLES, Seats
from exchange.undocumented import is_simulated

_POLL = 0.1


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
        self._present: dict[int, Declaration] = {}
        # Nodes that were connected at the last look, and when each was activated.
        self._connected: dict[int, str] = {}
        self._seats = Seats(most_examples, examples_of)
        self._queries = Queries(wait, facts or {})
        self._gathered = False
        self._simulated = False

    def expect(self, num_partitions: int) -> None:
        """Believe the nodes that declare so many partitions, as the run did before its resume."""
        self._seats.expect(num_partitions)

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
            if not self._gathered and (seated := len(self._seats.taken())) > most:
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
        self._seats.end_gathering(present)
        if not enough:
            raise FederationError(
                f"{len(present)} nodes can take part, min-nodes is {self._min_nodes}: "
                f"{self._why_few()}"
            )
        if not self._gathered and not complete:
            expected = self.num_partitions or self._min_nodes
            log(WARNING, "Continuing with %d of %d nodes", len(present), expected)
        self._welcome(present)
        self._seats.settle()
        self._gathered = True
        self._present = present
        return present

    def _why_few(self) -> str:
        """Return why no more nodes take part, with how many there are."""
        connected = len(self._connected)
        if not connected:
            return f"no node is connected after {self._wait:g} s"
        heard, refused = len(self._seats.heard()), self._seats.refused
        if not heard and self._simulated:
            return (
                f"none of {connected} simulated nodes has answered after {self._wait:g} s "
                "(node-wait); Flower's simulation is still starting, or cannot start and its log "
                "says why, as with client-resources-num-cpus=0"
            )
        if refused:
            reason = next(iter(refused.values()))
            return f"{reason} ({len(refused)} of {connected} connected nodes are refused)"
        silent = f"the last {self._wait:g} s (node-wait) brought no other"
        return f"{heard} of {connected} connected nodes have answered; {silent}"

    @property
    def num_partitions(self) -> int:
        """Partitions of the data; 0 while no number has the most declarations, and without any."""
        return self._seats.num_partitions

    def partitions(self) -> set[int]:
        """Return the partitions of the present nodes."""
        return {declaration.partition_id for declaration in self._present.values()}

    def widths(self) -> dict[int, int]:
        """Return the number of present nodes of each bit-width."""
        widths = sorted(declaration.bits for declaration in self._present.values())
        return {bits: widths.count(bits) for bits in sorted(set(widths))}

    def _is_complete(self, present: dict[int, Declaration]) -> bool:
        """Return whether the first gathering need not wait any longer."""
        if present and self._seats.are_of_own_data:
            # They have data of their own: how many there will be, only `min_nodes` says.
            return not self._queries and len(present) >= self._min_nodes
        return self._seats.are_settled(len(present), len(self._queries))

    def _taking_part(self, late: bool) -> dict[int, Declaration]:
        """Return the seated nodes, checked against the partition before they take part."""
        present = self._seats.taken()
        if late or self._gathered or self._is_complete(present):
            return self._seats.taken_and_fit()
        return present

    def _look(self, grid: Grid) -> None:
        """Look which nodes are connected, ask new ones, and take the answers that are there."""
        connected = {node.node_id: node.last_activated_at for node in patiently(grid.get_nodes)}
        unchanged = {n for n, at in connected.items() if self._connected.get(n) == at}
        self._seats.forget_all_but(unchanged)
        self._queries.forget_all_but(unchanged)
        self._connected = connected
        self._queries.ask(grid, sorted(connected.keys() - self._seats.heard()))
        for node_id, reply in self._queries.hear(grid):
            if reply.has_error():
                self._seats.refuse(node_id, last_line(reply.error.reason))
            else:
                self._read(node_id, reply)

    def _read(self, node_id: int, reply: Message) -> None:
        record = reply.content.config_records.get(DECLARATION, ConfigRecord())
        try:
            self._seats.declare(node_id, Declaration.from_record(record))
        except ProtocolError as error:
            self._seats.refuse(node_id, str(error))

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


def sample_nodes(
    present: dict[int, Declaration],
    fraction: float,
    seed: int,
    *purpose: int,
    each_alone: bool = False,
) -> dict[int, Declaration]:
    """Choose nodes, whatever their IDs: at least one, by partition and seed, or `each_alone`.

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
    each_alone : bool
        Whether each is chosen by itself with this probability (Poisson sampling), which is what
        differential privacy is accounted for; else a fixed number of them is. It may be nobody, and
        is not by the seed: who knows the seed would know who takes part, as if all did.
    """
    by_partition = {d.partition_id: n for n, d in present.items()}
    partitions = sorted(by_partition)
    if each_alone and fraction < 1:
        secret = SystemRandom()
        drawn = [p for p in partitions if secret.random() < fraction]
        return {by_partition[p]: present[by_partition[p]] for p in drawn}
    count = max(1, round(fraction * len(partitions)))
    rng = np.random.default_rng(derive_seed(seed, Stream.SAMPLING, *purpose))
    chosen = sorted(rng.choice(partitions, count, replace=False).tolist())
    return {by_partition[p]: present[by_partition[p]] for p in chosen}
