"""Pictures of an experiment: averaged accuracy over rounds and over bytes sent, mean and spread."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from prowd.publish.curves import mean_points, rises
from prowd.publish.table import by_system
from prowd.report.charts import COLORS, line_style, plot_mean, tick_powers, tick_rounds

_OURS = "ProWD"
# A system's place among these decides on its color and line.
_NAMES = (
    *("Local", "FedCOM", "FedPAQ", "GroupedAvg"),
    *(_OURS, "FedCOMGATE", "FedProx", "FedAvg"),
    "all-Float32",
)


def draw(scenario: str, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one scenario of an experiment's results.

    Parameters
    ----------
    scenario : str
        Its name.
    results : sequence of dict
        What `prowd.publish.table.result_of` returned, of any scenarios.
    path : Path
        SVG file that is written.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    systems = by_system(result for result in results if result["scenario"] == scenario)
    ranked = sorted(systems, key=lambda s: -mean(r["accuracy"]["average"] for r in systems[s]))
    styles = _styles(results)
    for system in ranked:
        curves = [run["curve"] for run in systems[system]]
        plot_mean(by_round, mean_points(curves, "round", "accuracy", 1, 0.01), styles[system])
        sent = mean_points(curves, "uplink_bytes", "accuracy", 1e6, 0.01)
        if rises(sent):
            plot_mean(by_bytes, sent, styles[system])
    by_round.set(xlabel="round", ylabel="averaged accuracy (%)")
    by_bytes.set(xlabel="MB sent by all clients")
    tick_rounds(by_round)
    tick_powers(by_bytes)
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    handles, labels = by_round.get_legend_handles_labels()
    # Long enough that dashes show beside the marker.
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.5)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the same file from the same numbers, so that a picture changes only when they do."""
    with matplotlib.rc_context({"svg.hashsalt": "prowd"}):
        figure.savefig(path, metadata={"Date": None})


def _styles(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how each system is drawn: by its name, whatever its rank, in any scenario.

    Those that have no place here come after those that have one, in the order of their names.
    """
    others = sorted(by_system(results).keys() - set(_NAMES))
    styles = {}
    for number, system in enumerate((*_NAMES, *others)):
        styles[system] = {
            **line_style(number),
            # Where the same color comes again, markers are hollow, then full.
            "fillstyle": "none" if number // len(COLORS) % 2 else "full",
            "linewidth": 2.4 if system == _OURS else 1.3,
            "label": system,
        }
    return styles
