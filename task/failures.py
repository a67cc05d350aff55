"""Whatever went wrong, in one line: for the log, the run record, and the other side of the wire."""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from task.errors import SettingsError
from task.reference import PACKAGES, is_reference

PROJECT = Path(__file__).parents[1]
_MOST_CHARACTERS = 400


def explain(
    error: BaseException, settings: Mapping[str, object], what: str = "", when: str = ""
) -> str:
    """Return what an error says, in one line that names the setting or the place in the code.

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
    if isinstance(error, SettingsError):
        return one_line(str(error))
    said = _said(error)
    frames = _frames(error)
    setting, theirs = _users_code(settings, frames)
    subject = setting or what
    place = theirs or _deepest(frames)
    line = f"{' '.join([subject, 'failed', when]).rstrip()}: {said}" if subject else said
    return f"{line} ({place})" if place and not _is_deliberate(error) else line


def one_line(text: str) -> str:
    """Return a text with spaces for its line breaks."""
    return " ".join(text.split())


def _said(error: BaseException) -> str:
    text = one_line(str(error))
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS] + " ..."
    kind = type(error)
    name = kind.__name__
    if kind.__module__.partition(".")[0] == "httpx":
        return f"the SuperLink cannot be reached: {name}{': ' if text else ''}{text}"
    if _is_deliberate(error) and text:
        return text
    return f"{name}: {text}" if text else name


def _is_deliberate(error: BaseException) -> bool:
    """Whether the error is of a class of the project's own: its message then says it all."""
    return type(error).__module__.partition(".")[0] in PACKAGES


def _frames(error: BaseException) -> list[tuple[Path, int]]:
    found = traceback.walk_tb(error.__traceback__)
    return [(Path(frame.f_code.co_filename), line) for frame, line in found]


def _users_code(settings: Mapping[str, object], frames: list[tuple[Path, int]]) -> tuple[str, str]:
    """Return which setting's code failed, and its deepest place; empty if none did."""
    named = {key: str(settings.get(key) or "") for key in ("strategy", "model")}
    modules = {
        key: name.partition(":")[0]
        for key, name in named.items()
        if is_reference(name) and name.partition(":")[0] in sys.modules
    }
    modules = {k: m for k, m in modules.items() if m.partition(".")[0] not in PACKAGES}
    # First by the module itself: strategy and model may be of one package.
    for root_of in (_file_of, _package_of):
        for path, _ in reversed(frames):
            for key, module in modules.items():
                if (file := root_of(module)) and (path == file or file in path.parents):
                    return f"{key}: {named[key]!r}", _deepest(frames, _package_of(module) or file)
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
