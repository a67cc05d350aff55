"""Where axes have their ticks: whole rounds, and powers that stand clear of each other."""

from collections.abc import Iterator
from math import ceil, floor, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

# Points: what an axis has of a figure's width, a digit, and the space between two labels.
_AXIS, _DIGIT, _SPACE = 285.0, 7.5, 8.0


def tick_rounds(axes: Axes) -> None:
    """Tick whole rounds, also where there is but one."""
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=steps, integer=True, min_n_ticks=1))


def tick_powers(axes: Axes) -> None:
    """Make x logarithmic, with ticks for the limits that it has now."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Return the most ticks of a logarithmic axis whose labels do not touch.

    Powers of ten with 2 and 5 times each, powers alone, every second one, and so on; where the
    axis is too short for two of those, evenly spaced numbers.
    """
    for ticks in _candidates(low, high):
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) > 1 and _stand_clear(inside, low, high):
            return inside
    return [low]


def _candidates(low: float, high: float) -> Iterator[list[float]]:
    first, last = floor(log10(low)), ceil(log10(high))
    yield [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    for step in range(1, last - first + 1):
        yield [10.0**power for power in range(first, last + 1) if power % step == 0]
    for most in (5, 4, 3, 2):
        yield [float(tick) for tick in MaxNLocator(most).tick_values(low, high) if tick > 0]


def _stand_clear(ticks: list[float], low: float, high: float) -> bool:
    middles = _AXIS * np.log(np.array(ticks) / low) / np.log(high / low)
    halves = np.array([len(f"{tick:g}") * _DIGIT / 2 for tick in ticks])
    return bool(np.all(np.diff(middles) >= halves[1:] + halves[:-1] + _SPACE))
