"""A round whose result is dropped: what the strategy keeps is put back, as if it had never been."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.errors import SettingsError
from exchange.states import State, not_finite, too_large
from quant.codec import reading


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
    # As it is sent: a float64 value may be beyond float32.
    sent = {n: tensor.float() for n, tensor in (model or {}).items()}
    if (name := not_finite(sent)) is not None:
        return f"its model is not finite ({name})"
    if (name := too_large(sent)) is not None:
        return (
            f"its model holds more than {reading.LARGEST_VALUE:g} ({name}), which no client takes"
        )
    known = {id(tensor) for tensor in (model or {}).values()}
    kept = {n: tensor for n, tensor in kept.items() if id(tensor) not in known}
    while (name := not_finite(kept)) is not None:
        if name not in before or not_finite({name: before[name]}) is None:
            return f"what the strategy keeps is not finite ({name})"
        kept = {n: tensor for n, tensor in kept.items() if n != name}
    return ""
