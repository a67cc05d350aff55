"""Whatever went wrong, in one line: for the log, the run record, and the other side of the wire."""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from core.errors import SettingsError, words_of
from core.files import printable
from core.reference import PACKAGES, is_reference

PROJECT = Path(__file__).parents[1]
_MOST_CHARACTERS = 400


def explain(
    error: BaseException, settings: Mapping[str, object], what: str = "", when: str = ""
) -> str:
    """Return an error's message, in one line that names the setting or the place in the code.

    Parameters
    ----------
    error : BaseException
        As it was caught.
    settings : mapping
        The run's configuration as it was given: ``strategy`` and ``model`` may name code of the
        user's own.
    what : str
        What failed where that is no code of the user's; empty: that is not said.
    when : str
        As ``"in round 3"``.

    Returns
    -------
    str
        Of a `SettingsError` its message alone.
    """
    text = one_line(words_of(error))
    if isinstance(error, SettingsError) and text:
        return text
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS].rstrip() + " ..."
    frames = _frames(error)
    own = _users_modules(settings)
    setting, theirs = _users_code(settings, own, frames)
    subject = setting or what
    told = _tells_all(error, text)
    said = text if told else _said(error, text)
    line = f"{' '.join([subject, 'failed', when]).rstrip()}: {said}" if subject else said
    place = theirs or _deepest(frames)
    if told or not place:
        return line
    # What the user's code returned may be the cause, and is what cannot be known here.
    beside = " and ".join(f"{key} {settings[key]!r}" for key in own if not setting)
    return f"{line} ({place}{', with ' if beside else ''}{beside})"


def one_line(text: str) -> str:
    """Return a text as one line that any terminal, log and file can take."""
    return printable(" ".join(text.split()))


def _said(error: BaseException, text: str) -> str:
    kind = type(error)
    name = kind.__name__
    if kind.__module__.partition(".")[0] == "httpx":
        return f"the SuperLink cannot be reached: {name}{': ' if text else ''}{text}"
    return f"{name}: {text}" if text else name


def _tells_all(error: BaseException, text: str) -> bool:
    """Whether an error is of a class of the project's own, whose message names what is wrong."""
    return bool(text) and type(error).__module__.partition(".")[0] in PACKAGES


def _frames(error: BaseException) -> list[tuple[Path, int]]:
    found = traceback.walk_tb(error.__traceback__)
    return [(Path(frame.f_code.co_filename), line) for frame, line in found]


def _users_modules(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the modules of the user's own that are imported here, by setting."""
    named = {key: str(settings.get(key) or "") for key in ("strategy", "model")}
    modules = {key: name.partition(":")[0] for key, name in named.items() if is_reference(name)}
    return {
        key: module
        for key, module in modules.items()
        if module in sys.modules and module.partition(".")[0] not in PACKAGES
    }


def _users_code(
    settings: Mapping[str, object], modules: Mapping[str, str], frames: list[tuple[Path, int]]
) -> tuple[str, str]:
    """Return which setting's code failed, and its deepest place; empty if none did."""
    # First by the module itself: strategy and model may be of one package.
    for root_of in (_file_of, _package_of):
        for path, _ in reversed(frames):
            for key, module in modules.items():
                if (file := root_of(module)) and (path == file or file in path.parents):
                    place = _deepest(frames, _package_of(module) or file)
                    return f"{key}: {settings[key]!r}", place
    return "", ""


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules[module], "__file__", None)
    return Path(file) if file else None


def _package_of(module: str) -> Path | None:
    """Return the folder of the module's outermost package, or its file."""
    top = sys.modules.get(module.partition(".")[0])
    for folder in getattr(top, "__path__", ()):
        return Path(folder)
    return _file_of(module)


def _deepest(frames: list[tuple[Path, int]], within: Path | None = None) -> str:
    """Return the last place within a folder; without one in the project's own code, or any."""
    roots = [within] if within else [PROJECT / package for package in PACKAGES]
    for path, line in reversed(frames):
        for root in roots:
            if path == root or root in path.parents:
                return f"{path.relative_to(root.parent)}:{line}"
    return f"{frames[-1][0].name}:{frames[-1][1]}" if frames else ""
