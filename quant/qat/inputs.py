"""Grids of the layers' inputs, fitted to what reaches them in one pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from core.bits import FLOAT_BITS
from quant.grid import naming
from quant.qat.activations import fit_activation_grid
from quant.qat.base import input_name
from quant.qat.prepare import quantized_layers


@torch.no_grad()
def calibrate_activations(model: nn.Module, forward: Callable[[nn.Module], object]) -> None:
    """Fit the grid of each layer's input to what reaches it in one pass, in place.

    When the images arrive at a layer, those before it have their grids already and compute with
    them. Layers whose input is not quantized, or that the pass does not reach, stay as they are.

    Parameters
    ----------
    model : nn.Module
        Prepared model.
    forward : callable
        ``forward(model)`` passes the images through the model once.

    Raises
    ------
    NonFiniteError
        If a NaN or an infinity reaches a layer; the message names it.

    Examples
    --------
    >>> config = QuantConfig(weight_bits=4, activation_bits=8)
    >>> model = prepare(nn.Sequential(nn.Linear(2, 1)), config)
    >>> calibrate_activations(model, lambda m: m(torch.tensor([[0.0, 1.0]])))
    >>> model[0].input_grid.high
    255
    """
    layers = {
        name: layer
        for name, layer in quantized_layers(model)
        if layer.config.activation_bits != FLOAT_BITS
    }
    for layer in layers.values():
        layer.input_grid = None

    def fit(name: str, x: Tensor) -> None:
        layer = layers[name]
        # A layer that is used twice has the grid of its first input; indices have none.
        if layer.input_grid is None and x.is_floating_point():
            with naming(name):
                layer.input_grid = fit_activation_grid(x, layer.config.activation_bits)

    if layers:
        with watched_inputs(layers, fit):
            forward(model)


@contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input)`` for every input that reaches one of these layers.

    It is the first argument, where that is a tensor; of a `PackedSequence`, its data.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> with watched_inputs({"first": model[0]}, lambda name, x: print(name, list(x.shape))):
    ...     _ = model(torch.ones(1, 3))
    first [1, 3]
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # It may have been given by its keyword.
            x = args[0] if args else kwargs.get(input_name(layer))
            x = x.data if isinstance(x, PackedSequence) else x
            if isinstance(x, Tensor):
                see(name, x)

        return look

    hooks = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
