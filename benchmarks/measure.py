"""Timing side by side, and the form in which every benchmark reports."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Figure:
    """One measured ratio.

    Attributes
    ----------
    name : str
        What was measured.
    value : float
        Ratio of the medians.
    goal : float
        What it is to stay at or below.
    spread : float
        Range of the middle half of the ratios, turn by turn; 0 if the figure is exact.
    repeats : int
        Turns.
    """

    name: str
    value: float
    goal: float
    spread: float = 0.0
    repeats: int = 1

    @property
    def holds(self) -> bool:
        """Whether the goal is met."""
        return self.value <= self.goal


def side_by_side(
    candidates: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Time candidates in turns, so that what disturbs one disturbs all.

    Parameters
    ----------
    candidates : mapping of str to callable
        What is timed, by name; each is called once beforehand.
    repeats : int
        Turns.

    Returns
    -------
    dict of str to list of float
        Seconds of each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], goal: float) -> Figure:
    """Compare two candidates of `side_by_side`."""
    turns = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(turns, n=4) if len(turns) > 1 else (turns[0],) * 3
    return Figure(name, median(ours) / median(theirs), goal, high - low, len(turns))


def report(benchmark: str, figures: Sequence[Figure]) -> None:
    """Print the figures as a table and, as the last line, JSON."""
    print("| figure | value | goal | spread | repeats | holds |")
    print("| --- " * 6 + "|")
    for f in figures:
        answer = "yes" if f.holds else "no"
        print(
            f"| {f.name} | {f.value:.3f} | {f.goal:g} | {f.spread:.3f} | {f.repeats} | {answer} |"
        )
    entries = [
        {
            "name": f.name,
            "value": round(f.value, 4),
            "goal": f.goal,
            "holds": f.holds,
            "spread": round(f.spread, 4),
            "repeats": f.repeats,
        }
        for f in figures
    ]
    print(json.dumps({"benchmark": benchmark, "figures": entries}))
