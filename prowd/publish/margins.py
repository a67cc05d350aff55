"""ProWD's lead: over the baselines, against the ceiling, and in bytes for one accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from prowd.publish.table import LAST, by_system, markdown_row

_OURS, _CEILING, _BYTES_BASELINE = "ProWD", "all-Float32", "FedCOM"
_NAIVE = ("FedAvg", "GroupedAvg")
# What is no baseline: the ceiling's and a baseline's runs with parts that are not their own.
CONTROLS = frozenset({"all-Float32-server-step", "FedCOM-calibrated-broadcast"})
_ROUNDED = 1e-6


@dataclass(frozen=True)
class Margins:
    """Means over seeds, of one scenario; accuracies averaged over the clients, 0 to 1.

    Attributes
    ----------
    ceiling, ours : float
        Accuracy where every client is Float32, and of ProWD.
    best_baseline, baseline : str, float
        The most accurate of the others, and its accuracy.
    naive : dict of str to float
        Accuracies of FedAvg and GroupedAvg.
    baseline_bytes, our_bytes : float or None
        Sent up by FedCOM, and by ProWD, until the mean of three evaluations was at least the
        accuracy that FedCOM has in the table; None if it never was.
    """

    ceiling: float
    ours: float
    best_baseline: str
    baseline: float
    naive: dict[str, float]
    baseline_bytes: float | None
    our_bytes: float | None

    @property
    def distance_share(self) -> float | None:
        """Distance of ProWD to the ceiling over the best baseline's; None where either has none."""
        if max(self.ours, self.baseline) >= self.ceiling:
            return None
        return (self.ceiling - self.ours) / (self.ceiling - self.baseline)


def margins(results: Sequence[dict[str, Any]], scenario: str) -> Margins | None:
    """Return the margins in a scenario; None if one of their systems has no run there."""
    runs = by_system(result for result in results if result["scenario"] == scenario)
    if not {_OURS, _CEILING, _BYTES_BASELINE, *_NAIVE} <= runs.keys():
        return None
    accuracy = {s: mean(r["accuracy"]["average"] for r in own) for s, own in runs.items()}
    baselines = accuracy.keys() - {_OURS, _CEILING, *CONTROLS}
    best = max(sorted(baselines), key=accuracy.__getitem__)
    return Margins(
        ceiling=accuracy[_CEILING],
        ours=accuracy[_OURS],
        best_baseline=best,
        baseline=accuracy[best],
        naive={system: accuracy[system] for system in _NAIVE},
        baseline_bytes=_bytes_until(runs[_BYTES_BASELINE], accuracy[_BYTES_BASELINE]),
        our_bytes=_bytes_until(runs[_OURS], accuracy[_BYTES_BASELINE]),
    )


def _bytes_until(runs: list[dict[str, Any]], accuracy: float) -> float | None:
    """Bytes sent up until the mean over runs first had an accuracy, as tables have it."""
    points = list(zip(*(run["curve"] for run in runs), strict=True))
    reached = [mean(point["accuracy"] for point in one) for one in points]
    for end in range(min(LAST, len(points)), len(points) + 1):
        # Within what the summaries are rounded to.
        if mean(reached[max(0, end - LAST) : end]) > accuracy - _ROUNDED:
            return float(mean(point["uplink_bytes"] for point in points[end - 1]))
    return None


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Write the margins of all scenarios as one Markdown table; empty if there are none."""
    scenarios = dict.fromkeys(str(result["scenario"]) for result in results)
    found = {scenario: margins(results, scenario) for scenario in scenarios}
    lines = [
        "| | ceiling | ProWD | best baseline | distance to the ceiling, of the best baseline's "
        "| lead over FedAvg | over GroupedAvg | MB up for FedCOM's accuracy, FedCOM / ProWD |",
        "| --- " * 8 + "|",
    ]
    lines += [_row(scenario, margin) for scenario, margin in found.items() if margin is not None]
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _row(scenario: str, m: Margins) -> str:
    share = "above it" if m.ours > m.ceiling else "none"
    if m.distance_share is not None:
        share = f"{m.distance_share:.0%}"
    cells = [
        scenario,
        f"{100 * m.ceiling:.2f}",
        f"{100 * m.ours:.2f}",
        f"{m.best_baseline} {100 * m.baseline:.2f}",
        share,
        *(f"{100 * (m.ours - accuracy):+.2f}" for accuracy in m.naive.values()),
        f"{_megabytes(m.baseline_bytes)} / {_megabytes(m.our_bytes)}",
    ]
    return markdown_row(cells)


def _megabytes(sent: float | None) -> str:
    return "never" if sent is None else f"{sent / 1e6:.1f}"
