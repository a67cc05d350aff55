"""What ProWD does to weights: distributions before and after dequantization, masks, losses."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from statistics import mean

import numpy as np
from matplotlib.axes import Axes

from prowd.publish.curves import MeanPoint, mean_points
from prowd.records import Record, Weights
from prowd.report import charts
from prowd.report.comparison import line_figure
from prowd.report.series import Scenario, Series

_LOSSES = {
    "reconstruction-loss": "Dequantizer, reconstruction loss",
    "distill-loss": "Dequantizer, distillation loss",
}
_LOW, _HIGH = 1, 0
_LAYER_ROW = 52


def weight_figures(scenario: Scenario) -> Iterator[charts.Figure]:
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
            moments = [first] if first.round != last.round and width in first.counts.before else []
            for weights in [*moments, last]:
                yield _pooled(series, record, weights, width)
            yield _by_layer(series, record, last, width)


def _pooled(series: Series, record: Record, weights: Weights, width: str) -> charts.Figure:
    drawn = charts.canvas(270)
    panels = drawn.subplots(2, 1, sharex=True, sharey=True)
    high = _share(np.sum(list(weights.counts.high.values()), axis=0))
    distances = {}
    for axes, (when, counts) in zip(panels, _before_and_after(weights, width), strict=True):
        low = _share(np.sum(list(counts.values()), axis=0))
        _draw_shares(axes, low, high, weights.reach)
        distances[when] = float(np.abs(low - high).sum() / 2)
        axes.set_ylabel("share (%)")
        axes.text(0.02, 0.97, when, transform=axes.transAxes, va="top")
    panels[0].legend(
        [panels[0].lines[0], panels[0].collections[0]],
        [f"{width}-bit", f"{weights.high}-bit"],
        loc="upper right",
        handlelength=1.2,
    )
    panels[1].set_xlabel(f"weight (std of its layer, {weights.high}-bit)")
    title = f"Weights of the {width}-bit group, round {weights.round}: {series.name}"
    text = (
        f"Share of weights in each of {len(high)} bins, {width}-bit and {weights.high}-bit, before "
        f"and after dequantization. Share of the {width}-bit weights in bins other than those of "
        f"the {weights.high}-bit weights: {charts.described(distances, ' %')}."
    )
    return charts.finish(drawn, title, text, _note(record, distances))


def _by_layer(series: Series, record: Record, weights: Weights, width: str) -> charts.Figure:
    layers = list(weights.counts.high)
    drawn = charts.canvas(60 + _LAYER_ROW * len(layers))
    panels = drawn.subplots(1, 2, sharex=True, sharey=True)
    rows = [-_LAYER_ROW * (i + 1) for i in range(len(layers))]
    distances: dict[str, list[float]] = {}
    for axes, (when, counts) in zip(panels, _before_and_after(weights, width), strict=True):
        for layer, bottom in zip(layers, rows, strict=True):
            low, high = _share(counts[layer]), _share(weights.counts.high[layer])
            _draw_shares(axes, low, high, weights.reach, bottom, _LAYER_ROW - 18)
            distances.setdefault(when, []).append(float(np.abs(low - high).sum() / 2))
        axes.set_title(f"{when}", loc="left")
        axes.set_xlabel("weight (std)")
        axes.set(yticks=[], ylim=(-_LAYER_ROW * len(layers), 0))
        axes.spines["left"].set_visible(False)
    charts.label_rows(panels[0], [_layer(n) for n in layers], [r + _LAYER_ROW - 17 for r in rows])
    title = f"Layer by layer, {width}-bit group, round {weights.round}: {series.name}"
    means = {when: mean(found) for when, found in distances.items()}
    text = (
        f"As above for each of {len(layers)} layers, {width}-bit as a line over {weights.high}-bit "
        f"as an area. Share in other bins, mean of the layers: {charts.described(means, ' %')}."
    )
    note = f"Line: {width}-bit; area: {weights.high}-bit. {_note(record, means)}"
    return charts.finish(drawn, title, text, note)


def _before_and_after(
    weights: Weights, width: str
) -> list[tuple[str, Mapping[str, Sequence[int]]]]:
    counts = weights.counts
    return [("before", counts.before[width]), ("after", counts.after[width])]


def _share(counts: Sequence[int]) -> np.ndarray:
    total = max(int(np.sum(counts)), 1)
    return 100 * np.asarray(counts, dtype=float) / total


def _draw_shares(
    axes: Axes,
    low: np.ndarray,
    high: np.ndarray,
    reach: float,
    bottom: float = 0.0,
    height: float | None = None,
) -> None:
    """Draw two distributions; with a height, so that the higher one comes to it."""
    scale = 1.0 if height is None else height / max(low.max(), high.max(), 1e-9)
    edges = np.linspace(-reach, reach, len(low) + 1)
    axes.fill_between(
        edges,
        np.append(high, high[-1]) * scale + bottom,
        bottom,
        step="post",
        color=charts.color(_HIGH),
        alpha=0.35,
        linewidth=0,
    )
    axes.step(
        edges,
        np.append(low, low[-1]) * scale + bottom,
        where="post",
        color=charts.color(_LOW),
        linewidth=1.2,
    )
    axes.set_xlim(-reach, reach)


def _note(record: Record, distances: Mapping[str, float]) -> str:
    before, after = distances.values()
    seed = record.settings.get("seed")
    return f"{before:.1f} % in other bins before, {after:.1f} % after; seed {seed}."


def mask_figures(scenario: Scenario) -> Iterator[charts.Figure]:
    """Draw the share of coordinates that the masks keep, if not all: over rounds, in each layer."""
    for width in scenario.widths():
        if not _is_masked(scenario, width):
            continue
        figure = _own_figure(
            scenario,
            f"mask-density-{width}",
            f"Mask of the {width}-bit group over rounds",
            "coordinates kept (%)",
            100,
        )
        if figure is not None:
            yield figure
    for series in scenario.series:
        found = {width: _densities(series, width) for width in series.widths()}
        found = {width: layers for width, layers in found.items() if layers}
        if found:
            yield _density_figure(series, found)


def _is_masked(scenario: Scenario, width: str) -> bool:
    name = f"mask-density-{width}"
    rounds = [e for s in scenario.series for record in s.records for e in record.rounds]
    return any((entry.figure(name) or 0.0) < 1 for entry in rounds if name in entry.own)


def _densities(series: Series, width: str) -> dict[str, list[float]]:
    """Return for each layer the shares of its coordinates kept, in percent, one a round."""
    layers: dict[str, list[float]] = {}
    for record in series.records:
        for entry in record.rounds:
            for layer, share in entry.figures(f"mask-density-by-layer-{width}").items():
                layers.setdefault(layer, []).append(100 * share)
    return layers


def _density_figure(
    series: Series, found: Mapping[str, Mapping[str, list[float]]]
) -> charts.Figure:
    layers = list(dict.fromkeys(layer for densities in found.values() for layer in densities))
    row = 22 + 10 * len(found)
    drawn = charts.canvas(80 + row * len(layers))
    axes = drawn.subplots()
    for number, (width, densities) in enumerate(found.items()):
        style = charts.line_style(number) | {"linestyle": "none"}
        y = [-row * layers.index(layer) - 26 - 10 * number for layer in densities]
        x = [mean(values) for values in densities.values()]
        lows, highs = ([f(values) for values in densities.values()] for f in (min, max))
        axes.hlines(y, lows, highs, color=charts.color(number), linewidth=1.2, alpha=0.6)
        axes.plot(x, y, **style, label=f"{width}-bit")
    charts.label_rows(
        axes, [_layer(n) for n in layers], [-row * i - 20 for i in range(len(layers))]
    )
    axes.set(xlim=(0, 100), ylim=(-row * len(layers), 0), xlabel="coordinates kept (%)")
    drawn.legend(loc="outside upper left", ncols=min(4, len(found)), handlelength=1)
    text = " ".join(
        f"{width}-bit: {charts.described({n: mean(v) for n, v in densities.items()}, ' %')}."
        for width, densities in found.items()
    )
    note = "Mean of the rounds that had a mask, and their range."
    return charts.finish(drawn, f"Mask of each layer: {series.name}", text, note)


def loss_figures(scenario: Scenario) -> Iterator[charts.Figure]:
    """Draw the losses of the dequantizer's fine-tuning."""
    for name, title in _LOSSES.items():
        figure = _own_figure(scenario, name, title, "loss")
        if figure is not None:
            yield figure


def _own_figure(
    scenario: Scenario, name: str, title: str, y_label: str, unit: float = 1.0
) -> charts.Figure | None:
    lines: dict[Series, list[MeanPoint]] = {}
    for series in scenario.series:
        curves = [_own_curve(record, name, unit) for record in series.records]
        if any(curves):
            lines[series] = mean_points(curves, "round", name)
    return line_figure(title, "round", y_label, lines)


def _own_curve(record: Record, name: str, unit: float) -> list[dict[str, float]]:
    found = [(entry.round, entry.figure(name)) for entry in record.rounds]
    return [{"round": r, name: unit * v} for r, v in found if v is not None and isfinite(v)]


def _layer(name: str) -> str:
    return name.removesuffix(".weight")
