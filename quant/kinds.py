"""Arguments of the wrong kind, refused in one line by name: a list for a tensor, one for several.

Apart from `quant.arguments`, which knows of widths, as `quant.grid` needs these too.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

_WORDS = {Mapping: "a mapping by name", Tensor: "a tensor"}


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
        allowed = _WORDS.get(kind, f"a {kind.__name__}")
        raise ValueError(f"{name}: a {type(value).__name__} is not allowed: it should be {allowed}")


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
