"""Quantization-aware convolution and linear layers, made from an ordinary model by one call.

`prepare` swaps every `nn.Conv2d` and `nn.Linear` for a layer that computes with fake-quantized
weights and activations, on torch's own operators, and keeps parameter names, so that a state dict
fits both models. With `QuantConfig(gradient_bits=8)` the output gradients of each layer
are quantized too.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.arguments import check_kind, check_tensors
from core.bits import FLOAT_BITS, check_width
from quant.grid import check_finite, fake_quantize, fit_scale, is_finite, naming
from quant.qat.activations import (
    ActivationGrid,
    fake_quantize_activation,
    fit_activation_grid,
    put_on_grid,
    quantize_output_gradient,
)
from quant.update import (
    Update,
    UpdateSpec,
    fit_scales,
    float_tensors,
    is_statistic,
    quantize_state,
)


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
        Per-tensor grid of the gradients of each layer's output, 2 to 16; 32 leaves them float32.

    Examples
    --------
    >>> QuantConfig(weight_bits=4, activation_bits=8)
    QuantConfig(weight_bits=4, activation_bits=8, gradient_bits=32)
    """

    weight_bits: int
    activation_bits: int = FLOAT_BITS
    gradient_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "gradient_bits"):
            bits = check_width(name, getattr(self, name), or_float=name != "weight_bits")
            object.__setattr__(self, name, bits)


class QuantLayer(nn.Module):
    """What the quantization-aware layers share: the scale, and the three fake quantizations."""

    weight: Tensor
    weight_scale: Tensor
    config: QuantConfig
    # Until it is fitted, each input has the grid that spans it.
    input_grid: ActivationGrid | None = None
    # Until it is given one, the gradient's noise is from torch's own.
    generator: torch.Generator | None = None

    def attach(self, config: QuantConfig) -> None:
        """Take the widths, also in place of others, and fit the scale; the input's grid is gone."""
        self.config = config
        self.input_grid = None
        # Not persistent: the state dict stays that of the ordinary layer.
        self.register_buffer("weight_scale", torch.empty(0), persistent=False)
        self.refit_scale()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `half`, `to` and the like call: the grid is one of float32, and would become another.
        dtype = fn(self.weight.detach()[:0]).dtype
        if dtype != torch.float32:
            raise TypeError(_wrong_dtype(dtype))
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # What `layer.weight = nn.Parameter(...)` calls.
        if name != "weight" or param is None or "weight_scale" not in self._buffers:
            super().register_parameter(name, param)
            return
        if param.dtype != torch.float32:
            raise TypeError(_wrong_dtype(param.dtype))
        super().register_parameter(name, param)
        self._take_new_weights(name)

    def reset_parameters(self) -> None:
        """Draw new weights, as torch's layer does, and fit the scale to them."""
        super().reset_parameters()  # type: ignore[misc]  # Of the layer beside it.
        if "weight_scale" in self._buffers:
            self._take_new_weights("weight")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}weight" in state_dict:
            self._take_new_weights(f"{prefix}weight")

    def _take_new_weights(self, name: str) -> None:
        # It was fitted to what the weights before made of the images.
        self.input_grid = None
        with naming(name):
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

    def quantized_output_gradient(self, y: Tensor) -> Tensor:
        """Return `y`; its gradient is quantized on the way back."""
        bits = self.config.gradient_bits
        return y if bits == FLOAT_BITS else quantize_output_gradient(y, bits, self.generator)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` that computes with fake-quantized weights and input.

    >>> model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), QuantConfig(weight_bits=4))
    >>> model[0].weight_scale.shape
    torch.Size([4])
    """

    def forward(self, input: Tensor) -> Tensor:
        y = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` that computes with fake-quantized weights and input.

    >>> model = prepare(nn.Sequential(nn.Linear(8, 1)), QuantConfig(weight_bits=2))
    >>> len(model[0].quantized_weight().unique()) <= 3
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output_gradient(y)


_QUANTIZED_CLASS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def quantizable_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that a low-bit client holds on a grid.

    This is the one rule of what is quantized: the weights of `nn.Conv2d` and `nn.Linear` layers,
    prepared or not. Subclasses of the two, and a layer that was given a `forward` of its own, are
    left alone, as their forward pass may be another, and so is a weight that two layers share; all
    these, and every other layer, compute and travel in float32.

    Examples
    --------
    >>> quantizable_weights(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.LayerNorm(2)))
    ['1.weight']
    """
    return list(_quantizable(model))


def _quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by the names of their weights."""
    check_kind("model", model, nn.Module)
    uses = Counter(_place_of(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight".removeprefix("."): module
        for name, module in model.named_modules()
        if (type(module) in _QUANTIZED_CLASS or isinstance(module, QuantLayer))
        and "forward" not in vars(module)
        and isinstance(module.weight, nn.Parameter)
        and uses[_place_of(module.weight)] == 1
    }


def _place_of(parameter: nn.Parameter) -> int:
    """Return what two parameters have in common that are one, or lie in the same memory."""
    unmade = isinstance(parameter, nn.parameter.UninitializedParameter)
    place = 0 if unmade else parameter.data_ptr()
    return place or id(parameter)  # What is not in memory shares none.


def federated_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that are sent and averaged.

    These are its floating-point parameters and buffers. A buffer that holds a NaN or an infinity
    before any training, as a mask of attention does, is a constant of the model and is not sent;
    BatchNorm's statistics are not constants: non-finite ones are wrong.

    >>> list(federated_state(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var']
    """
    check_kind("model", model, nn.Module)
    floats = float_tensors(model.state_dict())
    buffers = floats.keys() & {name for name, _ in model.named_buffers() if not is_statistic(name)}
    constant = {name for name in buffers if not is_finite(floats[name])}
    return {name: tensor for name, tensor in floats.items() if name not in constant}


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
        name: layers[name].weight_scale
        for name in names
        if name in layers and layers[name].config.weight_bits == bits
    }
    return quantize_state(state, bits, fit_scales(state, {*names} - own.keys(), bits) | own)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a state; all else of the model, as step counters, stays as it is.

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


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Make a model quantization-aware, in place.

    Parameters
    ----------
    model : nn.Module
        Any model; its `nn.Conv2d` and `nn.Linear` modules (`quantizable_weights`) change their
        class and keep their parameters, hooks and names. Layers that were prepared for other
        widths take the new ones.
    config : QuantConfig
        Widths.

    Returns
    -------
    nn.Module
        The same model. Scales are fitted to its present weights, and again whenever weights are
        loaded into it, a layer is given another `nn.Parameter`, or its ``reset_parameters`` is
        called; after each, grids of activations are to be fitted anew. What changes weights in
        place, as an optimizer, `torch.nn.init` or ``weight.data``, leaves the scales as they are,
        and clips what is beyond them: call `refit_scales` after it.

    Raises
    ------
    ValueError
        If a weight that is to be quantized is empty, not finite or not float32; the message names
        it, and the model is as it was.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 2)), QuantConfig(weight_bits=4))
    >>> model(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"config: {config!r} is not allowed: it should be a QuantConfig")
    layers = _quantizable(model)
    for name, layer in layers.items():
        weight = layer.get_parameter("weight").detach()
        with naming(name):
            check_finite(weight, "the weight")
        if weight.dtype != torch.float32:
            raise ValueError(f"{name}: {_wrong_dtype(weight.dtype)}")
        if not weight.numel():
            raise ValueError(f"{name} has no values: its shape is {list(weight.shape)}")
    for layer in layers.values():
        layer.__class__ = _QUANTIZED_CLASS.get(type(layer), type(layer))
        assert isinstance(layer, QuantLayer)
        layer.attach(config)
    for module in model.modules():
        # Torch's fused kernel would compute with the weights as they are, not on their grid.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _wrong_dtype(dtype: torch.dtype) -> str:
    return f"a quantization-aware layer computes in torch.float32; its weight cannot be {dtype}"


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """Yield the names and quantization-aware layers of a prepared model.

    >>> model = prepare(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), QuantConfig(weight_bits=4))
    >>> [name for name, _ in quantized_layers(model)]
    ['0']
    """
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)):
            yield name, module


def layers_by_weight(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """Yield the quantization-aware layers of a prepared model by the names of their weights.

    >>> model = prepare(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), QuantConfig(weight_bits=4))
    >>> [name for name, _ in layers_by_weight(model)]
    ['0.weight']
    """
    for name, layer in quantized_layers(model):
        yield f"{name}.weight" if name else "weight", layer


def refit_scales(model: nn.Module) -> None:
    """Fit the scales of a prepared model to its present weights.

    >>> model = prepare(nn.Sequential(nn.Linear(1, 1)), QuantConfig(weight_bits=8))
    >>> _ = nn.init.constant_(model[0].weight, 12.7)
    >>> refit_scales(model)
    >>> weight_scales(model)
    {'0.weight': tensor([0.1000])}
    """
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

    Raises
    ------
    ValueError
        If there is no such layer, or a scale is not one positive number for each of its channels.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 1)), QuantConfig(weight_bits=4))
    >>> set_scales(model, {"0.weight": torch.tensor([0.5])})
    >>> weight_scales(model)
    {'0.weight': tensor([0.5000])}
    """
    layers = dict(layers_by_weight(model))
    check_tensors("scales", scales)
    for name, scale in scales.items():
        if name not in layers:
            raise ValueError(f"{name}: there is no layer that was prepared with this weight")
        shape = layers[name].weight.shape[:1]
        if scale.shape != shape or (scale <= 0).any():
            raise ValueError(
                f"{name}: a scale of shape {list(scale.shape)}; allowed: a number above 0 for each "
                f"of {shape[0]} channels"
            )
        with naming(name):
            check_finite(scale, "the scale")
    for name, scale in scales.items():
        layers[name].weight_scale = scale.float().clone()


def set_generator(model: nn.Module, generator: torch.Generator) -> None:
    """Give a prepared model's layers the source of the noise that rounds their gradients.

    Parameters
    ----------
    model : nn.Module
        Prepared model.
    generator : torch.Generator
        On the model's device. Without one, layers draw from torch's own, as dropout does.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 1)), QuantConfig(4, gradient_bits=8))
    >>> set_generator(model, torch.Generator().manual_seed(1))
    >>> model[0].generator.initial_seed()
    1
    """
    check_kind("generator", generator, torch.Generator)
    for _, layer in quantized_layers(model):
        layer.generator = generator


def weight_scales(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales of a prepared model by the names of the weights they belong to.

    Raises
    ------
    ValueError
        If a weight was tied or parametrized after it was prepared, and so has no grid any more.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 2)), QuantConfig(weight_bits=4))
    >>> weight_scales(model)["0.weight"].shape
    torch.Size([2])
    """
    layers, on_grid = dict(layers_by_weight(model)), {*quantizable_weights(model)}
    if loose := [name for name in layers if name not in on_grid]:
        raise ValueError(
            f"{loose[0]}: its layer was prepared, and its weight tied, parametrized or given "
            "another forward pass since; prepare the model last"
        )
    return {name: layer.weight_scale for name, layer in layers.items()}


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
        # A layer that is used twice has the grid of its first input.
        if layer.input_grid is None:
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

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> with watched_inputs({"first": model[0]}, lambda name, x: print(name, list(x.shape))):
    ...     _ = model(torch.ones(1, 3))
    first [1, 3]
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        # It may have been given by its keyword.
        return lambda layer, args, kwargs: see(name, args[0] if args else kwargs["input"])

    hooks = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
