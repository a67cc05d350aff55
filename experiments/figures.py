"""Pictures of an experiment: averaged accuracy over rounds and over bytes sent, mean and spread."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.curves import MeanPoint, mean_points, rises
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
        curves = [_percent(run["curve"]) for run in systems[system]]
        plot_mean(by_round, mean_points(curves, "round", "accuracy"), style)
        sent = mean_points(curves, "uplink_bytes", "accuracy")
        if rises(sent):
            plot_mean(by_bytes, sent, style, 1e6)
    by_round.set(xlabel="round", ylabel="averaged accuracy (%)")
    by_bytes.set(xlabel="MB sent by all clients", xscale="log")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside right center", frameon=False)
    # The same file from the same numbers, so that a picture changes only when they do.
    with matplotlib.rc_context({"svg.hashsalt": "prowd"}):
        figure.savefig(path, metadata={"Date": None})


def _percent(curve: list[dict]) -> list[dict]:
    return [{**point, "accuracy": 100 * point["accuracy"]} for point in curve]


def plot_mean(axes: Axes, points: Sequence[MeanPoint], style: dict, x_unit: float = 1) -> None:
    """Draw means as a line and the spread around them as a band of its color."""
    x = [point.x / x_unit for point in points]
    axes.plot(x, [point.mean for point in points], **style)
    low, high = (
        [p.mean + sign * p.spread if p.spread is not None else p.mean for p in points]
        for sign in (-1, 1)
    )
    if low != high:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
