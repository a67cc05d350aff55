"""Rounds whose result was not used, and when they mean that the run has failed."""

from collections.abc import Collection, Mapping
from typing import Any

# So many in a row end a run, once every node has been asked in them.
_MOST = 3


class UnusedRounds:
    """The rounds since the last one whose result was used.

    A round is used if a client's update counted and the result was not dropped. Where clients are
    sampled, a few in a row may meet the same bad ones: while rounds are left, only those that
    together asked every node without success end the run. At its end a run has failed too if the
    last rounds, and more than half of all, asked several nodes without success, or if the strategy
    never made a model.
    """

    def __init__(self) -> None:
        self._unchanged = ""
        self._changed = False
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
            # A strategy may gather updates for some rounds before it makes a model of them.
            self._unchanged = entry.get("unchanged", "")
            self._changed |= not self._unchanged
            self._forget()
            return
        self._rounds.append(entry["round"])
        # Where no update counted, all that were asked are left out.
        self._asked |= {str(partition) for partition in entry.get("asked", left_out)}
        self._reason = dropped or next(iter(left_out.values()), "none answered")

    def fatal(self, partitions: Collection[int], is_last: bool) -> str:
        """Return why the run has failed; empty if it may continue.

        Parameters
        ----------
        partitions : collection of int
            Of the nodes that can take part.
        is_last : bool
            Whether no round is left.
        """
        if is_last and self._unchanged and not self._changed:
            return f"no round changed the model: {self._unchanged}"
        if not self._rounds or not (is_last or len(self._rounds) >= _MOST):
            return ""
        first, last = self._rounds[0], self._rounds[-1]
        if {str(partition) for partition in partitions} <= self._asked:
            asked = "every node was"
        elif is_last and len(self._asked) > 1 and 2 * len(self._rounds) > last:
            asked = f"{len(self._asked)} nodes were"
        else:
            return ""
        rounds = f"round {last}" if first == last else f"rounds {first} to {last}"
        return f"no result could be used in {rounds}, though {asked} asked: {self._reason}"
