"""One page of HTML that needs nothing but itself: no script, no other file, no network."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from core.files import write_atomic
from prowd.records import Record
from prowd.report import charts
from prowd.report.comparison import accuracy_figures, bytes_figures, seconds_figure
from prowd.report.dequantization import loss_figures, mask_figures, weight_figures
from prowd.report.series import Scenario, arrange, by_settings
from prowd.report.settings import common_table, disagreements, scenario_settings
from prowd.report.tables import (
    Table,
    accuracy_table,
    left_out_table,
    runs_table,
    with_seeds,
)

_NO_MASK = "Nothing was masked: every coordinate of every low-bit group was kept."
_NO_LOSS = "The dequantizer was not fine-tuned (prowd-finetune-every)."
_NO_WEIGHTS = (
    "No run recorded the weights of its groups (weights.jsonl): ProWD does, since it has been "
    "there, in rounds that are evaluated and have clients of two widths."
)


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
    alarms: Sequence[str]
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
    environment = Environment(
        loader=PackageLoader("prowd.report", "."),
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
        ends=_ends(records),
        runs=runs_table(records, scenarios),
        damage=[(record.folder, record.damage) for record in records if record.damage],
        sections=sections,
        settings=scenario_settings(scenarios),
        common=common_table(scenarios),
        left_out=left_out_table(records),
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
    return Section(scenario.name, accuracy_table(scenario), disagreements(scenario), parts)


def _legend(scenario: Scenario, title: str) -> list[tuple[Markup, str]]:
    name = f"{title}, {scenario.name}"
    return [(charts.swatch(s.style, name), with_seeds(s)) for s in scenario.series]


def _ends(records: Sequence[Record]) -> str:
    """Count the runs and how they ended."""
    counts = Counter(record.summary.status or "end unknown" for record in records)
    said = [f"{n} {'not finished' if end == 'running' else end}" for end, n in counts.items()]
    return f"{len(records)} {'run' if len(records) == 1 else 'runs'}: {', '.join(said)}"
