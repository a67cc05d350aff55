"""Arguments of constructors, refused in one line: name, value, and what is allowed."""

from math import isfinite, nan
from numbers import Integral, Real
from sys import float_info


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse what is no finite number within bounds; NumPy's numbers are numbers.

    >>> check_number("learning_rate", 0.0, above=0)
    Traceback (most recent call last):
        ...
    ValueError: learning_rate: 0.0 is not allowed: it should be a number > 0

    Raises
    ------
    ValueError
        One line.
    """
    bounds = [(">=", least), (">", above), ("<", below)]
    words = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    allowed = f"{'a whole number' if whole else 'a number'} {words}".strip()
    number = nan
    if not isinstance(value, bool) and isinstance(value, Integral if whole else Real):
        number = float(value) if abs(value) < float_info.max else nan  # type: ignore[operator]
    if not (
        isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (below is None or number < below)
    ):
        raise ValueError(f"{name}: {value!r} is not allowed: it should be {allowed}")
