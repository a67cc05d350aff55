"""How settings are read: frozen pydantic models whose errors are one line that names the key."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import isfinite
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator

from core.bits import FLOAT_BITS, MAX_BITS, MIN_BITS, is_width
from core.errors import SettingsError


def _kebab(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Allowed:
    """The allowed values in words, where neither type nor bounds show them; for settings.md."""

    words: str


class Idle(Enum):
    """A federation in which an option of a strategy has no effect; the user is told."""

    ALL_FLOAT32 = "all clients are Float32"
    ONE_WIDTH = "all clients are of one width"
    NO_BUFFER = "the server has no unlabelled images"


@dataclass(frozen=True)
class IdleWith:
    """Another option of the same strategy, by its key, and the value that leaves one no effect."""

    key: str
    value: object


_WIDTH_OR_NONE = f"0, {MIN_BITS} to {MAX_BITS}, and {FLOAT_BITS}"


def _check_width_or_none(bits: int) -> int:
    if bits and not is_width(bits):
        raise ValueError(f"allowed are {_WIDTH_OR_NONE}")
    return bits


WidthOrNone = Annotated[int, AfterValidator(_check_width_or_none), Allowed(_WIDTH_OR_NONE)]


# Characters of a value in an error.
_MOST_SHOWN = 200
# Beyond it a number is an infinity to every tensor that it meets.
_MOST_FLOAT = float(np.finfo(np.float32).max)


class Options(BaseModel):
    """Base of everything that is set from outside: strict types, kebab-case keys, frozen.

    NumPy's numbers count as what they hold. What is not allowed is a `SettingsError`, one line.

    >>> class MyOptions(Options):
    ...     step_size: float = 0.1
    >>> MyOptions.read({"step-size": 0.2}).to_settings()
    {'step-size': 0.2}
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=_kebab,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _float32_holds(cls, value: object) -> object:
        if isinstance(value, float) and abs(value) > _MOST_FLOAT:
            raise ValueError(f"allowed are numbers that float32 holds, up to {_MOST_FLOAT:.2g}")
        return value

    def __init__(self, **values: Any) -> None:
        self._fill(values, "")

    def _fill(self, values: Mapping[str, Any], prefix: str) -> None:
        """Validate values into this new object; what is wrong is one line."""
        held = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        try:
            super().__init__(**held)
        except ValidationError as error:
            raise SettingsError("; ".join(_line(e, prefix) for e in error.errors())) from None

    @classmethod
    def read(cls, values: Mapping[str, object], prefix: str = "") -> Self:
        """Validate settings.

        Parameters
        ----------
        values : mapping
            Values by kebab-case key, without the prefix.
        prefix : str
            Put before each key in an error message.

        Raises
        ------
        SettingsError
            One line that names every wrong key, its value, and what is allowed.
        """
        made = cls.__new__(cls)
        made._fill(values, prefix)
        return made

    def to_settings(self, prefix: str = "") -> dict[str, object]:
        """Return the values by kebab-case key."""
        return {prefix + key: value for key, value in self.model_dump(by_alias=True).items()}


def parse_assignments(text: str) -> dict[str, Any]:
    """Read ``"eta = 0.1, name = 'x'"``: values by key, in one setting.

    Raises
    ------
    ValueError
        If it is not a list of TOML assignments.
    """
    try:
        document = tomllib.loads(f"values = {{{text}}}")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"write it as eta = 0.1, tau = 0.001 ({error})") from None
    if list(document) != ["values"]:
        raise ValueError("write it as eta = 0.1, tau = 0.001")
    values: dict[str, Any] = document["values"]
    return values


def format_assignments(values: Mapping[str, object]) -> str:
    """Write values as `parse_assignments` reads them, but for None, which TOML does not have.

    Raises
    ------
    ValueError
        If TOML has no value of a kind; the message names the key.
    """
    parts = []
    for key, value in values.items():
        try:
            parts += [] if value is None else [f"{key} = {_toml(value)}"]
        except (TypeError, ValueError):
            raise ValueError(
                f"{key}: {shown(value)} is not allowed: TOML has no {type(value).__name__} like "
                "it; allowed: numbers, text, true, false, and lists and mappings of them"
            ) from None
    return ", ".join(parts)


def _toml(value: object) -> str:
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # As in JSON, but for what JSON has not.
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return json.dumps(value, ensure_ascii=False)


def _line(error: Mapping[str, Any], prefix: str) -> str:
    path = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        path[:1] = map(_kebab, path[:1])  # In Python an option is given by its name.
    key = prefix + ".".join(path)
    message = str(error["msg"])
    if isinstance(cause := error.get("ctx", {}).get("error"), SettingsError):
        return str(cause)
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such setting (value {shown(error['input'])})"
    return f"{key}: {shown(error['input'])} is not allowed: {message[0].lower()}{message[1:]}"


def shown(value: object) -> str:
    """Return a value as one writes it, but of a long one its beginning."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
