"""The table of an experiment: accuracy per width and averaged, mean and spread over seeds."""

import json
from collections.abc import Iterable, Mapping
from math import isfinite, nan
from statistics import mean, stdev
from typing import Any

from prowd.publish.curves import curve
from prowd.records import Record

# A single round of low-bit training swings by a point; the end of a run is its last few.
LAST = 3


def result_of(scenario: str, system: str, seed: object, record: Record) -> dict[str, Any] | None:
    """Return what the table needs of a run, None if the model was never evaluated.

    Accuracies are means over the last three rounds that were evaluated; bytes are totals.
    """
    rounds = record.rounds
    known = [entry.accuracy for entry in rounds if _is_known(entry.accuracy, "average")]
    evaluated = known[-LAST:]
    if not evaluated:
        return None
    widths = [w for w in evaluated[-1] if all(_is_known(accuracy, w) for accuracy in evaluated)]
    return {
        "scenario": scenario,
        "system": system,
        "seed": seed,
        "accuracy": {w: round(mean(a[w] for a in evaluated), 6) for w in widths},
        "uplink_bytes": sum(sum(entry.uplink_bytes.values()) for entry in rounds),
        "downlink_bytes": sum(sum(entry.downlink_bytes.values()) for entry in rounds),
        "seconds": round(sum(entry.seconds.get("round", 0) for entry in rounds)),
        "curve": curve(rounds),
    }


def _is_known(accuracy: Mapping[str, float], width: str) -> bool:
    return isfinite(accuracy.get(width, nan))


def by_system(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group results by the system that they are of."""
    systems: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        systems.setdefault(str(result["system"]), []).append(result)
    return systems


def make_table(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather results by system, best averaged accuracy first.

    Returns
    -------
    list of dict
        Per system its name, number of seeds, per width mean and standard deviation of the
        accuracy (None for one seed), and mean bytes.
    """
    rows = []
    for system, runs in by_system(results).items():
        widths = [w for w in runs[0]["accuracy"] if all(w in run["accuracy"] for run in runs)]
        accuracy = {}
        for width in widths:
            values = [run["accuracy"][width] for run in runs]
            spread = stdev(values) if len(values) > 1 else None
            accuracy[width] = {"mean": mean(values), "spread": spread}
        rows.append(
            {
                "system": system,
                "seeds": len(runs),
                "accuracy": accuracy,
                "uplink_bytes": mean(run["uplink_bytes"] for run in runs),
                "downlink_bytes": mean(run["downlink_bytes"] for run in runs),
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"]["average"]["mean"])


def to_markdown(title: str, results: list[dict[str, Any]]) -> str:
    """Write a table for each scenario as Markdown; accuracies in percent, bytes in megabytes."""
    scenarios = dict.fromkeys(str(result["scenario"]) for result in results)
    parts = []
    for scenario in scenarios:
        rows = make_table(r for r in results if r["scenario"] == scenario)
        parts.append(_scenario_table(f"{title}: {scenario}", rows))
    return "\n".join(parts)


def to_json(title: str, results: Iterable[dict[str, Any]]) -> str:
    """Write what the tables are made from, a line a run."""
    lines = ",\n".join(json.dumps(result, allow_nan=False) for result in results)
    return f'{{"title": {json.dumps(title)}, "results": [\n{lines}\n]}}\n'


def _scenario_table(title: str, rows: list[dict[str, Any]]) -> str:
    widths = widths_of(rows)
    head = ["system", *(f"{w}-bit" for w in widths), "averaged", "MB up", "MB down", "seeds"]
    lines = [f"### {title}", "", markdown_row(head), markdown_row(["---"] * len(head))]
    for row in rows:
        cells = [accuracy_cell(row["accuracy"].get(width)) for width in (*widths, "average")]
        sizes = [f"{row[key] / 1e6:.2f}" for key in ("uplink_bytes", "downlink_bytes")]
        lines.append(markdown_row([row["system"], *cells, *sizes, str(row["seeds"])]))
    return "\n".join(lines) + "\n"


def markdown_row(cells: list[str]) -> str:
    """Write a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def widths_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the bit-widths of any row, rising."""
    found = {width for row in rows for width in row["accuracy"]} - {"average"}
    return sorted(found, key=int)


def accuracy_cell(accuracy: dict[str, float] | None) -> str:
    """Write mean and spread in percent."""
    if accuracy is None:
        return "-"
    spread = accuracy["spread"]
    text = f"{100 * accuracy['mean']:.2f}"
    return text if spread is None else f"{text} ± {100 * spread:.2f}"
