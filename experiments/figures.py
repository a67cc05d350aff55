"""Pictures of an experiment: averaged accuracy over rounds and over bytes sent, mean and spread."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.table import by_system

_OURS = "ProWD"


def draw(scenario: str, results: Sequence[dict], path: Path) -> None:
    """Draw one scenario of an experiment's results.

    Parameters
    ----------
    scenario : str
        Its name.
    results : sequence of dict
        What `experiments.table.result_of` returned, of any scenarios.
    path : Path
        SVG file that is written.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    systems = by_system(result for result in results if result["scenario"] == scenario)
    ranked = sorted(systems, key=lambda s: -mean(r["accuracy"]["average"] for r in systems[s]))
    for number, system in enumerate(ranked):
        style = {
            "color": "black" if system == _OURS else f"C{number}",
            "linewidth": 2.4 if system == _OURS else 1.3,
            "label": system,
        }
        _line(by_round, systems[system], "round", 1, style)
        _line(by_bytes, systems[system], "uplink_bytes", 1e6, style)
    by_round.set(xlabel="round", ylabel="averaged accuracy (%)")
    by_bytes.set(xlabel="MB sent by all clients", xscale="log")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside right center", frameon=False)
    # The same file from the same numbers, so that a picture changes only when they do.
    with matplotlib.rc_context({"svg.hashsalt": "prowd"}):
        figure.savefig(path, metadata={"Date": None})


def _line(axes: Axes, runs: list[dict], key: str, unit: float, style: dict) -> None:
    points = list(zip(*(run["curve"] for run in runs), strict=True))
    x = [mean(p[key] for p in point) / unit for point in points]
    if not any(x) or any(a >= b for a, b in pairwise(x)):
        return  # nothing is sent in local training
    accuracies = [[100 * p["accuracy"] for p in point] for point in points]
    y = [mean(values) for values in accuracies]
    axes.plot(x, y, **style)
    if len(runs) > 1:
        spread = [stdev(values) for values in accuracies]
        low, high = zip(*((m - s, m + s) for m, s in zip(y, spread, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
