"""State dicts as the server handles them: to and from Flower's records, joined, checked."""

from collections.abc import Mapping
from math import isfinite

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from core.errors import SettingsError
from quant import STYPE, is_variance
from quant.codec import reading

State = dict[str, Tensor]
# What NumPy holds too; a model is float32 again when the next round begins.
_FLOATS = (torch.float16, torch.float32, torch.float64)


def checked_model(model: object, start: Mapping[str, Tensor], source: str) -> State:
    """Return a model that a strategy made: every tensor of another one, in its shape and order.

    Parameters
    ----------
    model : object
        From `MixedPrecisionStrategy.combine` or `state_for`.
    start : mapping of str to Tensor
        The model that it was made from.
    source : str
        Class and method that it is from, for the error.

    Raises
    ------
    SettingsError
        One line that names the tensor.
    """
    if not isinstance(model, Mapping):
        wrong = f"a {type(model).__name__}"
    elif odd := [name for name in start if name not in model]:
        wrong = f"no {odd[0]}"
    elif odd := [name for name in model if name not in start]:
        wrong = f"{odd[0]}, which the model has not"
    else:
        wrong = next((w for n in start if (w := _unlike(model[n], n, start[n]))), "")
    if wrong:
        raise SettingsError(
            f"strategy: {source} returns {wrong}; allowed: all tensors of the model by name"
        )
    assert isinstance(model, Mapping)
    # The same objects where they can be: what is kept of them too need not be looked at twice.
    return {n: model[n].detach() if model[n].requires_grad else model[n] for n in start}


def _unlike(value: object, name: str, before: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"for {name} a {type(value).__name__}"
    if value.shape != before.shape:
        return f"{name} of shape {list(value.shape)} for {list(before.shape)}"
    if value.dtype not in _FLOATS or value.is_sparse or value.is_meta:
        kind = "sparse" if value.is_sparse else "on meta" if value.is_meta else value.dtype
        return f"{name} that is {kind} for {before.dtype}"
    return ""


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds NaN or an infinity, None if there is none.

    A model that has one is never sent.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        # What is not finite stays so in a sum, which is faster than a look at every value. That of
        # many ordinary float16 values would overflow in float16.
        if not isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
            return name
    return None


def too_large(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds what no update may, None if there is none."""
    for name, tensor in state.items():
        if tensor.numel() and not max(map(abs, tensor.aminmax())) <= reading.LARGEST_VALUE:
            return name
    return None


def without_negative_variances(state: Mapping[str, Tensor]) -> State:
    """Return a model that can be sent: a step beyond the mean can carry a variance below zero."""
    return {n: t.clamp(min=0) if is_variance(n) else t for n, t in state.items()}


def join_states(states: Mapping[str, State]) -> State:
    """Make one state of several, each name behind its key and a slash."""
    return {f"{key}/{name}": t for key, state in states.items() for name, t in state.items()}


def split_states(joined: State) -> dict[str, State]:
    """Undo `join_states`; empty states are lost. Names of tensors hold no slash."""
    states: dict[str, State] = {}
    for path, tensor in joined.items():
        key, _, name = path.rpartition("/")
        states.setdefault(key, {})[name] = tensor
    return states


def to_array(payload: bytes) -> Array:
    """Wrap a payload as the one array of a record."""
    return Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)


def to_state(arrays: ArrayRecord) -> State:
    """Turn Flower's record of a state dict into float32 tensors; integer entries are left out."""
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    return {name: t.float() for name, t in tensors.items() if t.is_floating_point()}


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Turn a state dict into Flower's record, one array a tensor."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
    return ArrayRecord({name: Array.from_numpy_ndarray(array) for name, array in arrays.items()})
