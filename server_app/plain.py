"""A strategy's figures in a form that JSON can hold."""

import reprlib
from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from core.errors import SettingsError
from core.files import is_utf8
from exchange.protocol import plain

# Nothing that is written is nested so deeply but what holds itself.
_DEEPEST = 50
# Bits of an integer: beyond it no float, and no reader of JSON, goes.
_MOST_BITS = 1024
_ALLOWED = "numbers, text, true, false, none, and lists and mappings of them under text keys"


def to_json(value: object, *path: str, as_null: bool = True) -> object:
    """Return a value as JSON has it: numbers, and arrays and tensors as lists of them.

    Parameters
    ----------
    value : object
        What is written.
    *path : str
        Where it stands, for the error.
    as_null : bool
        Whether NaN and infinities become null, which JSON has; Python reads them back as they are.

    Raises
    ------
    SettingsError
        If JSON cannot hold it; one line that names the place.
    """
    if (
        isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    ) or isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool) or (isinstance(value, str) and is_utf8(value)):
        return value
    if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
        return int(value)
    if isinstance(value, (float, np.floating)):
        return None if as_null and not isfinite(value) else float(value)
    if isinstance(value, (Mapping, list, tuple)) and len(path) > _DEEPEST:
        raise SettingsError(f"{'/'.join(path[:2])} holds itself, which JSON cannot")
    if isinstance(value, Mapping):
        if odd := [k for k in value if not (isinstance(k, str) and is_utf8(k))]:
            raise SettingsError(_line(path, f"has the key {odd[0]!r}"))
        return {str(k): to_json(part, *path, str(k), as_null=as_null) for k, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(part, *path, str(i), as_null=as_null) for i, part in enumerate(value)]
    shown = "too large" if isinstance(value, int) else reprlib.repr(value)
    raise SettingsError(_line(path, f"is {shown}, a {type(value).__name__}"))


def _line(path: tuple[str, ...], what: str) -> str:
    return (
        plain(f"{'/'.join(path)} {what}"[:200]) + f", which JSON cannot hold; allowed: {_ALLOWED}"
    )
