"""Updates decoded in turn, the next ones unfolded by another thread meanwhile.

To undo the entropy coding takes from a third as long as all the rest of an aggregation to longer,
and can run beside it: the library that does it lets other threads run. All else is many short
calls, for which two threads would wait for each other.
"""

from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np

from exchange.replies import Packed
from exchange.round_plan import Asked
from quant import OpenedUpdate, Update, UpdateError

# At most twice as many unfolded updates are in memory.
_AT_ONCE = 4


def decode_in_turn(
    asked: Asked, packed: Sequence[Packed], rejected: MutableMapping[int, str]
) -> Iterator[tuple[Packed, Update]]:
    """Decode replies in the order given.

    Parameters
    ----------
    asked : Asked
        What they are held against.
    packed : sequence of Packed
        The replies.
    rejected : mutable mapping of int to str
        Is told of those that are malformed, which are left out: partition and reason.
    """
    batches = (
        _Batch(asked, packed[i : i + _AT_ONCE], rejected) for i in range(0, len(packed), _AT_ONCE)
    )
    with ThreadPoolExecutor(1) as helper:
        due = next(batches, None)
        while due is not None:
            following = next(batches, None)
            if following is not None:
                following.begin(helper)
            yield from due.decode()
            due = following


class _Batch:
    """A few replies in a row, which two threads can unfold together."""

    def __init__(
        self, asked: Asked, packed: Sequence[Packed], rejected: MutableMapping[int, str]
    ) -> None:
        self._asked, self._rejected = asked, rejected
        self._opened: list[tuple[Packed, OpenedUpdate | None]] = []
        for item in packed:
            try:
                self._opened.append((item, asked.open_update(item)))
            except UpdateError as error:
                self._reject(item, error)
        self._folded = deque(
            (item.client.partition_id, opened)
            for item, opened in self._opened
            if opened is not None and opened.is_folded
        )
        self._unfolded: dict[int, np.ndarray] = {}
        self._job: Future[None] | None = None

    def begin(self, helper: Executor) -> None:
        """Let the other thread unfold."""
        if self._folded:
            self._job = helper.submit(self._unfold)

    def decode(self) -> Iterator[tuple[Packed, Update]]:
        """Unfold what the other thread has not come to, and read everything."""
        self._unfold()
        if self._job is not None:
            self._job.result()
        for item, opened in self._opened:
            try:
                # Taken out, so that it is not held any longer.
                unfolded = self._unfolded.pop(item.client.partition_id, None)
                yield item, self._asked.read_update(item, opened, unfolded)
            except UpdateError as error:
                self._reject(item, error)

    def _unfold(self) -> None:
        while self._folded:
            try:
                partition, opened = self._folded.popleft()
            except IndexError:  # The other thread took the last one.
                return
            try:
                self._unfolded[partition] = opened.unfold()
            except UpdateError:
                # Whoever reads it finds the same, in its turn.
                continue

    def _reject(self, item: Packed, error: UpdateError) -> None:
        self._rejected[item.client.partition_id] = str(error)
