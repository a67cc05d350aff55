"""Tensors in a safetensors file, beside a head of JSON values and a checksum of both."""

import errno
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from core.files import reason


class DamagedError(ValueError):
    """A file that does not hold what `to_bytes` wrote; the message says why, in one line."""


def to_bytes(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of a file.

    Parameters
    ----------
    head : mapping
        What JSON can hold.
    arrays : mapping of str to ndarray
        Contiguous ones: safetensors writes the memory of an array and ignores its strides.
    """
    # Under one key: safetensors writes several in any order.
    whole = {"sha256": _checksum(head, arrays), "head": head}
    return save(dict(arrays), {"prowd": json.dumps(whole)})


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file; nothing in it is pickled, and nothing larger than the file is allocated.

    Returns
    -------
    tuple of dict and dict of str to Tensor
        Head and tensors, these not in the order in which they were given.

    Raises
    ------
    DamagedError
        If it is anything but a whole, unaltered file of `to_bytes`.
    OSError
        If there is no such file, it cannot be read, or is no regular file.
    """
    # safe_open calls a file missing that we may not see, and waits for what is a pipe.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = json.loads(metadata["prowd"])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        is_whole = whole["sha256"] == _checksum(whole["head"], arrays)
    except KeyError:
        raise DamagedError("it has no checksum; an earlier version wrote it") from None
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(reason(error)) from None
    if not is_whole or not isinstance(whole["head"], dict):
        raise DamagedError("its checksum is of something else")
    return whole["head"], tensors


def _checksum(head: object, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the head, and of each array's name, type, shape and bytes by name."""
    digest = hashlib.sha256(json.dumps(head).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
