"""For every setting values that it may not have, from how it is declared."""

from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from core.options import Options
from core.settings import Settings
from strategies import STRATEGIES

NAN, INF = float("nan"), float("inf")
# By the kind of bound: what is just beyond it, and how an error calls it.
_BOUNDS = {
    Ge: ("ge", -1, "greater than or equal to"),
    Gt: ("gt", 0, "greater than"),
    Le: ("le", 1, "less than or equal to"),
    Lt: ("lt", 0, "less than"),
}
# By the kind of setting: a value of another one, and how an error calls what it should be.
_OF_ANOTHER_KIND: dict[object, tuple[object, str]] = {
    bool: ("true", "boolean"),
    str: (7, "string"),
    int: (1.5, "integer"),
    float: (True, "number"),
}


def all_settings() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a run, and every strategy's own, by its full key."""
    groups: dict[str, type[Options]] = {"": Settings}
    for name, strategy in STRATEGIES.items():
        if hasattr(strategy, "Options"):
            groups[f"{name}-"] = strategy.Options
    for prefix, options in groups.items():
        for field in options.model_fields.values():
            yield f"{prefix}{field.alias}", field


def wrong_values(field: FieldInfo) -> Iterator[tuple[object, str]]:
    """Yield values that a setting may not have, each with how an error says what it may be."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        *some, last = map(repr, get_args(kind))
        yield "no-such", f"{', '.join(some)} or {last}"
        return
    value, word = _OF_ANOTHER_KIND[kind]
    yield value, f"a valid {word}"
    if kind not in (int, float):
        return
    bounds = [bound for bound in field.metadata if type(bound) in _BOUNDS]
    for bound in bounds:
        name, beyond, word = _BOUNDS[type(bound)]
        limit = getattr(bound, name)
        yield kind(limit + beyond), f"{word} {limit:g}" if kind is float else f"{word} {limit}"
    if not any(isinstance(bound, (Ge, Gt)) for bound in bounds):
        yield kind(-1), "allowed are "
    if kind is float:
        yield from ((value, "a finite number") for value in (NAN, INF))
        if not any(isinstance(bound, (Le, Lt)) for bound in bounds):
            yield 1e39, "numbers that float32 holds, up to 3.4e+38"
