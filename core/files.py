"""Paths that a user names, and files that are replaced whole.

A crash leaves a file's old content or the new one, never a part.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.errors import SettingsError, words_of


def user_path(setting: str, value: str | os.PathLike[str]) -> Path:
    """Return the path that a setting holds, with ``~`` expanded.

    Raises
    ------
    SettingsError
        If its home folder is not known, or it cannot be a path.
    """
    if "\0" in str(value):
        raise SettingsError(f"{setting}: {printable(value)} holds a NUL, which no path can")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise SettingsError(
            f"{setting}: {printable(value)}: no home folder is known for {Path(value).parts[0]}; "
            "allowed: a path, absolute or from a ~ that is known"
        ) from None


def printable(text: object) -> str:
    """Return a path or message as one line that any terminal and log can take.

    A file's name is bytes: it may hold line ends, and need not be UTF-8.
    """
    characters = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in characters)


def is_utf8(text: str) -> bool:
    """Return whether a text can be written in UTF-8; a file's name need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(error: BaseException) -> str:
    """Return why something failed, in one line and without the path."""
    words = str(getattr(error, "strerror", None) or words_of(error)).strip()
    return printable((words or type(error).__name__).splitlines()[0])


@contextmanager
def failing_by_name(
    setting: str, path: object, done: str = "read", *also: type[Exception]
) -> Iterator[None]:
    """Turn an OSError, and errors of other kinds, into one line that names a setting's path.

    Parameters
    ----------
    setting : str
        Where the user names the path.
    path : path-like or None
        What is read or written.
    done : str
        What then cannot be done with it.
    *also : type
        Of other errors.

    Raises
    ------
    SettingsError
        In their place.

    Examples
    --------
    >>> with failing_by_name("data-dir", "/nowhere"):
    ...     open("/nowhere")
    Traceback (most recent call last):
        ...
    core.errors.SettingsError: data-dir: /nowhere cannot be read: No such file or directory
    """
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except kinds as error:
        line = f"{setting}: {printable(path)} cannot be {done}: {reason(error)}"
        raise SettingsError(line) from None


def read_regular(path: Path) -> bytes:
    """Return what a regular file holds.

    Raises
    ------
    OSError
        If it cannot be read, or is another kind of file: opening a pipe would wait for ever.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, force it to the disk, and move it there.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written; the old content is as it was.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # Without this the new name itself may be lost with the power.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool | None:
    """Return whether a process holds the lock of a folder, which ends with it; None: not known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared, so that two processes that only look do not block each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # A file system without locks.
        return None
    finally:
        os.close(descriptor)
    return False
