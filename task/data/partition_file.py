"""A partition of the training images that the user wrote: which client holds which."""

import codecs
import json
import os
import stat
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import SettingsError
from core.files import printable, reason, user_path

# Of JSON a training image, indented or not.
_MOST_BYTES_AN_IMAGE = 64


class _PartitionFile(BaseModel):
    """What stands in the file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    clients: list[list[Annotated[int, Field(ge=0)]]]


@lru_cache(maxsize=4)
def read_partition_file(file: str, num_images: int) -> tuple[np.ndarray, ...]:
    """Read which training images each client holds.

    Parameters
    ----------
    file : str
        Path of a JSON file ``{"clients": [[0, 5], [2]]}``: a list of indices for each client, in
        the order of the partitions; ``~`` is allowed.
    num_images : int
        Training images that there are.

    Returns
    -------
    tuple of ndarray
        int64 indices of each client, as listed.

    Raises
    ------
    SettingsError
        If the file cannot be read or is too large, something in it is missing, unknown or of the
        wrong type, an index is out of range or there twice, or a client has none.
    """
    path = user_path("partition-file", file)
    most = 1024 + _MOST_BYTES_AN_IMAGE * num_images
    data = _read(path, most)
    if len(data) > most:
        raise _error(path, f"has more than {most} bytes, all that {num_images} images take")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise _error(path, f"is not in UTF-8, as byte {error.start} shows") from None
    try:
        clients = _PartitionFile.model_validate_json(data).clients
        # Of two values under one key, it takes the last.
        json.loads(data, object_pairs_hook=partial(_refuse_twice, path))
    except ValidationError as error:
        raise _error(path, _first(error)) from None
    if not clients:
        raise _error(path, "names no client")
    owners: dict[int, int] = {}
    for client, indices in enumerate(clients):
        if not indices:
            raise _error(path, f"gives client {client} no image")
        for index in indices:
            if index >= num_images:
                raise _error(
                    path, f"gives client {client} image {index}; allowed: 0 to {num_images - 1}"
                )
            if index in owners:
                raise _error(
                    path, f"gives image {index} twice, to clients {owners[index]} and {client}"
                )
            owners[index] = client
    return tuple(np.array(indices, np.int64) for indices in clients)


def fingerprint_of_file(file: str) -> str:
    """Return a short text that differs where the file does."""
    data = _read(user_path("partition-file", file))
    return f"partition-file of CRC {zlib.crc32(data):08x}"


def _read(path: Path, most: int = -2) -> bytes:
    """Read a file, but of one that is longer than `most` bytes no more than shows it."""
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _error(path, "is no regular file")
        with open(path, "rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise _error(path, f"cannot be read: {reason(error)}") from None


def _refuse_twice(path: Path, pairs: list[tuple[str, object]]) -> None:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise _error(path, f"holds {key!r} {count} times; allowed: once")


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"])) or "it"
    message = found["msg"].splitlines()[0]
    return f'holds no partition as in {{"clients": [[0, 5], [2]]}}: {where}: {message}'


def _error(path: Path, what: str) -> SettingsError:
    return SettingsError(f"partition-file: {printable(path)} {what}")
