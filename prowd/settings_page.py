"""All settings as one Markdown page, from the models that validate them."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from core.options import Allowed, Options
from core.settings import Settings
from prowd.publish.table import markdown_row
from strategies import OWN_CLASS, STRATEGIES, strategy_names

_HEAD = """# Settings

Written by `prowd settings`; a test holds it against the code. Each is given with `--run-config`, as
`flwr run . --run-config 'strategy="fedcom" num-server-rounds=20'`; `[tool.flwr.app.config]` of
pyproject.toml holds the defaults. A setting that is wrong ends the run before any training, with
one line. No number may be more than float32 holds, 3.4e38.
"""
_TABLE = ("| setting | default | allowed | what it does |", "| --- | --- | --- | --- |")
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def settings_page() -> str:
    """Return the page: the settings of every run, then those of each strategy."""
    sections = [_HEAD, _section("Of every run", Settings)]
    for name, strategy in STRATEGIES.items():
        if strategy.Options.model_fields:
            sections.append(_section(f"`{name}`", strategy.Options, prefix=f"{name}-"))
    return "\n".join(sections)


def _section(title: str, options: type[Options], prefix: str = "") -> str:
    rows = [_row(f"{prefix}{field.alias}", field) for field in options.model_fields.values()]
    return "\n".join([f"## {title}", "", *_TABLE, *rows]) + "\n"


def _row(key: str, field: FieldInfo) -> str:
    default = json.dumps(field.default)
    allowed = _strategies() if key == "strategy" else _allowed(field)
    cells = [f"`{key}`", f"`{default}`", allowed, field.description or ""]
    return markdown_row([cell.replace("|", "\\|") for cell in cells])


def _strategies() -> str:
    """Name the strategies, which core/settings.py cannot import."""
    return ", ".join(f'`"{name}"`' for name in (*strategy_names(), OWN_CLASS))


def _allowed(field: FieldInfo) -> str:
    for part in field.metadata:
        if isinstance(part, Allowed):
            return part.words
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    word = {int: "whole number", float: "number", str: "text"}[kind]
    return " ".join([word, ", ".join(_bounds(field))]).rstrip()


def _bounds(field: FieldInfo) -> Iterator[str]:
    for kind, sign in _SIGNS.items():
        for bound in field.metadata:
            if type(bound) is kind:
                # annotated_types.Ge holds its value as `ge`, and so on.
                yield f"{sign} {_number(getattr(bound, kind.__name__.lower()))}"


def _number(bound: float) -> str:
    # 2^63 as it is meant, not rounded to six digits.
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power > 20 and bound == 2**power else f"{bound:g}"
