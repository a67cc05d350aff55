"""Curves of runs: what was reached after how many rounds and bytes, mean and spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import isfinite, nan
from statistics import mean, stdev
from typing import Any

from core.run_record import Round


def curve(rounds: Sequence[Round], width: str = "average") -> list[dict[str, float]]:
    """Return accuracy and bytes sent up so far, wherever the model was evaluated.

    Of one bit-width and its clients, or averaged and of all clients.
    """
    points, sent = [], 0
    for entry in rounds:
        up = entry.uplink_bytes
        sent += sum(up.values()) if width == "average" else up.get(width, 0)
        accuracy = round(entry.accuracy.get(width, nan), 6)
        if isfinite(accuracy):
            points.append({"round": entry.round, "uplink_bytes": sent, "accuracy": accuracy})
    return points


@dataclass(frozen=True)
class MeanPoint:
    """Mean over the seeds that have come to a round; `spread` is None for one seed."""

    x: float
    mean: float
    spread: float | None


def mean_points(
    curves: Sequence[Sequence[dict[str, Any]]], x: str, y: str, x_unit: float = 1, y_unit: float = 1
) -> list[MeanPoint]:
    """Average the curves of several seeds round by round, with their sample deviation.

    The points are given in `x_unit` and `y_unit`, as in megabytes and percent.
    """
    by_round: dict[int, list[dict[str, Any]]] = {}
    for point in chain.from_iterable(curves):
        by_round.setdefault(point["round"], []).append(point)
    points = []
    for _, found in sorted(by_round.items()):
        values = [point[y] / y_unit for point in found]
        spread = stdev(values) if len(values) > 1 else None
        points.append(MeanPoint(mean(point[x] for point in found) / x_unit, mean(values), spread))
    return points


def rises(points: Sequence[MeanPoint]) -> bool:
    """Return whether there is a curve over x; there is none over bytes where nothing is sent."""
    return any(p.x for p in points) and all(a.x < b.x for a, b in pairwise(points))
