"""The nodes of a federation: asked once what they are, then sampled by partition under the seed."""

import time
from logging import INFO, WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from quant import FLOAT_BITS, MAX_BITS, MIN_BITS
from strategies.inbox import pull
from strategies.replies import last_line
from task.protocol import DECLARATION, Declaration, ProtocolError
from task.seeds import derive_seed

_POLL = 0.1
# A query can fail for a passing reason; a node that fails this often is refused.
_QUERIES = 3
# Keeps weighted sums finite whatever a node claims.
_MOST_EXAMPLES = 10**9


class FederationError(RuntimeError):
    """The federation cannot go on; the message says why."""


class Nodes:
    """Declarations of the nodes.

    A partition belongs to the first node that declares it, for as long as that node is connected;
    a second one waits for it. So a device that died and came back under another ID takes part
    again as soon as its old connection has lapsed.

    Parameters
    ----------
    min_nodes : int
        Nodes that must take part.
    wait : float
        Seconds to wait for them.
    """

    def __init__(self, min_nodes: int = 1, wait: float = 60.0) -> None:
        self._min_nodes = min_nodes
        self._wait = wait
        self._present: dict[int, Declaration] = {}
        self._known: dict[int, Declaration] = {}
        self._refused: dict[int, str] = {}
        self._waiting: dict[int, Declaration] = {}
        self._queries: dict[int, Message] = {}
        self._failures: dict[int, int] = {}
        self._spoken_of = 0
        self._gathered = False

    def gather(self, grid: Grid) -> dict[int, Declaration]:
        """Return the declarations of the nodes that are connected now and may take part.

        New nodes are asked. The first time, this waits until there are as many as the nodes'
        declarations speak of (`num_partitions`), or the time is up; later it waits only if fewer
        than `min_nodes` are there.

        Raises
        ------
        FederationError
            If fewer than `min_nodes` can take part when the time is up, or all were refused.
        """
        deadline = time.monotonic() + self._wait
        while True:
            connected = sorted(grid.get_node_ids())
            for node_id, declaration in list(self._waiting.items()):
                self._seat(node_id, declaration, connected)
            self._ask(grid, connected)
            self._hear(grid, connected)
            present = {n: self._known[n] for n in connected if n in self._known}
            refused = [self._refused[n] for n in connected if n in self._refused]
            # A refused node may stand where another is still to answer.
            heard = len(present)
            if not self._queries.keys() & set(connected):
                heard += len(refused)
            complete = 0 < self._expected() <= heard
            enough = len(present) >= self._min_nodes
            if complete or (enough and self._gathered) or time.monotonic() >= deadline:
                break
            time.sleep(_POLL)
        if not enough:
            reason = refused[0] if refused else f"no more came in {self._wait:g} s"
            raise FederationError(
                f"{len(present)} nodes can take part, min-nodes is {self._min_nodes}: {reason}"
            )
        if not self._gathered and not complete:
            log(WARNING, "Going on with %d of %d nodes", len(present), self._expected())
        self._gathered = True
        self._present = present
        return present

    @property
    def num_partitions(self) -> int:
        """Parts that the data is dealt into, as the nodes declare; 0 before any has."""
        return self._expected()

    def widths(self) -> dict[int, int]:
        """Return the number of present nodes of each bit-width."""
        widths = sorted(declaration.bits for declaration in self._present.values())
        return {bits: widths.count(bits) for bits in sorted(set(widths))}

    def _expected(self) -> int:
        """Nodes that the federation has in all, as the first one to declare itself says."""
        return next((d.num_partitions for d in self._known.values()), self._spoken_of)

    def _ask(self, grid: Grid, connected: list[int]) -> None:
        heard = self._known.keys() | self._refused.keys() | self._queries.keys()
        new = [node_id for node_id in connected if node_id not in heard]
        if not new:
            return
        messages = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in new]
        grid.push_messages(messages)
        self._queries |= dict(zip(new, messages, strict=True))

    def _hear(self, grid: Grid, connected: list[int]) -> None:
        # A node that never answers costs nothing but this look.
        for node_id, query in list(self._queries.items()):
            reply = pull(grid, query)
            if reply is None:
                continue
            del self._queries[node_id]
            if reply.has_error():
                self._failures[node_id] = self._failures.get(node_id, 0) + 1
                if self._failures[node_id] >= _QUERIES:
                    self._refuse(node_id, last_line(reply.error.reason))
            else:
                self._admit(node_id, reply, connected)

    def _admit(self, node_id: int, reply: Message, connected: list[int]) -> None:
        record = reply.content.config_records.get(DECLARATION, ConfigRecord())
        try:
            declaration = Declaration.from_record(record)
        except ProtocolError as error:
            self._refuse(node_id, str(error))
            return
        reason = declaration.refused or self._objection(declaration)
        if reason:
            self._spoken_of = max(self._spoken_of, declaration.num_partitions)
            self._refuse(node_id, reason)
            return
        self._seat(node_id, declaration, connected)

    def _seat(self, node_id: int, declaration: Declaration, connected: list[int]) -> None:
        """Give the node its partition, or let it wait while another connected node holds that."""
        partition = declaration.partition_id
        holders = (n for n, d in self._known.items() if d.partition_id == partition)
        holder = next((n for n in holders if n in connected), None)
        if holder is not None:
            if node_id not in self._waiting:
                self._refuse(node_id, f"partition {partition} is held by node {holder}")
            self._waiting[node_id] = declaration
            return
        self._waiting.pop(node_id, None)
        self._refused.pop(node_id, None)
        self._known[node_id] = declaration
        log(
            INFO,
            "Node %d: partition %d of %d, %d bits, %d examples",
            node_id,
            declaration.partition_id,
            declaration.num_partitions,
            declaration.bits,
            declaration.num_examples,
        )

    def _objection(self, new: Declaration) -> str:
        if new.bits != FLOAT_BITS and not MIN_BITS <= new.bits <= MAX_BITS:
            return (
                f"it declares {new.bits} bits; allowed: {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS}"
            )
        if not 0 <= new.partition_id < new.num_partitions:
            return f"it declares partition {new.partition_id} of {new.num_partitions}"
        if not 1 <= new.num_examples <= _MOST_EXAMPLES:
            return f"it declares {new.num_examples} examples; allowed: 1 to {_MOST_EXAMPLES}"
        for other in self._known.values():
            if other.num_partitions != new.num_partitions:
                return f"it declares {new.num_partitions} partitions, others {other.num_partitions}"
        return ""

    def _refuse(self, node_id: int, reason: str) -> None:
        self._refused[node_id] = reason
        log(WARNING, "Node %d is refused: %s", node_id, reason)


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
    rng = np.random.default_rng(derive_seed(seed, 2, *purpose))
    chosen = sorted(rng.choice(partitions, count, replace=False).tolist())
    return {by_partition[p]: present[by_partition[p]] for p in chosen}
