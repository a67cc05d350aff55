"""What ProWD does to weights: distributions before and after dequantization, masks, losses."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from core.run_record import Weights
from prowd.publish.curves import mean_points
from prowd.records import Record
from prowd.report import charts
from prowd.report.charts import Chart
from prowd.report.comparison import line_chart
from prowd.report.series import Scenario, Series

_LOSSES = {
    "reconstruction-loss": "Dequantizer, reconstruction loss",
    "distill-loss": "Dequantizer, distillation loss",
}
_ALL = "all layers"


def weight_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw the weights of each low-bit group beside those of the high-bit group.

    Of each system its first run that has them: all layers together in the first and the last round
    that was recorded, and every layer in the last.
    """
    for series in scenario.series:
        record = next((r for r in series.records if r.weights), None)
        if record is None:
            continue
        first, last = record.weights[0], record.weights[-1]
        for width in last.counts.before:
            if first is not last and width in first.counts.before:
                yield _weight_chart(series, record, first, width, layers=[])
            yield _weight_chart(series, record, last, width, layers=list(last.counts.high))


def _weight_chart(
    series: Series, record: Record, weights: Weights, width: str, layers: Sequence[str]
) -> Chart:
    """Draw distributions before and after, side by side: of all layers, below them of each."""
    row, title_row = 52, 18  # Points.
    heights = [95, row * len(layers)] if layers else [95]
    figure = charts.canvas(75 + sum(heights))
    panels = figure.subplots(
        len(heights), 2, squeeze=False, sharex=True, sharey="row", height_ratios=heights
    )
    names = (f"{weights.high}-bit", f"{width}-bit")
    counts, distances = weights.counts, {}
    for column, (when, of) in enumerate((("before", counts.before), ("after", counts.after))):
        for place, layer in enumerate([_ALL, *layers]):
            high, low = _shares(counts.high, layer), _shares(of[width], layer)
            distances[layer, when] = float(np.abs(low - high).sum() / 2)
            if layer == _ALL:
                _draw(panels[0, column], high, low, weights.reach, names)
            else:
                highest = (row - title_row) / max(high.max(), low.max(), 1e-9)
                bottom = -row * place
                _draw(
                    panels[1, column], high * highest, low * highest, weights.reach, names, bottom
                )
        panels[-1, column].set_xlabel(f"{when} (std of the layer)")
    panels[0, 0].set_ylabel("share (%)")
    if layers:
        tops = [-row * place - title_row for place in range(len(layers))]
        for axes in panels[1]:
            charts.label_rows(axes, [_short(layer) for layer in layers], tops)
        panels[1, 0].set_ylim(-row * len(layers), 0)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=2,
        handlelength=1.2,
    )
    title = f"Weights of the {width}-bit group, round {weights.round}: {series.name}"
    told = [
        f"{_short(layer)} before {distances[layer, 'before']:.4g} %, "
        f"after {distances[layer, 'after']:.4g} %"
        for layer in (_ALL, *layers)
    ]
    text = (
        f"Share of weights in each of {len(high)} bins, {width}-bit and {weights.high}-bit, before "
        f"and after dequantization. Share of the {width}-bit weights in bins other than those of "
        f"the {weights.high}-bit weights: {'; '.join(told)}."
    )
    note = (
        f"{distances[_ALL, 'before']:.1f} % in other bins before, "
        f"{distances[_ALL, 'after']:.1f} % after; seed {record.settings.get('seed')}."
    )
    return charts.finish(figure, title, text, note)


def _shares(counts: Mapping[str, Sequence[int]], layer: str) -> np.ndarray:
    found = np.sum(list(counts.values()), axis=0) if layer == _ALL else counts[layer]
    return 100 * np.asarray(found, dtype=float) / max(int(np.sum(found)), 1)


def _draw(
    axes: Axes,
    high: np.ndarray,
    low: np.ndarray,
    reach: float,
    names: tuple[str, str],
    bottom: float = 0.0,
) -> None:
    """Draw one distribution as an area, the other as a line over it."""
    edges = np.linspace(-reach, reach, len(high) + 1)
    blue, orange, *_ = charts.COLORS
    area: Any = {"fill": True, "alpha": 0.35, "linewidth": 0}
    axes.stairs(high + bottom, edges, baseline=bottom, color=blue, label=names[0], **area)
    line: Any = {"linewidth": 1.2}
    axes.stairs(low + bottom, edges, baseline=bottom, color=orange, label=names[1], **line)
    axes.set_xlim(-reach, reach)


def mask_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw the share of coordinates that the masks keep, if not all: over rounds, in each layer."""
    for width in scenario.widths():
        name = f"mask-density-{width}"
        entries = [e for s in scenario.series for record in s.records for e in record.rounds]
        if any((entry.figure(name) or 0.0) < 1 for entry in entries if name in entry.own):
            title = f"Mask of the {width}-bit group over rounds"
            yield from _own_chart(scenario, name, title, "coordinates kept (%)", 0.01)
    for series in scenario.series:
        found = {width: _densities(series, width) for width in series.widths()}
        if found := {width: layers for width, layers in found.items() if layers}:
            yield _density_chart(series, found)


def _densities(series: Series, width: str) -> dict[str, list[float]]:
    """Return for each layer the shares of its coordinates kept, in percent, one a round."""
    layers: dict[str, list[float]] = {}
    for record in series.records:
        for entry in record.rounds:
            for layer, share in entry.figures(f"mask-density-by-layer-{width}").items():
                layers.setdefault(layer, []).append(100 * share)
    return layers


def _density_chart(series: Series, found: Mapping[str, Mapping[str, list[float]]]) -> Chart:
    layers = list(dict.fromkeys(layer for densities in found.values() for layer in densities))
    row = 22 + 10 * len(found)  # Points.
    figure = charts.canvas(80 + row * len(layers))
    axes = figure.subplots()
    text = []
    for number, (width, densities) in enumerate(found.items()):
        means = {layer: mean(values) for layer, values in densities.items()}
        y = [row * layers.index(layer) + 26 + 10 * number for layer in densities]
        lows, highs = ([f(values) for values in densities.values()] for f in (min, max))
        style = charts.line_style(number) | {"linestyle": "none"}
        axes.hlines(y, lows, highs, color=style["color"], linewidth=1.2, alpha=0.6)
        axes.plot(list(means.values()), y, **style, label=f"{width}-bit")
        text.append(f"{width}-bit: {charts.described(means, ' %')}.")
    charts.label_rows(axes, [_short(n) for n in layers], [row * i + 20 for i in range(len(layers))])
    axes.set(xlim=(0, 100), ylim=(row * len(layers), 0), xlabel="coordinates kept (%)")
    figure.legend(loc="outside upper left", ncols=min(4, len(found)), handlelength=1)
    note = "Mean of the rounds that had a mask, and their range."
    return charts.finish(figure, f"Mask of each layer: {series.name}", " ".join(text), note)


def loss_charts(scenario: Scenario) -> Iterator[Chart]:
    """Draw the losses of the dequantizer's fine-tuning."""
    for name, title in _LOSSES.items():
        yield from _own_chart(scenario, name, title, "loss")


def _own_chart(
    scenario: Scenario, name: str, title: str, y_label: str, unit: float = 1
) -> Iterator[Chart]:
    """Draw over rounds what strategies report under a name."""
    lines = {
        series: mean_points([_own_curve(r, name) for r in series.records], "round", name, 1, unit)
        for series in scenario.series
    }
    yield from line_chart(title, "round", y_label, lines)


def _own_curve(record: Record, name: str) -> list[dict[str, float]]:
    found = [(entry.round, entry.figure(name)) for entry in record.rounds]
    return [
        {"round": r, name: value} for r, value in found if value is not None and isfinite(value)
    ]


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")
