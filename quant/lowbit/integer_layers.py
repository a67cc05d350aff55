"""Networks for integer training: the modules that one is built of, and what prepares it.

WAGE (arXiv:1802.04680) puts three things on grids: a layer's weights, its activation on the way
forward, and the output gradient that reaches the activation on the way back. Here `IntegerInput`,
`IntegerActivation` and `IntegerOutput` do the latter two, `Scaled` holds an ordinary layer and its
scale alpha. A network of them computes in float32 until `prepare_integer` gives it widths, with
the same clipping: so low-bit and Float32 clients train one network, whose weights mean the same to
both.
"""

from collections.abc import Iterator
from math import frexp, log2, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.arguments import check_kind
from core.bits import FLOAT_BITS
from quant.grid import check_finite
from quant.lowbit.integer import (
    quantize_shifted,
    quantize_unit,
    shift_of,
    sigma,
    stored,
    ternary,
)
from quant.qat.base import QuantLayer
from quant.qat.config import QuantConfig
from quant.qat.layers import QuantConv2d, QuantLinear
from quant.qat.prepare import prepare

# Of the uniform initial weights: half a ternary step more than the outer level.
INITIAL_RANGE = 0.75


class Scaled(nn.Module):
    """A layer that computes with ``V = W / alpha`` of its weight W, on whose grid low bits are.

    The scale belongs to the network, so that all clients, of whatever width, share it.

    Parameters
    ----------
    layer : nn.Conv2d or nn.Linear
        Without a bias.
    alpha : float
        A power of two, by which nothing is rounded.

    Examples
    --------
    >>> layer = Scaled(nn.Linear(1, 1, bias=False), alpha=4.0)
    >>> _ = nn.init.constant_(layer.layer.weight, 0.5)
    >>> layer(torch.tensor([[8.0]])).item()
    1.0
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, alpha: float = 1.0) -> None:
        super().__init__()
        if not alpha > 0 or frexp(alpha)[0] != 0.5:
            raise ValueError(f"alpha: {alpha!r} is not allowed: it should be a power of two")
        if layer.bias is not None:
            raise ValueError("layer: it has a bias, which has no grid; allowed: bias=False")
        self.layer = layer
        self.alpha = float(alpha)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.alpha == 1 else y / self.alpha


def shared_scale(fan_in: int) -> float:
    """Return WAGE's alpha of a layer without normalization (its equation 8), at least 1.

    Weights in ``±0.75``, divided by it, have about the range ``sqrt(6 / fan_in)`` of He et al.
    (arXiv:1502.01852).

    >>> shared_scale(9), shared_scale(144)
    (1.0, 4.0)
    """
    return max(2.0 ** round(log2(INITIAL_RANGE / sqrt(6 / fan_in))), 1.0)


class IntegerModule(nn.Module):
    """What has no weights and widths all the same; 32 bits, unless `prepare_integer` says so."""

    activation_bits = FLOAT_BITS
    gradient_bits = FLOAT_BITS


class IntegerInput(IntegerModule):
    """Bring a network's input to -1..1 by a factor; on a grid of activations below 32 bits.

    Examples
    --------
    >>> enter = IntegerInput(0.5)
    >>> enter.activation_bits = 3
    >>> enter(torch.tensor([-2.0, 0.6, 1.0]))
    tensor([-0.7500,  0.2500,  0.5000])
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.factor
        return x if self.activation_bits == FLOAT_BITS else quantize_unit(x, self.activation_bits)


class IntegerActivation(IntegerModule):
    """ReLU clipped at 1; below 32 bits at ``1 - sigma`` and on a grid, as is the gradient back.

    The output gradient passes strictly between the ends, where nothing was clipped, and is then
    quantized (`quantize_shifted`).

    Examples
    --------
    >>> activation = IntegerActivation()
    >>> activation.activation_bits = 3
    >>> activation(torch.tensor([-1.0, 0.3, 2.0]))
    tensor([0.0000, 0.2500, 0.7500])
    """

    def forward(self, a: Tensor) -> Tensor:
        if self.activation_bits == self.gradient_bits == FLOAT_BITS:
            return F.hardtanh(a, 0.0, 1.0)
        y: Tensor = _Activate.apply(a, self.activation_bits, self.gradient_bits)
        return y


class IntegerOutput(IntegerModule):
    """Give the logits as they are; the loss's gradient by them is quantized on its way back.

    Examples
    --------
    >>> output, logits = IntegerOutput(), torch.zeros(2, requires_grad=True)
    >>> output.gradient_bits = 3
    >>> output(logits).backward(torch.tensor([0.3, -0.1]))
    >>> logits.grad
    tensor([ 0.7500, -0.5000])
    """

    def forward(self, logits: Tensor) -> Tensor:
        bits = self.gradient_bits
        return logits if bits == FLOAT_BITS else _QuantizeBackward.apply(logits, bits)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, bits: int, gradient_bits: int) -> Tensor:
        ctx.save_for_backward(a)
        ctx.high = 1.0 if bits == FLOAT_BITS else 1 - sigma(bits)
        ctx.gradient_bits = gradient_bits
        clipped = a.clamp(0.0, ctx.high)
        return clipped if bits == FLOAT_BITS else quantize_unit(clipped, bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        passed = torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, 0.0, ctx.high)
        return _quantized(passed, ctx.gradient_bits), None, None


class _QuantizeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _quantized(gradient, ctx.bits), None


def _quantized(gradient: Tensor, bits: int) -> Tensor:
    return gradient if bits == FLOAT_BITS else quantize_shifted(gradient, bits)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        return ternary(stored(weight, bits))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Straight through, also at ±0.5: the update does not go further.
        return gradient, None


class IntegerLayer(QuantLayer):
    """A layer that computes with T(S), the ternary form of its stored weights."""

    def fitted_scale(self, weight: Tensor) -> Tensor:
        """Return the one step of the width; it does not depend on the weights."""
        check_finite(weight, "the weight")
        return weight.new_full(weight.shape[:1], sigma(self.config.weight_bits))

    def quantized_weight(self, name: str = "weight") -> Tensor:
        """Return T(S), with a straight-through gradient."""
        weight: Tensor = _Ternary.apply(getattr(self, name), self.config.weight_bits)
        return weight


class IntegerConv2d(IntegerLayer, QuantConv2d):
    """`nn.Conv2d` with ternary weights."""


class IntegerLinear(IntegerLayer, QuantLinear):
    """`nn.Linear` with ternary weights."""


def prepare_integer(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Give a network the widths of integer training, in place.

    Parameters
    ----------
    model : nn.Module
        Built of this file's modules (`check_integer`). Its `nn.Conv2d` and `nn.Linear` layers
        change their class, as `quant.prepare` does, and compute with ternary weights.
    config : QuantConfig
        Widths of stored weights, of activations and the input, and of output gradients.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If the model has what has no integer form, or a weight is not finite.

    Examples
    --------
    >>> net = nn.Sequential(IntegerInput(), Scaled(nn.Linear(3, 2, bias=False)), IntegerOutput())
    >>> _ = nn.init.constant_(net[1].layer.weight, 0.3)
    >>> prepare_integer(net, QuantConfig(8, 8, 8))[1].layer.quantized_weight()[0].tolist()
    [0.5, 0.5, 0.5]
    """
    check_integer(model)
    # Activations and gradients have their grids in modules of their own.
    prepare(model, QuantConfig(config.weight_bits))
    for module in model.modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            conv = isinstance(module, QuantConv2d)
            module.__class__ = IntegerConv2d if conv else IntegerLinear
            module.refit_scale()
        if isinstance(module, IntegerModule):
            module.activation_bits = config.activation_bits
            module.gradient_bits = config.gradient_bits
    return model


def check_integer(model: nn.Module) -> None:
    """Refuse a network that cannot be trained in integers.

    Raises
    ------
    ValueError
        If a parameter is none of a `Scaled` layer, or input or output are not quantized; the
        message names it.

    Examples
    --------
    >>> check_integer(nn.Linear(3, 2))
    Traceback (most recent call last):
        ...
    ValueError: weight is not the weight of a quant.Scaled layer
    """
    check_kind("model", model, nn.Module)
    scaled = dict(scaled_weights(model))
    for name, _ in model.named_parameters():
        if name not in scaled:
            raise ValueError(f"{name} is not the weight of a quant.Scaled layer")
        layer: nn.Module = scaled[name].layer
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            what = f"{name} is of a {type(layer).__name__}"
            raise ValueError(f"{what}; allowed in quant.Scaled: Conv2d and Linear")
    for kind in (IntegerInput, IntegerOutput):
        if not any(isinstance(module, kind) for module in model.modules()):
            raise ValueError(f"there is no quant.{kind.__name__}")


def scaled_weights(model: nn.Module) -> Iterator[tuple[str, Scaled]]:
    """Yield the scaled layers of a network by the names of their weights."""
    for name, module in model.named_modules():
        if isinstance(module, Scaled):
            yield f"{name}.layer.weight".removeprefix("."), module


@torch.no_grad()
def scale_gradients(model: nn.Module) -> None:
    """Bring weight gradients to the units of a step of the weights W, in place.

    In a prepared network each is divided by its `shift_of`, as `IntegerSGD` needs it. In float32
    it is multiplied by ``alpha**2``, so that SGD on W does what SGD on ``V = W / alpha`` would:
    one alpha as the gradient by W has one too few, one as W moves alpha times as far.

    Examples
    --------
    >>> net = Scaled(nn.Linear(1, 1, bias=False), alpha=4.0)
    >>> net(torch.ones(1, 1)).sum().backward()
    >>> scale_gradients(net)
    >>> net.layer.weight.grad
    tensor([[4.]])
    """
    for _, module in scaled_weights(model):
        weight = module.layer.weight
        if weight.grad is None:
            continue
        if isinstance(module.layer, IntegerLayer):
            weight.grad.div_(shift_of(weight.grad))
        else:
            weight.grad.mul_(module.alpha**2)
