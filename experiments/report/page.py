"""One page of HTML that needs nothing but itself: no script, no other file, no network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments.records import Record
from experiments.report import charts
from experiments.report.comparison import accuracy_figures, bytes_figures, seconds_figure
from experiments.report.dequantization import loss_figures, mask_figures, weight_figures
from experiments.report.series import (
    Scenario,
    Series,
    arrange,
    by_settings,
    common_settings,
    different_settings,
)
from experiments.table import accuracy_cell, make_table, result_of, widths_of
from task.files import write_atomic
from task.mix import width_name

# Reasons differ from round to round in a run gone wrong; all of them stand in its rounds.jsonl.
_MOST_ROWS = 200
_NO_MASK = "Nothing was masked: every coordinate of every low-bit group was kept."
_NO_LOSS = "The dequantizer was not fine-tuned (prowd-finetune-every)."
_NO_WEIGHTS = (
    "No run recorded the weights of its groups (weights.jsonl): ProWD does, since it has been "
    "there, in rounds that are evaluated and have clients of two widths."
)


@dataclass(frozen=True)
class Table:
    """Head and rows of a table; cells are text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """Figures under a heading, or what is said where there are none."""

    title: str
    figures: Sequence[charts.Figure]
    otherwise: str = ""
    # What the colors of its lines mean, where they are the systems'.
    legend: Sequence[tuple[Markup, str]] = ()


@dataclass(frozen=True)
class Section:
    """What the page shows of one scenario."""

    name: str
    accuracy: Table
    parts: Sequence[Part]


def write_page(
    path: Path,
    title: str,
    records: Sequence[Record],
    named: Iterable[tuple[str, str, Record]] | None = None,
) -> None:
    """Write the report of some runs.

    Parameters
    ----------
    path : Path
        HTML file that is written.
    title : str
        Of the page.
    records : sequence of Record
        All runs, also those that have no rounds.
    named : iterable of (str, str, Record), optional
        Scenario and system of each run. Without it, their settings tell.
    """
    told = [record for record in records if record.rounds]
    with_rounds = [part for part in named or () if part[2].rounds]
    scenarios = by_settings(told) if named is None else arrange(with_rounds)
    series = list({s.name: s for scenario in scenarios for s in scenario.series}.values())
    environment = Environment(
        loader=PackageLoader("experiments.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with charts.styled():
        sections = [_section(scenario) for scenario in scenarios]
    text = environment.get_template("page.html").render(
        title=title,
        num_colors=charts.NUM_COLORS,
        runs=_runs(records, scenarios),
        damage=[(record.folder, record.damage) for record in records if record.damage],
        sections=sections,
        different=_different(series),
        common=_common(series),
        left_out=_left_out(records),
    )
    write_atomic(path, text.encode(errors="replace"))


def _section(scenario: Scenario) -> Section:
    of_systems = {
        "Accuracy": (accuracy_figures, "No run was evaluated yet."),
        "Masks": (mask_figures, _NO_MASK),
        "Dequantizer": (loss_figures, _NO_LOSS),
    }
    accuracy, masks, losses = (
        Part(title, list(figures(scenario)), otherwise, _legend(scenario, title))
        for title, (figures, otherwise) in of_systems.items()
    )
    title = "Weights, before and after dequantization"
    weights = Part(title, list(weight_figures(scenario)), _NO_WEIGHTS)
    costs = Part("Bytes and time", [*bytes_figures(scenario), seconds_figure(scenario)])
    parts = [accuracy, costs, weights, masks, losses]
    return Section(scenario.name, _accuracy(scenario), parts)


def _legend(scenario: Scenario, title: str) -> list[tuple[Markup, str]]:
    name = f"{title}, {scenario.name}"
    return [(charts.swatch(s.style, name), _with_seeds(s)) for s in scenario.series]


def _with_seeds(series: Series) -> str:
    count = len(series.records)
    lengths = {record.rounds[-1].round for record in series.records}
    short = "" if len(lengths) == 1 else f", {min(lengths)} to {max(lengths)} rounds"
    return f"{series.name} ({count} {'seed' if count == 1 else 'seeds'}{short})"


def _accuracy(scenario: Scenario) -> Table:
    results = [
        result_of(scenario.name, series.name, record.settings.get("seed"), record)
        for series in scenario.series
        for record in _longest(series)
    ]
    rows = make_table(result for result in results if result)
    widths = [*widths_of(rows), "average"]
    head = ["system", *(f"{w}-bit (%)" for w in widths[:-1]), "averaged (%)", "MB up", "MB down"]
    cells = [
        [
            row["system"],
            *(accuracy_cell(row["accuracy"].get(width)) for width in widths),
            *(f"{row[key] / 1e6:.2f}" for key in ("uplink_bytes", "downlink_bytes")),
            str(row["seeds"]),
        ]
        for row in rows
    ]
    note = (
        "Means of the last three rounds that were evaluated, with mean and standard deviation over "
        "seeds; bytes of all rounds. A run that did not come as far as others of its system is "
        "left out."
    )
    return Table([*head, "seeds"], cells, note)


def _longest(series: Series) -> list[Record]:
    """Return the runs with the most rounds: one that is half done would lower the mean."""
    most = max(record.rounds[-1].round for record in series.records)
    return [record for record in series.records if record.rounds[-1].round == most]


def _runs(records: Sequence[Record], scenarios: Sequence[Scenario]) -> Table:
    names = {id(r): s.name for scenario in scenarios for s in scenario.series for r in s.records}
    rows = []
    for record in records:
        last = next((e.accuracy for e in reversed(record.rounds) if e.accuracy), {})
        rows.append(
            [
                record.folder.name,
                names.get(id(record), "-"),
                str(record.settings.get("seed", "-")),
                _status(record),
                f"{record.rounds[-1].round if record.rounds else 0} of {record.num_rounds or '?'}",
                ", ".join(f"{width_name(w)} {value:.2%}" for w, value in last.items()) or "-",
                f"{sum(e.seconds.get('round', 0) for e in record.rounds):.0f}",
                record.config.date[:16].replace("T", " ") or "-",
            ]
        )
    head = ["run", "system", "seed", "status", "rounds", "last accuracy", "seconds", "begun"]
    return Table(head, rows)


def _status(record: Record) -> str:
    status, reason = record.summary.status, record.summary.reason
    if status == "running":
        return "not finished: still running, or killed"
    return f"{status}: {reason}" if reason else status or "unknown"


def _different(series: Sequence[Series]) -> Table:
    rows = [[key, *map(_shown, values)] for key, values in different_settings(series).items()]
    return Table(["setting", *(s.name for s in series)], rows)


def _common(series: Sequence[Series]) -> Table:
    shared = common_settings(series).items()
    return Table(["setting", "value"], [[key, _shown(value)] for key, value in shared])


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _left_out(records: Sequence[Record]) -> Table:
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
    note = f"And {more} more; all of them stand in the runs' rounds.jsonl." if more > 0 else ""
    return Table(["run", "partition", "of", "rounds", "why"], rows[:_MOST_ROWS], note)


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as in ``1 to 3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
