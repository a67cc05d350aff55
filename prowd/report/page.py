"""One self-contained page of HTML: no script, no other file, no network."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from core.errors import SettingsError
from core.files import write_atomic
from prowd.records import Record
from prowd.report import charts
from prowd.report.comparison import accuracy_charts, cost_charts
from prowd.report.dequantization import loss_charts, mask_charts, weight_charts
from prowd.report.devices import device_charts, device_table
from prowd.report.series import Scenario, arrange, by_settings
from prowd.report.settings import common_table, disagreements, scenario_settings
from prowd.report.tables import accuracy_table, left_out_table, runs_table, with_seeds

# The parts of a scenario: title, charts, whether a line is a system's, what is said without any.
_PARTS = (
    ("Accuracy", accuracy_charts, True, "No run was evaluated yet."),
    (
        "Evaluation on devices",
        device_charts,
        True,
        "Devices did not evaluate: they do where the server has no test set, or by "
        "fraction-evaluate.",
    ),
    ("Bytes and time", cost_charts, False, ""),
    (
        "Weights, before and after dequantization",
        weight_charts,
        False,
        "No run recorded the weights of its groups (weights.jsonl): ProWD does, in rounds that are "
        "evaluated and have clients of two widths.",
    ),
    (
        "Masks",
        mask_charts,
        True,
        "Nothing was masked: every coordinate of every low-bit group was kept.",
    ),
    (
        "Dequantizer",
        loss_charts,
        True,
        "The dequantizer was not fine-tuned (prowd-finetune-every).",
    ),
)


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
        Scenario and system of each run; by default from their settings.

    Raises
    ------
    SettingsError
        If it cannot be written.
    """
    if named is None:
        scenarios = by_settings([record for record in records if record.rounds])
    else:
        scenarios = arrange(part for part in named if part[2].rounds)
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
        themes=charts.THEMES,
        ends=_ends(records),
        runs=runs_table(records, scenarios),
        damage=[(record.folder, record.damage) for record in records if record.damage],
        sections=sections,
        settings=scenario_settings(scenarios),
        common=common_table(scenarios),
        left_out=left_out_table(records),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode(errors="replace"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None


def _section(scenario: Scenario) -> dict[str, Any]:
    """Return what the page shows of a scenario."""
    parts = []
    for title, draw, of_systems, otherwise in _PARTS:
        salt = f"{title}, {scenario.name}, "
        lines = scenario.series if of_systems else ()
        legend = [(charts.swatch(series.style, salt), with_seeds(series)) for series in lines]
        found = {"charts": list(draw(scenario)), "otherwise": otherwise, "legend": legend}
        table = device_table(scenario) if draw is device_charts and found["charts"] else None
        parts.append({"title": title, "table": table, **found})
    return {
        "name": scenario.name,
        "accuracy": accuracy_table(scenario),
        "alarms": disagreements(scenario),
        "parts": parts,
    }


def _ends(records: Sequence[Record]) -> str:
    """Count the runs and how they ended."""
    counts = Counter(record.summary.status or "end unknown" for record in records)
    said = [f"{n} {'not finished' if end == 'running' else end}" for end, n in counts.items()]
    return f"{len(records)} {'run' if len(records) == 1 else 'runs'}: {', '.join(said)}"
