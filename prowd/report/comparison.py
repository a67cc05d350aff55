"""What systems are compared by: accuracy over rounds and bytes, bytes by width, time by part."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from prowd.publish.curves import MeanPoint, curve, mean_points, rises
from prowd.report import charts
from prowd.report.series import Scenario, Series
from prowd.report.ticks import tick_powers, tick_rounds

_PARTS = ("train", "aggregate", "evaluate")
# Points: a bar, and a row's name and space above its bars.
_BAR, _ROW, _FRAME = 15, 24, 74


def accuracy_figures(scenario: Scenario) -> Iterator[charts.Figure]:
    """Draw accuracy over rounds, then over bytes, averaged and of each bit-width."""
    for x in ("round", "uplink_bytes"):
        for width in ("average", *scenario.widths()):
            figure = _accuracy_figure(scenario, width, x)
            if figure is not None:
                yield figure


def _accuracy_figure(scenario: Scenario, width: str, x: str) -> charts.Figure | None:
    of, senders = ("averaged", "all") if width == "average" else (f"{width}-bit", f"{width}-bit")
    over = "rounds" if x == "round" else "bytes sent"
    lines = {
        series: _percent(
            mean_points([curve(r.rounds, width) for r in series.records], x, "accuracy")
        )
        for series in scenario.series
    }
    lines = {series: points for series, points in lines.items() if points}
    silent = [s.name for s, points in lines.items() if x == "uplink_bytes" and not rises(points)]
    lines = {series: points for series, points in lines.items() if series.name not in silent}
    note = f"{', '.join(silent)}: nothing is sent." if silent else ""
    label = "round" if x == "round" else f"sent by {senders} clients (MB)"
    unit = 1 if x == "round" else 1e6
    title = f"Accuracy, {of}, over {over}"
    return line_figure(title, label, "accuracy (%)", lines, note, unit, log=x != "round")


def line_figure(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[Series, Sequence[MeanPoint]],
    note: str = "",
    x_unit: float = 1,
    log: bool = False,
) -> charts.Figure | None:
    """Draw a line a system, with the spread over its seeds; None if there is no line."""
    if not lines:
        return None
    drawn = charts.canvas(235)
    axes = drawn.subplots()
    for series, points in lines.items():
        few = max(1, len(points) // 12)
        charts.plot_mean(
            axes, points, {**charts.line_style(series.style), "markevery": few}, x_unit
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    if log:
        tick_powers(axes)
    else:
        tick_rounds(axes)
    ends = {series.name: points[-1].mean for series, points in lines.items()}
    text = f"{y_label} against {x_label}; at the end: {charts.described(ends)}."
    return charts.finish(drawn, title, text, note)


def _percent(points: Iterable[MeanPoint]) -> list[MeanPoint]:
    return [
        MeanPoint(p.x, 100 * p.mean, None if p.spread is None else 100 * p.spread) for p in points
    ]


def bytes_figures(scenario: Scenario) -> Iterator[charts.Figure]:
    """Draw the bytes that the clients of each width send and are sent in a round."""
    kinds = [f"{w}-bit" for w in scenario.widths()]
    for direction, key in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
        rows = {
            series.name: {
                f"{w}-bit": _mean_of_rounds(series, key, w) / 1e6 for w in series.widths()
            }
            for series in scenario.series
        }
        yield _bars(
            f"Bytes {direction} a round, by width", "MB, all clients of a width", kinds, rows
        )


def seconds_figure(scenario: Scenario) -> charts.Figure:
    """Draw the time that each part of a round takes."""
    rows = {
        series.name: {part: _mean_of_rounds(series, "seconds", part) for part in _PARTS}
        for series in scenario.series
    }
    return _bars(
        "Seconds of a round, by part", "seconds, mean of all rounds", _PARTS, rows, stacked=True
    )


def _mean_of_rounds(series: Series, key: str, part: str) -> float:
    rounds = (entry for record in series.records for entry in record.rounds)
    return mean(getattr(entry, key).get(part, 0.0) for entry in rounds)


def _bars(
    title: str,
    x_label: str,
    kinds: Sequence[str],
    rows: Mapping[str, Mapping[str, float]],
    stacked: bool = False,
) -> charts.Figure:
    """Draw for each row its bars, one below the other or end to end, and what they come to."""
    height = _ROW + _BAR * (1 if stacked else len(kinds))
    drawn = charts.canvas(_FRAME + height * len(rows))
    axes = drawn.subplots()
    most = max((sum if stacked else max)([0.0, *row.values()]) for row in rows.values())
    tops = [-height * i - _ROW for i in range(len(rows))]
    for top, row in zip(tops, rows.values(), strict=True):
        if stacked:
            _stack(axes, top, [row[kind] for kind in kinds])
        else:
            _list(axes, top, [row.get(kind) for kind in kinds])
    charts.label_rows(axes, list(rows), tops)
    # Room for the numbers behind the bars.
    axes.set(xlabel=x_label, xlim=(0, (most or 1) * 1.22), ylim=(-height * len(rows), 0))
    handles = [Patch(color=charts.color(i), label=kind) for i, kind in enumerate(kinds)]
    drawn.legend(
        handles=handles, loc="outside upper left", ncols=min(4, len(kinds)), handlelength=1
    )
    text = " ".join(f"{name}: {charts.described(row)}." for name, row in rows.items())
    return charts.finish(drawn, title, f"{x_label}. {text}")


def _list(axes: Axes, top: float, values: Sequence[float | None]) -> None:
    for number, value in enumerate(values):
        if value is None:
            continue
        middle = top - _BAR * (number + 0.5)
        axes.barh(middle, value, _BAR * 0.8, color=charts.color(number))
        _annotate(axes, value, middle)


def _stack(axes: Axes, top: float, values: Sequence[float]) -> None:
    left = 0.0
    for number, value in enumerate(values):
        axes.barh(top - _BAR / 2, value, _BAR * 0.8, left=left, color=charts.color(number))
        left += value
    _annotate(axes, left, top - _BAR / 2)


def _annotate(axes: Axes, value: float, middle: float) -> None:
    text = f"{value:.3g}"
    axes.annotate(
        text, (value, middle), xytext=(3, 0), textcoords="offset points", va="center_baseline"
    )
