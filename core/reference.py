"""Code of the user's own by name, `package.module:name`, imported where it is used."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from core.errors import SettingsError, words_of
from core.options import Options

# Of the project's own, found before a package of the user's of the same name.
PACKAGES = (
    "prowd",
    "core",
    "quant",
    "privacy",
    "task",
    "exchange",
    "strategies",
    "client_app",
    "server_app",
)
Base = TypeVar("Base")
_NOTATION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_reference(text: str) -> bool:
    """Return whether a setting names the user's own code."""
    return ":" in text


def load_class(setting: str, text: str, base: type[Base], base_name: str) -> type[Base]:
    """Import a class of the user's own.

    Parameters
    ----------
    setting, text
        As of `load_reference`.
    base : type
        What it must be a subclass of; its `Options` are `core.options.Options`.
    base_name : str
        Where the user finds that.

    Raises
    ------
    SettingsError
        If it cannot be imported, or it or its `Options` is no such class.
    """
    found = load_reference(setting, text)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SettingsError(f"{setting}: {text!r} is no subclass of {base_name}")
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise SettingsError(
            f"{setting}: {found.__name__}.Options is no subclass of core.options.Options"
        )
    return found


def load_reference(setting: str, text: str) -> object:
    """Import what a setting names.

    Parameters
    ----------
    setting : str
        Its key, for the errors.
    text : str
        As in ``"my_package.module:name"``.

    Raises
    ------
    SettingsError
        If it is written in another way, the module cannot be imported, or has no such name.
    """
    if not _NOTATION.fullmatch(text):
        raise SettingsError(f"{setting}: {text!r} is not written as package.module:name")
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    # An import runs the module, which raises whatever it likes, or exits.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}.") and (taken := _taken(missing)):
            raise SettingsError(f"{setting}: {text!r}: there is no {missing}; {taken}") from None
        raise SettingsError(
            f"{setting}: {text!r} cannot be imported ({in_one_line(error)}); "
            "it must be sent with the app (fab-include in pyproject.toml), or installed or on "
            "PYTHONPATH wherever the app runs"
        ) from None
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or "no file"
        taken = f"; {said}" if (said := _taken(module_name)) else ""
        raise SettingsError(f"{setting}: {module_name} ({where}) has no {name!r}{taken}")
    return getattr(module, name)


def _taken(module_name: str) -> str:
    """Say that a package is prowd's own, if it is; the user may mean one of that name."""
    package = module_name.partition(".")[0]
    if package not in PACKAGES:
        return ""
    return f"{package} is a package of prowd's own, so one of yours must have another name"


@contextmanager
def users_code(failing: str, advice: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises into one line; a `SettingsError` of its own is one.

    Parameters
    ----------
    failing : str
        What then cannot be done, with the setting that names the code.
    advice : str
        Behind the error.

    Raises
    ------
    SettingsError
        In place of any `Exception`.

    Examples
    --------
    >>> with users_code("model: 'my:net' cannot be made"):
    ...     int("ten")
    Traceback (most recent call last):
        ...
    core.errors.SettingsError: model: 'my:net' cannot be made: ValueError: invalid literal for \
int() with base 10: 'ten'
    """
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        said = in_one_line(error)
        line = f"{failing} ({said}){advice}" if advice else f"{failing}: {said}"
        raise SettingsError(line) from None


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error and its message: a line, and one more after a heading."""
    lines = [line.strip() for line in words_of(error).splitlines() if line.strip()]
    said = lines[: 2 if lines and lines[0].endswith(":") else 1]
    return ": ".join([type(error).__name__, *([" ".join(said)] if said else [])])
