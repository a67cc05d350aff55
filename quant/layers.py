"""Quantization-aware convolution and linear layers, made from an ordinary model by one call.

`prepare` swaps every `nn.Conv2d` and `nn.Linear` for a layer that computes with fake-quantized
weights and activations, on torch's own operators, and keeps parameter names, so that a state dict
fits both models. With `QuantConfig(gradient_bits=8)` the errors that flow back through each layer
are quantized too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.activations import (
    ActivationGrid,
    fake_quantize_activation,
    fit_activation_grid,
    put_on_grid,
    quantize_error,
)
from quant.arguments import check_width
from quant.grid import FLOAT_BITS, fake_quantize, fit_scale


@dataclass(frozen=True)
class QuantConfig:
    """Widths that a layer computes with.

    Attributes
    ----------
    weight_bits : int
        Per-channel grid of the weights, 2 to 16.
    activation_bits : int
        Per-tensor grid of each layer's input, 2 to 16; 32 leaves it float32.
    gradient_bits : int
        Per-tensor grid of the errors that reach each layer's output, 2 to 16; 32 leaves them
        float32.
    """

    weight_bits: int
    activation_bits: int = FLOAT_BITS
    gradient_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        check_width("weight_bits", self.weight_bits, or_float=False)
        check_width("activation_bits", self.activation_bits)
        check_width("gradient_bits", self.gradient_bits)


class QuantLayer(nn.Module):
    """What the quantization-aware layers share: the scale, and the three fake quantizations."""

    weight: Tensor
    weight_scale: Tensor
    config: QuantConfig
    # Until it is fitted, each input has the grid that spans it.
    input_grid: ActivationGrid | None = None

    def attach(self, config: QuantConfig) -> None:
        self.config = config
        # Not persistent: the state dict stays that of the ordinary layer.
        self.register_buffer("weight_scale", torch.empty(0), persistent=False)
        self.refit_scale()

    @torch.no_grad()
    def refit_scale(self) -> None:
        """Fit the scale to the weights as they are now."""
        self.weight_scale = fit_scale(self.weight, self.config.weight_bits)

    def quantized_weight(self) -> Tensor:
        """Return the weight on its grid, with a straight-through gradient."""
        return fake_quantize(self.weight, self.weight_scale, self.config.weight_bits)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return a layer's input on its grid."""
        bits = self.config.activation_bits
        if bits == FLOAT_BITS:
            return x
        if self.input_grid is None:
            return fake_quantize_activation(x, bits)
        return put_on_grid(x, self.input_grid)

    def quantized_error(self, y: Tensor) -> Tensor:
        """Return `y`; its gradient is quantized on the way back."""
        bits = self.config.gradient_bits
        return y if bits == FLOAT_BITS else quantize_error(y, bits)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` that computes with fake-quantized weights and input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)
        return self.quantized_error(y)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` that computes with fake-quantized weights and input."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)
        return self.quantized_error(y)


_QUANTIZED_CLASS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Make a model quantization-aware, in place.

    Parameters
    ----------
    model : nn.Module
        Any model; its `nn.Conv2d` and `nn.Linear` modules change their class and keep their
        parameters, hooks and names. Subclasses of the two are left alone.
    config : QuantConfig
        Widths.

    Returns
    -------
    nn.Module
        The same model. Scales are fitted to its present weights.
    """
    for module in model.modules():
        quantized_class = _QUANTIZED_CLASS.get(type(module))
        if quantized_class is not None:
            module.__class__ = quantized_class
            assert isinstance(module, QuantLayer)
            module.attach(config)
    return model


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """Yield the names and quantization-aware layers of a prepared model."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)):
            yield name, module


def layers_by_weight(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """Yield the quantization-aware layers of a prepared model by the names of their weights."""
    for name, layer in quantized_layers(model):
        yield f"{name}.weight" if name else "weight", layer


def refit_scales(model: nn.Module) -> None:
    """Fit the scales of a prepared model to its present weights."""
    for _, layer in quantized_layers(model):
        layer.refit_scale()


def set_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Give a prepared model's layers the scales of the grid that their weights came on.

    Parameters
    ----------
    model : nn.Module
        Prepared model.
    scales : mapping of str to Tensor
        Float32 scales ``[channels]`` by weight name; layers that are not named keep theirs.
    """
    for name, layer in layers_by_weight(model):
        if name in scales:
            layer.weight_scale = scales[name].clone()


def weight_scales(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales of a prepared model by the names of the weights they belong to."""
    return {name: layer.weight_scale for name, layer in layers_by_weight(model)}


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
    """
    layers = [
        layer for _, layer in quantized_layers(model) if layer.config.activation_bits != FLOAT_BITS
    ]
    for layer in layers:
        layer.input_grid = None

    def fit(layer: QuantLayer, inputs: tuple[Tensor]) -> None:
        # A layer that is used twice has the grid of its first input.
        if layer.input_grid is None:
            layer.input_grid = fit_activation_grid(inputs[0], layer.config.activation_bits)

    hooks = [layer.register_forward_pre_hook(fit) for layer in layers]
    try:
        if layers:
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
