"""Rounds whose result was not used, and when they mean that no later one will be."""

from collections.abc import Collection, Mapping
from typing import Any

# So many in a row end a run, once every node has been asked in them.
_MOST = 3


class UnusedRounds:
    """The rounds since the last one whose result was used.

    A round is used if a client's update counted and the result was not dropped. Where clients are
    sampled, a few in a row may meet the same bad ones: only rounds that together asked every node
    in vain say that nothing can come of it.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._rounds: list[int] = []
        self._asked: set[str] = set()
        self._reason = ""

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count a round by its entry in rounds.jsonl."""
        dropped = entry.get("dropped", "")
        left_out = entry.get("left_out") or {}
        if entry["clients"]["aggregated"] and not dropped:
            self._forget()
            return
        self._rounds.append(entry["round"])
        # Where nobody's update counted, those left out are all that were asked.
        self._asked |= {str(partition) for partition in entry.get("asked", left_out)}
        self._reason = dropped or next(iter(left_out.values()), "none answered")

    def fatal(self, partitions: Collection[int], is_last: bool) -> str:
        """Return why the run has failed; empty if it may go on.

        Parameters
        ----------
        partitions : collection of int
            Of the nodes that can take part.
        is_last : bool
            Whether no round is left.
        """
        in_vain = {str(partition) for partition in partitions} <= self._asked
        if not self._rounds or not in_vain or not (is_last or len(self._rounds) >= _MOST):
            return ""
        first, last = self._rounds[0], self._rounds[-1]
        rounds = f"round {last}" if first == last else f"rounds {first} to {last}"
        return f"no result could be used in {rounds}, though every node was asked: {self._reason}"
