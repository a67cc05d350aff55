"""The nodes of a federation: asked once what they are, then sampled by partition under the seed."""

import time
from logging import INFO, WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from quant import FLOAT_BITS, MAX_BITS, MIN_BITS
from strategies.replies import last_line, receive
from task.protocol import DECLARATION, Declaration, ProtocolError
from task.seeds import derive_seed

_POLL = 0.2


class FederationError(RuntimeError):
    """The nodes that a run needs are not there; the message says which."""


class Nodes:
    """Declarations of the connected nodes.

    Parameters
    ----------
    min_nodes : int
        Nodes that must take part.
    wait : float
        Seconds to wait for them, and for an answer to the query.
    """

    def __init__(self, min_nodes: int = 1, wait: float = 60.0) -> None:
        self._min_nodes = min_nodes
        self._wait = wait
        self._declared: dict[int, Declaration] = {}
        self._refused: dict[int, str] = {}
        self._expected = 0

    def gather(self, grid: Grid) -> dict[int, Declaration]:
        """Return the declarations of the nodes that are connected now and may take part.

        Unknown nodes are asked; the first time, this waits until as many as their declarations
        speak of (`num_partitions`) are there, or the time is up.

        Raises
        ------
        FederationError
            If fewer than `min_nodes` can take part when the time is up.
        """
        deadline = time.monotonic() + self._wait
        first_time = not self._declared
        while True:
            connected = sorted(grid.get_node_ids())
            self._query(grid, [n for n in connected if n not in self._declared | self._refused])
            present = {n: self._declared[n] for n in connected if n in self._declared}
            refused = [self._refused[n] for n in connected if n in self._refused]
            complete = self._expected and len(present) + len(refused) >= self._expected
            enough = len(present) >= self._min_nodes
            if (enough and not first_time) or complete or time.monotonic() >= deadline:
                break
            time.sleep(_POLL)
        if not enough:
            reason = refused[0] if refused else f"no more came in {self._wait:g} s"
            raise FederationError(
                f"{len(present)} nodes can take part, min-nodes is {self._min_nodes}: {reason}"
            )
        if first_time and not complete:
            log(WARNING, "Going on with %d of %d nodes", len(present), self._expected)
        return present

    def widths(self) -> dict[int, int]:
        """Return the number of known nodes of each bit-width."""
        widths = sorted(declaration.bits for declaration in self._declared.values())
        return {bits: widths.count(bits) for bits in sorted(set(widths))}

    def _query(self, grid: Grid, node_ids: list[int]) -> None:
        if not node_ids:
            return
        messages = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in node_ids]
        replies = list(receive(grid, messages, self._wait))
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        for reply in replies:
            node_id = asked.get(reply.metadata.reply_to_message_id)
            if node_id is not None:
                self._admit(node_id, reply)

    def _admit(self, node_id: int, reply: Message) -> None:
        reason = ""
        declaration = None
        if reply.has_error():
            reason = last_line(reply.error.reason)
        else:
            record = reply.content.config_records.get(DECLARATION, ConfigRecord())
            try:
                declaration = Declaration.from_record(record)
                self._expected = max(self._expected, declaration.num_partitions)
                reason = declaration.refused or self._refusal(declaration, node_id)
            except ProtocolError as error:
                reason = str(error)
        if reason:
            self._refused[node_id] = reason
            log(WARNING, "Node %d is refused: %s", node_id, reason)
            return
        self._declared[node_id] = declaration
        log(
            INFO,
            "Node %d: partition %d of %d, %d bits, %d examples",
            node_id,
            declaration.partition_id,
            declaration.num_partitions,
            declaration.bits,
            declaration.num_examples,
        )

    def _refusal(self, declaration: Declaration, node_id: int) -> str:
        bits, partition = declaration.bits, declaration.partition_id
        if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
            return f"it declares {bits} bits; allowed: {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS}"
        if not 0 <= partition < declaration.num_partitions:
            return f"it declares partition {partition} of {declaration.num_partitions}"
        if declaration.num_examples < 1:
            return "it declares no examples"
        return ""


def sample_nodes(
    present: dict[int, Declaration], fraction: float, seed: int, server_round: int
) -> dict[int, Declaration]:
    """Choose the nodes of a round: at least one, by partition and seed, whatever the node IDs.

    If several nodes hold one partition, as after a restart, the one with the highest ID stands
    for it.
    """
    by_partition = {d.partition_id: n for n, d in sorted(present.items())}
    partitions = sorted(by_partition)
    count = max(1, round(fraction * len(partitions)))
    rng = np.random.default_rng(derive_seed(seed, 2, server_round))
    chosen = sorted(rng.choice(partitions, count, replace=False).tolist())
    return {by_partition[p]: present[by_partition[p]] for p in chosen}
