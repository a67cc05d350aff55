"""What a model must be to be trained, sent and averaged; each refusal names the tensor."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from core.errors import SettingsError
from core.files import is_utf8, printable
from quant import LARGEST_VALUE, federated_state, is_finite

# What a checkpoint holds and an update brings back, rounded to float32.
_BUFFER_TYPES = (torch.float16, torch.float32, torch.float64)
# As a payload states the length of a name in two bytes.
_LONGEST_NAME = 2**16 - 1


def check_repeatable(model: nn.Module, again: nn.Module, name: str) -> None:
    """Refuse a factory that gives one module twice, or under one seed other weights.

    Raises
    ------
    SettingsError
        If `model` and `again`, built alike, share their memory or are not alike.
    """
    first, second = federated_state(model), federated_state(again)
    if model is again or _memory(first) & _memory(second):
        raise SettingsError(
            f"model: {name!r} returns what it returned before; it must make a new module"
        )
    alike = first.keys() == second.keys() and all(
        first[n].shape == second[n].shape and torch.equal(first[n], second[n]) for n in first
    )
    if not alike:
        raise SettingsError(
            f"model: {name!r} gives other weights under the same seed; they must depend on torch's "
            "random numbers alone"
        )


def check_model(model: object, name: str) -> None:
    """Refuse what is no model, or cannot be trained, sent and averaged.

    Raises
    ------
    SettingsError
        One line that names the tensor.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"task: {name!r} gives a {type(model).__name__}; allowed: an nn.Module")
    check_weights(model, name)
    _check_sent(model, name)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise SettingsError(f"model: {name!r} has no weight that is trained; allowed: one or more")


def _memory(state: dict[str, Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in state.values() if tensor.numel()}


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse what cannot be sent and averaged: weights not float32, not finite, nowhere, sparse."""
    sent = model.state_dict()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SettingsError(f"model: {name!r}: {key} is on meta; allowed: weights in memory")
        if key in sent and tensor.layout != torch.strided:
            raise SettingsError(f"model: {name!r}: {key} is {tensor.layout}; allowed: dense")
        if key in sent and _is_expanded(tensor):
            raise SettingsError(
                f"model: {name!r}: {key} is expanded: values of its share one place in memory, "
                "which no weights can be loaded into; allowed: memory of its own, as of clone()"
            )
    for key, weight in model.named_parameters():
        if isinstance(weight, nn.parameter.UninitializedParameter):
            continue
        if weight.dtype != torch.float32:
            raise SettingsError(f"model: {name!r}: {key} is {weight.dtype}; allowed: torch.float32")
        if not is_finite(weight.detach()):
            raise SettingsError(f"model: {name!r}: {key} is not finite before any training")


def _is_expanded(tensor: Tensor) -> bool:
    if nn.parameter.is_lazy(cast(Any, tensor)) or tensor.layout != torch.strided:
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(size > 1 and not step for size, step in pairs)


def _check_sent(model: nn.Module, name: str) -> None:
    """Refuse what no payload or checkpoint holds, of a model whose lazy layers have been called."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(cast(Any, tensor)):
            raise SettingsError(
                f"model: {name!r}: {key} has no shape, as its lazy layer takes no part in the "
                "forward pass"
            )
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if tensor.dtype not in _BUFFER_TYPES:
                allowed = ", ".join(map(str, _BUFFER_TYPES))
                raise SettingsError(f"model: {name!r}: {key} is {tensor.dtype}; allowed: {allowed}")
            if not is_utf8(key) or len(key.encode()) > _LONGEST_NAME:
                raise SettingsError(
                    f"model: {name!r}: {printable(key)[:60]} cannot be a tensor's name; allowed: "
                    f"UTF-8 of {_LONGEST_NAME} bytes at most"
                )
    for key, tensor in federated_state(model).items():
        if tensor.numel() and (largest := float(tensor.abs().max())) > LARGEST_VALUE:
            raise SettingsError(
                f"model: {name!r}: {key} holds {largest:g} before any training; allowed: up to "
                f"{LARGEST_VALUE:g}"
            )


def check_logits(logits: object, images: int, num_classes: int, name: str) -> None:
    """Refuse what a model gives if it is not a dense float tensor, one row an image."""
    what = f"model: {name!r} gives"
    if not isinstance(logits, Tensor):
        raise SettingsError(f"{what} a {type(logits).__name__}, not logits")
    if logits.shape != (images, num_classes):
        raise SettingsError(
            f"{what} logits {list(logits.shape)} for {images} images; "
            f"it must be {[images, num_classes]}"
        )
    if logits.is_meta or logits.layout != torch.strided or not logits.is_floating_point():
        kind = f"{logits.layout} of {logits.dtype}" + (" on meta" if logits.is_meta else "")
        raise SettingsError(f"{what} logits that are {kind}; allowed: dense, floating-point")
