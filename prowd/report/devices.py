"""What devices found when they evaluated, each on its own examples: mean, spread and the worst."""

from collections.abc import Iterator, Sequence
from math import nan
from statistics import mean

from core.run_record import Round
from prowd.publish.curves import MeanPoint
from prowd.records import Record
from prowd.report import charts
from prowd.report.charts import Chart
from prowd.report.series import Scenario, Series
from prowd.report.tables import Table

_HEAD = ["system", "devices", "metric", "mean", "spread", "worst", "loss"]


def device_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw for each bit-width the mean over its devices, the spread around it, and the worst."""
    for width in scenario.widths():
        lines = {series: _points(series, width) for series in scenario.series}
        lines = {series: points for series, points in lines.items() if points[0]}
        if not lines:
            continue
        figure = charts.canvas(235)
        axes = figure.subplots()
        ends: dict[str, float] = {}
        for series, (means, worst) in lines.items():
            style = charts.line_style(series.style)
            charts.plot_mean(axes, means, style)
            thin = {**style, "linewidth": 0.8, "markersize": 2.5}
            axes.plot([p.x for p in worst], [p.mean for p in worst], **thin)
            ends |= {series.name: means[-1].mean, f"{series.name}, worst": worst[-1].mean}
        axes.set(xlabel="round", ylabel="accuracy (%)")
        charts.tick_rounds(axes)
        text = f"Mean over devices; at the end: {charts.described(ends)}."
        note = "Band: standard deviation over devices. Thin line: the worst device."
        yield charts.finish(figure, f"On {width}-bit devices, over rounds", text, note)


def _points(series: Series, width: str) -> tuple[list[MeanPoint], list[MeanPoint]]:
    """Return mean and spread over devices by round, and the worst, each averaged over seeds."""
    by_round: dict[int, list[Round]] = {}
    for record in series.records:
        for entry in record.rounds:
            if f"worst-{width}" in entry.evaluated_by_clients:
                by_round.setdefault(entry.round, []).append(entry)

    def at(entries: Sequence[Round], key: str) -> float:
        return 100 * mean(e.evaluated_by_clients.get(f"{key}-{width}", nan) for e in entries)

    rounds = sorted(by_round.items())
    means = [MeanPoint(n, at(found, "accuracy"), at(found, "spread")) for n, found in rounds]
    return means, [MeanPoint(n, at(found, "worst"), None) for n, found in rounds]


def device_table(scenario: Scenario) -> Table:
    """Show the last evaluation on devices of each system, by width, with all metrics."""
    rows = [row for series in scenario.series for row in _rows(series)]
    note = (
        "The last round in which devices evaluated, each on its own examples; means over seeds. "
        "Spread: standard deviation over devices. Of metrics beside the first no worst is known: "
        "the least and the most of any device."
    )
    return Table(_HEAD, rows, note, "numbers")


def _rows(series: Series) -> Iterator[list[str]]:
    last = [found for record in series.longest if (found := _last(record))]
    keys = dict.fromkeys(key for found in last for key in found)

    def value(key: str) -> float:
        return mean(found.get(key, nan) for found in last)

    for width in [key.removeprefix("worst-") for key in keys if key.startswith("worst-")]:
        name = "all" if width == "average" else f"{width}-bit"
        first, spread, worst = (value(f"{k}-{width}") for k in ("accuracy", "spread", "worst"))
        loss = charts.number(value(f"loss-{width}"))
        yield [series.name, name, "first", f"{first:.2%}", f"{spread:.2%}", f"{worst:.2%}", loss]
        ending = f"/mean-{width}"
        for metric in [key.removesuffix(ending) for key in keys if key.endswith(ending)]:
            shown = [
                charts.number(value(f"{metric}/{k}-{width}"))
                for k in ("mean", "spread", "least", "most")
            ]
            yield [series.name, name, metric, *shown[:2], f"{shown[2]} to {shown[3]}", ""]


def _last(record: Record) -> dict[str, float]:
    """Return what devices found last, empty if they never evaluated."""
    found = (e.evaluated_by_clients for e in reversed(record.rounds) if e.evaluated_by_clients)
    return next(found, {})
