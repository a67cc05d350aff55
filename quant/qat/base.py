"""What all quantization-aware layers share: their grids, and three fake quantizations.

Such a layer is a subclass of `QuantLayer` and of torch's layer, made from that in place by changing
its class, so that its parameters, hooks and the names of its state dict stay. It computes with
torch's own forward pass, in which its weights are replaced by fake-quantized ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from core.bits import FLOAT_BITS
from quant.grid import fake_quantize, naming
from quant.qat.activations import (
    ActivationGrid,
    fake_quantize_activation,
    put_on_grid,
    quantize_output_gradient,
)
from quant.qat.config import QuantConfig
from quant.scales import fit_scale


class QuantLayer(nn.Module):
    """A layer with one or more weights on grids, and its input and output gradients on others.

    The scale of a weight, one for each index of its first dimension, is the buffer of the weight's
    name and ``_scale``. A weight that several layers hold has one scale, in the first of them.

    Attributes
    ----------
    config : QuantConfig
        Widths.
    weight_names : tuple of str
        Attributes of the weights that are on a grid.
    input_grid : ActivationGrid or None
        Until it is fitted, each input has the grid that spans it.
    generator : torch.Generator or None
        Until it is given one, the gradient's noise is from torch's own.

    Examples
    --------
    A layer of one's own that computes in its own way, for `LayerRule`:

    >>> class QuantBilinear(QuantLayer, nn.Bilinear):
    ...     def forward(self, input1, input2):
    ...         x1, x2 = (self.quantized_input(x) for x in (input1, input2))
    ...         return self.computed(x1, x2)
    """

    # No annotations of attributes that torch's layers have, which would be those of some only.
    config: QuantConfig
    weight_names: tuple[str, ...] = ()
    input_grid: ActivationGrid | None = None
    generator: torch.Generator | None = None
    _owners: dict[str, "tuple[QuantLayer, str]"]

    def attach(
        self,
        config: QuantConfig,
        weights: Sequence[str] = ("weight",),
        owners: "Mapping[str, tuple[QuantLayer, str]] | None" = None,
    ) -> None:
        """Take the widths, also in place of others, and fit the scales; the input's grid is gone.

        Parameters
        ----------
        config : QuantConfig
            Widths.
        weights : sequence of str
            Attributes of the weights that are to be on a grid.
        owners : mapping of str to (QuantLayer, str)
            Of those that an earlier layer holds too: that layer, and its attribute.
        """
        self.config = config
        self.input_grid = None
        for name in self.weight_names:
            if name not in self._owners:
                delattr(self, _scale_name(name))
        self.weight_names = tuple(weights)
        self._owners = dict(owners or {})
        for name in self.weight_names:
            if name not in self._owners:
                self._add_scale(name)

    def _add_scale(self, name: str) -> None:
        # Not persistent: the state dict stays that of the ordinary layer.
        self.register_buffer(_scale_name(name), torch.empty(0), persistent=False)
        self.refit_scale(name)

    def owner(self, name: str) -> "tuple[QuantLayer, str]":
        """Return the layer that has a weight's scale, and the weight's attribute there."""
        return self._owners.get(name, (self, name))

    def scale(self, name: str = "weight") -> Tensor:
        """Return the scales ``[channels]`` of a weight."""
        layer, attribute = self.owner(name)
        scale: Tensor = getattr(layer, _scale_name(attribute))
        return scale

    def set_scale(self, scale: Tensor, name: str = "weight") -> None:
        """Give a weight another scale, in all layers that hold it."""
        layer, attribute = self.owner(name)
        setattr(layer, _scale_name(attribute), scale)

    @torch.no_grad()
    def refit_scale(self, name: str | None = None) -> None:
        """Fit the scale to a weight as it is now, or the scales to all weights."""
        for one in self.weight_names if name is None else (name,):
            layer, attribute = self.owner(one)
            layer.set_scale(layer.fitted_scale(getattr(layer, attribute)), attribute)

    def fitted_scale(self, weight: Tensor) -> Tensor:
        """Return the scale that fits a weight."""
        return fit_scale(weight, self.config.weight_bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `half`, `to` and the like call: the grid is one of float32, and would become another.
        for name in self.weight_names:
            dtype = fn(getattr(self, name).detach()[:0]).dtype
            if dtype != torch.float32:
                raise TypeError(wrong_dtype(dtype))
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # What `layer.weight = nn.Parameter(...)` calls.
        if name not in self.weight_names or param is None:
            super().register_parameter(name, param)
            return
        if param.dtype != torch.float32:
            raise TypeError(wrong_dtype(param.dtype))
        super().register_parameter(name, param)
        self.input_grid = None
        if self._owners.pop(name, None):  # It is no longer theirs.
            self._add_scale(name)
        with naming(name):
            self.refit_scale(name)

    def reset_parameters(self) -> None:
        """Draw new weights, as torch's layer does, and fit the scales to them."""
        reset = getattr(super(), "reset_parameters", None)
        if reset is not None:
            reset()
            self._take_new_weights()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._take_new_weights(prefix, [n for n in self.weight_names if prefix + n in state_dict])

    def _take_new_weights(self, prefix: str = "", names: Sequence[str] | None = None) -> None:
        for name in self.weight_names if names is None else names:
            # It was fitted to what the weights before made of the images.
            self.input_grid = None
            with naming(prefix + name):
                self.refit_scale(name)

    def quantized_weight(self, name: str = "weight") -> Tensor:
        """Return a weight on its grid, with a straight-through gradient."""
        # It may be no parameter for the while of `torch.func.functional_call`.
        return fake_quantize(getattr(self, name), self.scale(name), self.config.weight_bits)

    def quantized_weights(self) -> dict[str, Tensor]:
        """Return what the forward pass computes with in place of parameters, by their names."""
        return {name: self.quantized_weight(name) for name in self.weight_names}

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return a layer's input on its grid."""
        bits = self.config.activation_bits
        if bits == FLOAT_BITS:
            return x
        if self.input_grid is None:
            return fake_quantize_activation(x, bits)
        return put_on_grid(x, self.input_grid)

    def quantized_output_gradient(self, y: Tensor) -> Tensor:
        """Return `y`; its gradient is quantized in the backward pass."""
        bits = self.config.gradient_bits
        return y if bits == FLOAT_BITS else quantize_output_gradient(y, bits, self.generator)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as torch's layer does, with weights and the first input on their grids.

        An input of integers, as indices, is no number to be quantized, and further inputs, as the
        hidden state of a recurrent layer, stay as they are.
        """
        if args:
            args = (_each(args[0], self.quantized_input), *args[1:])
        elif (name := input_name(self)) in kwargs:
            kwargs[name] = _each(kwargs[name], self.quantized_input)
        return self.computed(*args, **kwargs)

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's layer computes with the weights on their grids.

        The gradient of each tensor in it, also within a tuple, list or dict, is quantized on its
        way back; what is passed back between the parts of the layer, as between the steps of a
        recurrent one, is not.
        """
        weights = {f"layer.{name}": w for name, w in self.quantized_weights().items()}
        # Each attribute has its own, and so has a submodule that shares a weight.
        y = functional_call(_TorchForward(self), weights, args, kwargs, tie_weights=False)
        return _each(y, self.quantized_output_gradient)


class _TorchForward(nn.Module):
    """The forward pass that a quantization-aware layer had before, as a module to call."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(QuantLayer, self.layer).forward(*args, **kwargs)


@dataclass(frozen=True)
class LayerWeight:
    """A weight by the layer that holds it, and the attribute that it has there.

    Attributes
    ----------
    layer : QuantLayer
    attribute : str

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.LSTM(2, 3)), QuantConfig(weight_bits=4))
    >>> held = dict(layers_by_weight(model))["0.weight_hh_l0"]
    >>> held.attribute, held.scale.shape
    ('weight_hh_l0', torch.Size([12]))
    """

    layer: QuantLayer
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The weight, in float32."""
        return self.layer.get_parameter(self.attribute)

    @property
    def scale(self) -> Tensor:
        """Its scales ``[channels]``."""
        return self.layer.scale(self.attribute)

    def quantized(self) -> Tensor:
        """Return what the layer computes with."""
        return self.layer.quantized_weight(self.attribute)


def input_name(layer: nn.Module) -> str:
    """Return the name of the first argument of a layer's forward pass; empty if it has none.

    >>> input_name(nn.MultiheadAttention(2, 1))
    'query'
    """
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.POSITIONAL_ONLY)
    for kind in type(layer).__mro__:
        if "forward" in vars(kind):
            parameters = signature(vars(kind)["forward"]).parameters.values()
            found = [p.name for p in parameters if p.kind in named]
            if len(found) > 1:  # The layer itself is one; our own passes on whatever it is given.
                return found[1]
    return ""


def wrong_dtype(dtype: torch.dtype) -> str:
    """Return why a weight cannot have a type."""
    return f"a quantization-aware layer computes in torch.float32; its weight cannot be {dtype}"


def _scale_name(weight: str) -> str:
    return f"{weight}_scale"


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of floats, also within what a layer takes or gives several in."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if type(value) in (tuple, list):
        return type(value)(_each(part, change) for part in value)
    if type(value) is dict:
        return {key: _each(part, change) for key, part in value.items()}
    return value
