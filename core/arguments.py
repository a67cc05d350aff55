"""Arguments of constructors and functions, refused in one line that names them."""

from collections.abc import Iterable, Mapping
from math import isfinite, nan
from numbers import Integral, Real
from sys import float_info

from torch import Tensor

_WORDS = {Mapping: "a mapping by name", Tensor: "a tensor"}


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


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse what is of another kind.

    >>> check_kind("state", None, Mapping)
    Traceback (most recent call last):
        ...
    ValueError: state: a NoneType is not allowed: it should be a mapping by name

    Raises
    ------
    ValueError
        One line.
    """
    if not isinstance(value, kind):
        raise wrong_kind(name, value, kind)


def wrong_kind(name: str, value: object, kind: type) -> ValueError:
    """Return the error of `check_kind`."""
    allowed = _WORDS.get(kind, f"a {kind.__name__}")
    return ValueError(f"{name}: a {type(value).__name__} is not allowed: it should be {allowed}")


def check_tensors(name: str, value: object) -> None:
    """Refuse what is no mapping of tensors by name.

    Raises
    ------
    ValueError
        One line.
    """
    check_kind(name, value, Mapping)
    assert isinstance(value, Mapping)
    for key, part in value.items():
        check_kind(f"{name}: {key}", part, Tensor)


def check_names(name: str, value: object) -> frozenset[str]:
    """Return names that were given; a text alone would be the names of its letters.

    Raises
    ------
    ValueError
        If they are no collection of texts; one line.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name}: {value!r} is not allowed: it should be several names")
    given = list(value)
    if odd := [part for part in given if not isinstance(part, str)]:
        raise ValueError(f"{name}: it holds {odd[0]!r}; allowed: names")
    return frozenset(given)
