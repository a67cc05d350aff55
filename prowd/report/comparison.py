"""What systems are compared by: accuracy over rounds and bytes, bytes by width, time by part."""

from collections.abc import Iterator, Mapping, Sequence
from math import nan
from statistics import mean

import numpy as np

from prowd.publish.curves import MeanPoint, curve, mean_points, rises
from prowd.report import charts
from prowd.report.charts import Chart
from prowd.report.series import Scenario, Series

_PARTS = ("train", "aggregate", "evaluate")


def accuracy_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw accuracy over rounds, then over bytes, averaged and of each bit-width."""
    for x in ("round", "uplink_bytes"):
        for width in ("average", *scenario.widths()):
            yield from _accuracy_chart(scenario, width, x)


def _accuracy_chart(scenario: Scenario, width: str, x: str) -> Iterator[Chart]:
    of, senders = ("averaged", "all") if width == "average" else (f"{width}-bit", f"{width}-bit")
    over_bytes = x == "uplink_bytes"
    lines: dict[Series, list[MeanPoint]] = {}
    silent = []
    for series in scenario.series:
        curves = [curve(record.rounds, width) for record in series.records]
        points = mean_points(curves, x, "accuracy", 1e6 if over_bytes else 1, 0.01)
        if points and over_bytes and not rises(points):
            silent.append(series.name)
        else:
            lines[series] = points
    title = f"Accuracy, {of}, over {'bytes sent' if over_bytes else 'rounds'}"
    label = f"sent by {senders} clients (MB)" if over_bytes else "round"
    note = f"{', '.join(silent)}: nothing is sent." if silent else ""
    yield from line_chart(title, label, "accuracy (%)", lines, note, log=over_bytes)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[Series, Sequence[MeanPoint]],
    note: str = "",
    log: bool = False,
) -> Iterator[Chart]:
    """Draw a line a system, with the spread over its seeds; nothing if there is no line."""
    lines = {series: points for series, points in lines.items() if points}
    if not lines:
        return
    figure = charts.canvas(235)
    axes = figure.subplots()
    for series, points in lines.items():
        charts.plot_mean(axes, points, charts.line_style(series.style))
    axes.set(xlabel=x_label, ylabel=y_label)
    (charts.tick_powers if log else charts.tick_rounds)(axes)
    ends = {series.name: points[-1].mean for series, points in lines.items()}
    text = f"{y_label} against {x_label}; at the end: {charts.described(ends)}."
    yield charts.finish(figure, title, text, note)


def cost_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw the bytes a round that the clients of each width send and are sent, and its time."""
    widths = scenario.widths()
    names = [f"{width}-bit" for width in widths]
    for direction, key in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
        rows = {s.name: _means(s, key, widths, 1e6) for s in scenario.series}
        title = f"Bytes {direction} a round, by width"
        yield _bars(title, "MB, all clients of a width", names, rows)
    rows = {s.name: _means(s, "seconds", _PARTS) for s in scenario.series}
    title = "Seconds of a round, by part"
    yield _bars(title, "seconds, mean of all rounds", _PARTS, rows, stacked=True)


def _means(series: Series, key: str, parts: Sequence[str], unit: float = 1) -> list[float]:
    """Return the mean over all rounds of each part; NaN for a width that is not there."""
    absent = set(parts) - {*series.widths(), *_PARTS}
    entries = [getattr(entry, key) for record in series.records for entry in record.rounds]
    return [
        nan if part in absent else mean(entry.get(part, 0.0) for entry in entries) / unit
        for part in parts
    ]


def _bars(
    title: str,
    x_label: str,
    parts: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    stacked: bool = False,
) -> Chart:
    """Draw for each row its bars, one below the other or end to end, and what they come to."""
    bar, name, frame = 15, 24, 74  # Points.
    height = name + bar * (1 if stacked else len(parts))
    figure = charts.canvas(frame + height * len(rows))
    axes = figure.subplots()
    tops = height * np.arange(len(rows)) + name
    ends = np.zeros(len(rows))
    for number, part in enumerate(parts):
        values = np.array([row[number] for row in rows.values()])
        middles = tops + bar * (0.5 if stacked else number + 0.5)
        left = ends if stacked else 0
        color = charts.COLORS[number % len(charts.COLORS)]
        bars = axes.barh(middles, values, bar * 0.8, left=left, color=color, label=part)
        ends = values + left
        if not stacked or part == parts[-1]:
            axes.bar_label(bars, [f"{end:.3g}" if end == end else "" for end in ends], padding=3)
    charts.label_rows(axes, list(rows), tops.tolist())
    most = axes.get_xlim()[1]
    # Room for the numbers beyond the bars.
    axes.set(xlabel=x_label, xlim=(0, most * 1.17), ylim=(height * len(rows), 0))
    figure.legend(loc="outside upper left", ncols=min(4, len(parts)), handlelength=1)
    known = {
        name: {part: value for part, value in zip(parts, row, strict=True) if value == value}
        for name, row in rows.items()
    }
    text = " ".join(f"{name}: {charts.described(row)}." for name, row in known.items())
    return charts.finish(figure, title, f"{x_label}. {text}")
