"""The folder of a run: made, locked, written and read, each failure one line that names it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from core.errors import SettingsError
from core.files import failing_by_name, is_utf8, printable, read_regular, reason


class RunExistsError(SettingsError):
    """There is a run of this name already."""


def make_folder(folder: Path) -> None:
    """Make the folder of a new run.

    Raises
    ------
    RunExistsError
        If it exists.
    SettingsError
        If it cannot be made, or its name is not in UTF-8.
    """
    if not is_utf8(str(folder)):  # As a home may be; the settings that resume the run are.
        raise SettingsError(
            f"output-dir: {printable(folder)} is not in UTF-8; allowed: a path that is"
        )
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        # A folder on the way to it may also be there already, as a link to nowhere.
        if isinstance(error, FileExistsError) and os.path.lexists(folder):
            raise RunExistsError(
                f"run-name: {printable(folder)} exists already; choose another name or leave it "
                "empty"
            ) from None
        raise SettingsError(
            f"output-dir: {printable(folder)} cannot be made: {reason(error)}"
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into one line that names it.

    Raises
    ------
    SettingsError
        In place of an OSError.
    """
    with failing_by_name("output-dir", path, "written"):
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from resuming a run; the lock ends with this one at the latest.

    Raises
    ------
    SettingsError
        If another process has it, or there is no such folder.
    """
    with failing_by_name("resume", folder, "opened"):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(f"resume: another process is writing {printable(folder)}") from None
    except OSError as error:  # A file system without locks.
        log(
            WARNING,
            "prowd: %s cannot be locked (%s): two processes could write this record at once",
            printable(folder),
            reason(error),
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a record that is resumed.

    Raises
    ------
    SettingsError
        If it is missing or damaged; one line.
    """
    with failing_by_name("resume", path, "read", ValueError, RecursionError):
        content = json.loads(read_regular(path))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
