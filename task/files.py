"""Files that are replaced whole: a crash leaves the old content or the new, never a part."""

import fcntl
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np


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
        # Shared, so that two who look do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # A file system without locks.
        return None
    finally:
        os.close(descriptor)
    return False


def checksum(head: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the head, and of each array's name, type, shape and bytes by name."""
    digest = hashlib.sha256(head.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
