"""What of a model is sent and averaged: its tensors by name, and a model at a bit-width."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from core.arguments import check_kind
from core.bits import FLOAT_BITS
from quant.grid import is_finite
from quant.qat.prepare import layers_by_weight
from quant.qat.survey import quantizable_weights
from quant.update import (
    Update,
    UpdateSpec,
    fit_scales,
    float_tensors,
    is_statistic,
    quantize_state,
)


def federated_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that are sent and averaged.

    These are its floating-point parameters and buffers. A buffer that holds a NaN or an infinity
    before any training, as a mask of attention does, is a constant of the model and is not sent;
    BatchNorm's statistics are not constants: non-finite ones are wrong. A tensor that has several
    names in the model, as a weight that two layers share, is sent once, by the first.

    >>> list(federated_state(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var']
    """
    check_kind("model", model, nn.Module)
    again = _other_names(model)
    floats = {n: t for n, t in float_tensors(model.state_dict()).items() if n not in again}
    buffers = floats.keys() & {name for name, _ in model.named_buffers() if not is_statistic(name)}
    constant = {name for name in buffers if not is_finite(floats[name])}
    return {name: tensor for name, tensor in floats.items() if name not in constant}


def _other_names(model: nn.Module) -> set[str]:
    """Return the further names of parameters and buffers that have several."""
    others = set()
    for named in (model.named_parameters, model.named_buffers):
        once = {name for name, _ in named()}
        others |= {name for name, _ in named(remove_duplicate=False)} - once
    return others


def tensors_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return the named tensors of a model as they are now, in its order.

    >>> list(tensors_of(nn.Linear(3, 2), ["bias"]))
    ['bias']
    """
    check_kind("model", model, nn.Module)
    return {name: t.detach() for name, t in model.state_dict().items() if name in names}


def spec_of(model: nn.Module) -> UpdateSpec:
    """Return which tensors of a model are sent, and which of them low-bit clients quantize.

    Parameters
    ----------
    model : nn.Module
        As it was made, before any training; prepared or not.

    Examples
    --------
    >>> spec_of(nn.Linear(3, 2))
    UpdateSpec(shapes={'weight': (2, 3), 'bias': (2,)}, on_grid=frozenset({'weight'}))
    """
    return UpdateSpec.of(federated_state(model), quantizable_weights(model))


def quantize_model(model: nn.Module, bits: int) -> Update:
    """Bring a model to a bit-width by rounding its weights to nearest.

    A layer that is prepared for this width keeps its scale (`set_scales`), so that the result is
    what the model computes with; all others are fitted.

    Examples
    --------
    >>> quantize_model(nn.Linear(3, 2), 4).quantized["weight"].codes.dtype
    torch.int8
    """
    state, names = federated_state(model), quantizable_weights(model)
    if bits == FLOAT_BITS:
        return quantize_state(state, bits)
    layers = dict(layers_by_weight(model))
    own = {
        name: layers[name].scale
        for name in names
        if name in layers and layers[name].layer.config.weight_bits == bits
    }
    return quantize_state(state, bits, fit_scales(state, {*names} - own.keys(), bits) | own)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a state; all else of the model, as step counters, stays as it is.

    What has several names in the model needs one.

    >>> model = nn.Linear(3, 2)
    >>> load_state(model, {"bias": torch.ones(2)})
    >>> model.bias.tolist()
    [1.0, 1.0]
    """
    check_kind("model", model, nn.Module)
    check_kind("state", state, Mapping)
    # Changed in place: a state dict also holds the versions of its modules, which some read.
    whole = model.state_dict()
    whole.update(state)
    model.load_state_dict(whole)
