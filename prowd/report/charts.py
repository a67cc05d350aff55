"""Charts of the report; their colors, lines and axes are those of the published figures too."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from exchange.protocol import plain
from prowd.publish.curves import MeanPoint

# Colors after Okabe and Ito, which the color-blind tell apart; lighter or darker for contrast on
# white, and beside each what the report has in its place on a dark page.
_DARK = {
    "#0072b2": "#56a8e0",
    "#c4500b": "#ff8a4c",
    "#00805f": "#2fc79b",
    "#b0528c": "#e79cc8",
    "#1b1f24": "#f2f4f6",
    "#a97500": "#e6b022",
    "#3a9bd0": "#9ad6f7",
    "#6b5fb5": "#ada2f5",
}
COLORS = tuple(_DARK)
_INK, _GRID = COLORS[4], "#d9dee3"
THEMES = [(light[1:], light, dark) for light, dark in {**_DARK, _GRID: "#343a41"}.items()]
_DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_MARKERS = "osD^vPX*"
# Points. The page shows a chart at least as many pixels wide, so that a point is a pixel or more.
_WIDTH = 360
_RC: Any = {
    "font.size": 11.5,
    "axes.titlesize": "medium",
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "grid.color": _GRID,
    **{f"{part}.facecolor": "none" for part in ("axes", "figure", "savefig")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    # Text stays text, and a dollar in a name is a dollar.
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes
    ----------
    title : str
        What it shows.
    text : str
        The same in words and numbers, for screen readers.
    svg : Markup
        The drawing.
    note : str
        What is worth knowing besides.
    """

    title: str
    text: str
    svg: Markup
    note: str = ""


def line_style(number: int) -> dict[str, Any]:
    """Return color, dashes and marker of a style: no two of the first 32 look the same in gray."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def plot_mean(axes: Axes, points: Sequence[MeanPoint], style: dict[str, Any]) -> None:
    """Draw means as a line and the spread around them as a band of its color."""
    x, y = [p.x for p in points], [p.mean for p in points]
    axes.plot(x, y, **{"markevery": max(1, len(points) // 12), **style})
    spreads = [p.spread or 0.0 for p in points]
    if any(spreads):
        low, high = ([m + sign * s for m, s in zip(y, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def tick_rounds(axes: Axes) -> None:
    """Tick whole rounds, also where there is but one."""
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=steps, integer=True, min_n_ticks=1))


def tick_powers(axes: Axes) -> None:
    """Make x logarithmic, with few enough ticks for the limits that it has now."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 5:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    elif high / low < 200:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of the page."""
    with matplotlib.rc_context(_RC):
        yield


def canvas(height: float, width: float = _WIDTH, layout: str = "constrained") -> Figure:
    """Return an empty figure, its height and width in points."""
    return Figure(figsize=(width / 72, height / 72), layout=layout)  # type: ignore[arg-type]  # "none" is not in its types.


def label_rows(axes: Axes, names: Sequence[str], tops: Sequence[float]) -> None:
    """Write names above the rows of a horizontal chart, where long ones have room."""
    axes.set_yticks(tops, [shortened(name) for name in names], ha="left", va="bottom")
    axes.tick_params(axis="y", length=0, pad=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def shortened(name: str, most: int = 46) -> str:
    """Return a name that fits in a chart and can be drawn."""
    name = plain(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def finish(figure: Figure, title: str, text: str, note: str = "") -> Chart:
    """Turn a figure into a chart of the page."""
    return Chart(title, text, to_svg(figure, title + text), note)


def swatch(style: int, salt: str) -> Markup:
    """Return what a line of a style looks like, for a legend of the page."""
    figure = canvas(14, 40, "none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(-1, 1))
    axes.set_axis_off()
    axes.plot([0, 1, 2], [0, 0, 0], **line_style(style), markevery=[1])
    return to_svg(figure, f"{salt}{style}")


def to_svg(figure: Figure, salt: str) -> Markup:
    """Return a figure as an element of the page, in the page's colors.

    The same figure and salt give the same bytes. Figures of other salts share no id.
    """
    file = io.StringIO()
    salt = salt.encode(errors="replace").decode()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        # Not by savefig, which draws it once before to find a renderer.
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)  # type: ignore[no-untyped-call]
    svg = file.getvalue()
    # What comes before the element; and ids that nothing refers to, the same in every figure.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    return Markup(re.sub("|".join((*COLORS, _GRID)), lambda color: f"var(--c{color[0][1:]})", svg))


def described(values: Mapping[str, float], unit: str = "") -> str:
    """Put numbers into words."""
    return ", ".join(f"{name} {number(value)}{unit}" for name, value in values.items())


def number(value: float) -> str:
    """Return a number with four digits."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"
