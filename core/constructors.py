"""Arguments of strategies in the library, validated as the settings of a run."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from core.errors import SettingsError
from core.options import Options, shown
from core.settings import Settings, Upload

# What low-bit clients are sent: float32, or codes that the server rounded.
Broadcast = Literal["float32", "nearest", "calibrated"]

# Where an argument is not called as its setting.
_SETTING = {"coded": "lossless_coding"}

Own = TypeVar("Own", bound=Options)


def checked(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Return arguments by name as plain numbers, validated by the bounds of settings.

    >>> checked({"fraction_train": 1.5})
    Traceback (most recent call last):
        ...
    core.errors.SettingsError: fraction-train: 1.5 is not allowed: input should be less than or \
equal to 1

    Raises
    ------
    SettingsError
        If a value is not allowed; one line.
    """
    settings = {name: _SETTING.get(name, name) for name in arguments}
    values = {settings[name].replace("_", "-"): value for name, value in arguments.items()}
    # A run of the app may leave them to the strategy, as "auto".
    for name, choices in (("broadcast", get_args(Broadcast)), ("upload", get_args(Upload))):
        if (chosen := values.get(name, choices[0])) not in choices:
            allowed = ", ".join(choices)
            raise SettingsError(f"{name}: {chosen!r} is not allowed: it should be {allowed}")
    held = Settings.read(values)
    return {name: getattr(held, setting) for name, setting in settings.items()}


def own_options(options: Own | None, kind: type[Own], owner: object) -> Own:
    """Return a strategy's own settings, their defaults where none are given.

    Raises
    ------
    SettingsError
        If they are of another class.
    """
    if options is None:
        return kind()
    # A strategy without settings of its own has none of another's either.
    if not isinstance(options, kind) or (kind is Options and type(options) is not Options):
        raise SettingsError(
            f"options: {type(owner).__name__} has {shown(options)}; allowed: {kind.__name__}"
        )
    return options
