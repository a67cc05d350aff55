"""The query to every node: sent, received, and how long its answer is waited for."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from exchange.inbox import SuperLinkFailed, patiently, pull
from exchange.protocol import FACTS
from exchange.undocumented import is_simulated

# A query can fail for a passing reason; a node that fails this often is given up.
_ATTEMPTS = 3
# Flower's simulation goes over all messages that are not answered yet for every node, ten times a
# second, in the server's own process: with 500 open queries it does nothing else. Its nodes
# answer, so that no query waits behind a silent one; networked nodes are asked at once.
_OPEN_IN_SIMULATION = 32


class Queries:
    """Queries that are not answered yet.

    A silent node would hold up every round. So after the first gathering, a node that did not
    answer in time is not waited for again before it has answered, also if it was gone
    meanwhile; and what all later gatherings wait for nodes that then did not answer is bounded
    together, as a node may come under a new ID every time. A wait that an answer ended does not
    count: a node that comes back and answers in time is waited for, however often.

    Parameters
    ----------
    patience : float
        Seconds that all gatherings after the first together wait for nodes that do not answer.
    facts : mapping
        Of the task, which the question holds.
    """

    def __init__(self, patience: float, facts: Mapping[str, Any]) -> None:
        self._patience = patience
        self._facts = facts
        self._open: dict[int, Message] = {}
        # Nodes that are to be asked later.
        self._later: dict[int, None] = {}
        self._failures: Counter[int] = Counter()
        self._in_vain: set[int] = set()
        # Of the current gathering: the nodes waited for, and since when.
        self._awaited: set[int] = set()
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._open) + len(self._later)

    def ask(self, grid: Grid, node_ids: Iterable[int]) -> None:
        """Send the question to those of the nodes that have none open."""
        self._later |= dict.fromkeys(n for n in node_ids if n not in self._open)
        room = len(self._later)
        if is_simulated(grid):
            room = max(0, _OPEN_IN_SIMULATION - len(self._open))
        new = list(self._later)[:room]
        for node_id in new:
            del self._later[node_id]
        if not new:
            return
        messages = [Message(self._question(), node_id, MessageType.QUERY) for node_id in new]
        patiently(lambda: grid.push_messages(messages))
        self._open |= {message.metadata.dst_node_id: message for message in messages}

    def _question(self) -> RecordDict:
        return RecordDict({FACTS: ConfigRecord(dict(self._facts))} if self._facts else {})

    def hear(self, grid: Grid) -> Iterator[tuple[int, Message]]:
        """Yield the answers that have come, by node; an error is one that will not pass."""
        # A node that never answers costs only this look.
        for node_id, message in list(self._open.items()):
            try:
                reply = pull(grid, message)
            except SuperLinkFailed:
                # It comes last next time: the failure may be of this answer alone.
                self._open[node_id] = self._open.pop(node_id)
                return
            if reply is None:
                continue
            del self._open[node_id]
            if not reply.has_error():
                self._in_vain.discard(node_id)
                self._awaited.discard(node_id)
                yield node_id, reply
                continue
            self._failures[node_id] += 1
            if self._failures[node_id] < _ATTEMPTS:
                self.ask(grid, [node_id])
            else:
                yield node_id, reply

    def forget_all_but(self, node_ids: set[int]) -> None:
        """Drop the queries to other nodes; keep that they did not answer in time."""
        for kept in (self._open, self._later, self._failures):
            for node_id in kept.keys() - node_ids:
                del kept[node_id]

    def are_awaited(self) -> bool:
        """Return whether a gathering after the first still waits for an answer."""
        now = time.monotonic()
        if not self._awaited:
            self._since = now
        if now - self._since >= self._patience:
            return False
        hopeful = (self._open.keys() | self._later.keys()) - self._in_vain
        self._awaited |= hopeful
        return bool(hopeful)

    def give_up(self) -> None:
        """Wait no more for those that have not answered by the end of a gathering's time."""
        self._in_vain |= self._open.keys() | self._later.keys()

    def end_gathering(self) -> None:
        """Count the seconds that this gathering waited for nodes that did not answer."""
        if self._awaited:
            self._patience -= time.monotonic() - self._since
        self._in_vain |= self._awaited
        self._awaited = set()
