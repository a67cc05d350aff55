"""Figures as SVG that belongs to the page: its colors, its text, and a description."""

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from exchange.protocol import plain
from prowd.publish.curves import MeanPoint

# Points. The page shows a figure at least as many pixels wide, so that a point is a pixel or more.
WIDTH = 360
_TEXT_SIZE = 11.5
# A color that matplotlib writes, and what the page has in its place, once for light, once for dark.
TEXT, GRID, SURFACE = "#010203", "#010204", "#010205"
_COLORS = {TEXT: "currentColor", GRID: "var(--grid)", SURFACE: "var(--surface)"}
NUM_COLORS = 8
_DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_MARKERS = "osD^vPX*"
_SVG = "{http://www.w3.org/2000/svg}"
_RC: Any = {
    "font.size": _TEXT_SIZE,
    "axes.titlesize": _TEXT_SIZE,
    "axes.labelsize": _TEXT_SIZE,
    "xtick.labelsize": _TEXT_SIZE,
    "ytick.labelsize": _TEXT_SIZE,
    "legend.fontsize": _TEXT_SIZE,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # Text stays text, in the page's font; and a dollar in a name is a dollar.
    "svg.fonttype": "none",
    "text.parse_math": False,
    # The same bytes from the same numbers.
    "svg.hashsalt": "prowd",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes
    ----------
    title : str
        What it shows.
    text : str
        The same in words and numbers, for those who do not see it.
    svg : Markup
        The drawing.
    note : str
        What is worth knowing besides.
    """

    title: str
    text: str
    svg: Markup
    note: str = ""


def color(number: int) -> str:
    """Return the color of a style, as matplotlib gets it."""
    return f"#0300{number % NUM_COLORS:02x}"


def line_style(number: int) -> dict[str, Any]:
    """Return color, dashes and marker of a style: no two of the first 32 look the same in gray."""
    return {
        "color": color(number),
        "linestyle": _DASHES[number // NUM_COLORS % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


@contextmanager
def styled() -> Iterator[None]:
    """Draw and write within the style of the page."""
    with matplotlib.rc_context(_RC):
        yield


def canvas(height: float) -> Canvas:
    """Return an empty figure, `height` in points."""
    return Canvas(figsize=(WIDTH / 72, height / 72))


def label_rows(axes: Axes, names: Sequence[str], tops: Sequence[float]) -> None:
    """Write names at the left above the rows of a horizontal chart, where long ones have room."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    for name, top in zip(names, tops, strict=True):
        axes.annotate(
            shortened(name),
            (0, top),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1),
            textcoords="offset points",
            va="bottom",
        )


def shortened(name: str, most: int = 46) -> str:
    """Return a name that fits in a figure and can be drawn."""
    name = plain(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def finish(drawn: Canvas, title: str, text: str, note: str = "") -> Figure:
    """Turn a drawing into a figure of the page."""
    svg = _of_the_page(drawn, {"role": "img", "aria-label": f"{title}. {text}"})
    return Figure(title, text, svg, note)


def swatch(style: int, legend: str) -> Markup:
    """Return what a line of a style looks like, for a legend of the page that has this name."""
    drawn = Canvas(figsize=(40 / 72, 14 / 72), layout="none")  # type: ignore[arg-type]  # Documented, not in its types.
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(-1, 1))
    axes.set_axis_off()
    axes.plot([0, 1, 2], [0, 0, 0], **line_style(style), markevery=[1])
    return _of_the_page(drawn, {"aria-hidden": "true", "data-legend": legend})


def _of_the_page(drawn: Canvas, attributes: Mapping[str, str]) -> Markup:
    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(_without_control_characters(file.getvalue()))
    for part in root.findall(f"{_SVG}metadata"):
        root.remove(part)
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {name: _without_control_characters(text) for name, text in attributes.items()}
    told = "".join(attributes.values()) + file.getvalue()
    _own_ids(root, f"f{hashlib.sha256(told.encode(errors='replace')).hexdigest()[:10]}")
    return Markup(_serialize(root))


def _without_control_characters(text: str) -> str:
    # XML has none of them; a name from a damaged record may.
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _own_ids(root: ElementTree.Element, prefix: str) -> None:
    """Keep only the names that are referred to, made unlike those of the page's other figures."""
    link = "{http://www.w3.org/1999/xlink}href"
    for element in root.iter():
        if link in element.attrib:
            element.attrib["href"] = element.attrib.pop(link)
    written = " ".join(v for e in root.iter() for k, v in e.attrib.items() if k != "id")
    used = set(re.findall(r"#([\w-]+)", written))
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{prefix}-{value}"
            elif key not in ("aria-label", "data-legend"):
                element.attrib[key] = _paged(value, used, prefix)


def _paged(value: str, ids: set[str], prefix: str) -> str:
    # The page's font, not one named at every word.
    value = re.sub(r"font-family: [^;]*; ?", "", value)
    value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{prefix}-\1)", value)
    if value.startswith("#") and value[1:] in ids:
        return f"#{prefix}-{value[1:]}"
    return re.sub(r"#01020[345]|#0300[0-9a-f]{2}", _variable, value)


def _variable(match: re.Match) -> str:
    written = match.group()
    return _COLORS.get(written) or f"var(--series-{int(written[5:], 16)})"


def _serialize(root: ElementTree.Element) -> str:
    for element in root.iter():
        # In a page of HTML no element of SVG has a prefix.
        element.tag = element.tag.removeprefix(_SVG)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def described(values: Mapping[str, float], unit: str = "") -> str:
    """Put numbers into words."""
    return ", ".join(f"{name} {number(value)}{unit}" for name, value in values.items())


def number(value: float) -> str:
    """Return a number with four digits at most."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def plot_mean(axes: Axes, points: Sequence[MeanPoint], style: dict, x_unit: float = 1) -> None:
    """Draw means as a line and the spread around them as a band of its color."""
    x = [point.x / x_unit for point in points]
    axes.plot(x, [point.mean for point in points], **style)
    low, high = (
        [p.mean + sign * p.spread if p.spread is not None else p.mean for p in points]
        for sign in (-1, 1)
    )
    if low != high:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
