"""State dicts as the server handles them: validated, kept, put back, and in Flower's records."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from core.errors import SettingsError
from quant import LARGEST_VALUE, is_variance

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


class RoundDropped(Exception):
    """Raised in `combine` where no model can be made of a round; the message says why."""


def what_is_kept(checkpoint: Callable[[], object]) -> tuple[State, dict[str, object]]:
    """Return what a strategy's `checkpoint` returns: tensors and values by name.

    Raises
    ------
    SettingsError
        If it returns anything else.
    """
    match checkpoint():
        case (Mapping() as tensors, Mapping() as values):
            return dict(tensors), dict(values)
        case other:
            name = getattr(checkpoint, "__qualname__", "checkpoint")
            raise SettingsError(
                f"strategy: {name} returns a {type(other).__name__}; allowed: two mappings, one "
                "of tensors and one of values that JSON can hold"
            )


@dataclass(frozen=True)
class Snapshot:
    """What a strategy kept before a round, by value: nothing that it does later changes it.

    Attributes
    ----------
    tensors, values : dict
        As `MixedPrecisionStrategy.checkpoint` returned them.
    """

    tensors: State
    values: dict[str, Any]

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], replaced: bool
    ) -> "Snapshot":
        """Copy what `checkpoint` returned, but for tensors that are only ever replaced."""
        kept = {n: t if replaced else t.detach().clone() for n, t in tensors.items()}
        return cls(kept, copy.deepcopy(dict(values)))


def why_unusable(
    model: Mapping[str, Tensor] | None, kept: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> str:
    """Say why a round's result cannot be used; empty if it can.

    Parameters
    ----------
    model : mapping of str to Tensor or None
        The next model, if one was made.
    kept : mapping of str to Tensor
        What the strategy keeps for later rounds.
    before : mapping of str to Tensor
        What it kept before; a tensor that was not finite then is not this round's fault.
    """
    known = set()
    for name, tensor in (model or {}).items():
        known.add(id(tensor))
        # As it is sent: a float64 value may be beyond float32.
        largest = _largest(tensor.float())
        if not isfinite(largest):
            return f"its model is not finite ({name})"
        if largest > LARGEST_VALUE:
            return f"its model holds more than {LARGEST_VALUE:g} ({name}), which no client takes"
    for name, tensor in kept.items():
        if id(tensor) in known or isfinite(_largest(tensor)):
            continue
        if name not in before or isfinite(_largest(before[name])):
            return f"what the strategy keeps is not finite ({name})"
    return ""


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude; NaN if a value is."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    smallest, largest = tensor.detach().aminmax()
    return max(-float(smallest), float(largest))


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


def to_state(arrays: ArrayRecord) -> State:
    """Turn Flower's record of a state dict into float32 tensors; integer entries are left out."""
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    return {name: t.float() for name, t in tensors.items() if t.is_floating_point()}


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Turn a state dict into Flower's record, one array a tensor."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
    return ArrayRecord({name: Array.from_numpy_ndarray(array) for name, array in arrays.items()})
