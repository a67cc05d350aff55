"""Code of the user's own by name, `package.module:name`, imported where it is used."""

import importlib
import re

from task.errors import SettingsError

_NOTATION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_reference(text: str) -> bool:
    """Return whether a setting names the user's own code."""
    return ":" in text


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
        raise SettingsError(
            f"{setting}: {text!r} cannot be imported ({in_one_line(error)}); "
            "it must be sent with the app (fab-include in pyproject.toml), or installed or on "
            "PYTHONPATH wherever the app runs"
        ) from None
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or "no file"
        raise SettingsError(f"{setting}: {module_name} ({where}) has no {name!r}")
    return getattr(module, name)


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
