"""Tables of the page: what systems came to, the runs, and the clients that were left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.mix import width_name
from prowd.publish.table import accuracy_cell, make_table, result_of, widths_of
from prowd.records import Record
from prowd.report.series import Scenario, Series

# Reasons differ from round to round in a run gone wrong; all of them are in its rounds.jsonl.
_MOST_ROWS = 200
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Table:
    """Head and rows of a table; cells are text.

    Attributes
    ----------
    head, rows : sequence
        Cells.
    note : str
        What stands below.
    layout : str
        How it fits where the page is narrow: "numbers" has slim columns, of "stacks" each row is a
        paragraph, for rows that are read one by one.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    layout: Literal["plain", "numbers", "stacks"] = "plain"


def accuracy_table(scenario: Scenario) -> Table:
    """Show accuracy, bytes and how far it came of each system that was evaluated."""
    by_name = {series.name: series for series in scenario.series}
    results = [
        result_of(scenario.name, series.name, record.settings.get("seed"), record)
        for series in scenario.series
        for record in series.longest
    ]
    rows = make_table(result for result in results if result)
    widths = [*widths_of(rows), "average"]
    head = ["system", *(f"{w}-bit (%)" for w in widths[:-1]), "averaged (%)", "MB up", "MB down"]
    cells = [
        [
            _marked(by_name[row["system"]]),
            *(_unbroken(accuracy_cell(row["accuracy"].get(width))) for width in widths),
            *(f"{row[key] / 1e6:.2f}" for key in ("uplink_bytes", "downlink_bytes")),
            _unbroken(_rounds(by_name[row["system"]])),
            str(row["seeds"]),
        ]
        for row in rows
    ]
    note = (
        "Means of the last three rounds that were evaluated, with mean and standard deviation over "
        "seeds; bytes of all rounds. A run that did not come as far as others of its system is "
        "left out."
    )
    if any(by_name[row["system"]].end for row in rows):
        note += " A system that is not finished cannot be compared with the others."
    return Table([*head, "rounds", "seeds"], cells, note, "numbers")


def _unbroken(cell: str) -> str:
    # A line may end before the spread, but nowhere else.
    return cell.replace(" ", _NO_BREAK).replace(f"{_NO_BREAK}±", " ±")


def _marked(series: Series) -> str:
    return f"{series.name} ({series.end})" if series.end else series.name


def _rounds(series: Series) -> str:
    record = series.longest[0]
    return f"{record.rounds[-1].round} of {record.num_rounds or '?'}"


def with_seeds(series: Series) -> str:
    """Name a system with what its line is made from."""
    count = len(series.records)
    lengths = {record.rounds[-1].round for record in series.records}
    said = [f"{count} {'seed' if count == 1 else 'seeds'}"]
    if len(lengths) > 1:
        said.append(f"{min(lengths)} to {max(lengths)} rounds")
    if series.end:
        said.append(f"{series.end}: {_rounds(series)} rounds")
    return f"{series.name} ({', '.join(said)})"


def runs_table(records: Sequence[Record], scenarios: Sequence[Scenario]) -> Table:
    """Show how each run went."""
    # A run may be in several scenarios.
    names: dict[int, dict[str, None]] = {}
    for series in (s for scenario in scenarios for s in scenario.series):
        for record in series.records:
            names.setdefault(id(record), {})[series.name] = None
    rows = []
    for record in records:
        last = next((e.accuracy for e in reversed(record.rounds) if e.accuracy), {})
        rows.append(
            [
                record.folder.name,
                _status(record),
                ", ".join(names.get(id(record), "-")),
                str(record.settings.get("seed", "-")),
                f"{record.rounds[-1].round if record.rounds else 0} of {record.num_rounds or '?'}",
                ", ".join(f"{width_name(w)} {value:.2%}" for w, value in last.items()) or "-",
                f"{sum(e.seconds.get('round', 0) for e in record.rounds):.0f}",
                record.config.date[:16].replace("T", " ") or "-",
            ]
        )
    head = ["run", "status", "system", "seed", "rounds", "last accuracy", "seconds", "begun"]
    protected = [_protection(record) for record in records]
    if any(protected):
        head.append("privacy")
        rows = [[*row, said or "none"] for row, said in zip(rows, protected, strict=True)]
    return Table(head, rows, layout="stacks")


def _protection(record: Record) -> str:
    """Return how a run kept its devices private; empty if in no way."""
    said = []
    if any(entry.secure for entry in record.rounds):
        said.append("secure aggregation")
    if spent := next((e.privacy for e in reversed(record.rounds) if e.privacy), None):
        epsilon, delta = (spent.get(key, math.nan) for key in ("epsilon", "delta"))
        said.append(f"epsilon {epsilon:.3g} at delta {delta:g}")
    return ", ".join(said)


def _status(record: Record) -> str:
    status, reason = record.summary.status, record.summary.reason
    if status == "running":
        return f"not finished: {reason or 'still running'}"
    return f"{status}: {reason}" if reason else status or "unknown"


def left_out_table(records: Sequence[Record]) -> Table:
    """Gather the clients that were left out, by run, partition and reason."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for record in records:
        for entry in record.rounds:
            for of, left_out in (
                ("training", entry.left_out),
                ("evaluation", entry.left_out_of_evaluation),
            ):
                for partition, reason in left_out.items():
                    key = (record.folder.name, partition, of, reason)
                    found.setdefault(key, []).append(entry.round)
    rows = [[*key[:3], _ranges(rounds), key[3]] for key, rounds in found.items()]
    more = len(rows) - _MOST_ROWS
    note = f"And {more} more; all of them are in the runs' rounds.jsonl." if more > 0 else ""
    return Table(
        ["run", "partition", "of", "rounds", "why"], rows[:_MOST_ROWS], note, layout="stacks"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as in ``1 to 3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
