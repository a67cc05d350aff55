"""Calibrated rounding: a model quantized so that its layers' outputs change least (GPTQ).

Rounding every weight to nearest makes the smallest error in the weights, not in the outputs. With
a few unlabelled images, the error that a rounded weight causes in its layer's output is passed on
to the weights that are rounded after it (optimal brain surgeon; for quantization arXiv:2208.11580
and GPTQ, arXiv:2210.17323).

One forward pass does it all: when the images arrive at a layer, changed by the rounding of the
layers before it, its weights are rounded for just that input, and the pass continues with them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.grid import check_finite, check_scale, largest_code, naming, quantize_nearest
from quant.qat.inputs import watched_inputs
from quant.qat.layers import QuantConv2d, QuantLinear
from quant.qat.prepare import layers_by_weight
from quant.qat.survey import survey
from quant.update import QuantizedTensor

# Rows of a layer's input that its second moments are taken from.
_ROWS = 16_384
# Share of their mean diagonal that is added to it, as in GPTQ.
_DAMPING = 0.01


@torch.no_grad()
def calibrated_rounding(
    model: nn.Module, forward: Callable[[nn.Module], object]
) -> dict[str, QuantizedTensor]:
    """Round the weights of a prepared model for the images that pass through it.

    Parameters
    ----------
    model : nn.Module
        Quantization-aware model (`prepare`) with float weights; they are replaced by the rounded
        ones. The scales stay as they are.
    forward : callable
        ``forward(model)`` passes the images through the model once.

    Returns
    -------
    dict of str to QuantizedTensor
        By weight name. Weights of `nn.Conv2d` and `nn.Linear` layers are rounded for their inputs,
        and left out where the pass does not reach them. All others, and those that several layers
        hold, are rounded to nearest.

    Raises
    ------
    NonFiniteError
        If a weight, or what reaches its layer, holds a NaN or an infinity; the message names it.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 2)), QuantConfig(weight_bits=4))
    >>> list(calibrated_rounding(model, lambda m: m(torch.rand(8, 3))))
    ['0.weight']
    """
    rounded: dict[str, QuantizedTensor] = {}
    places, layers = survey(model).on_grid, {}
    for name, held in layers_by_weight(model):
        # Of a subclass' too, as of one whose weights are ternary.
        if isinstance(held.layer, (QuantConv2d, QuantLinear)) and len(places.get(name, ())) == 1:
            layers[name] = held.layer
            continue
        with naming(name):
            bits = held.layer.config.weight_bits
            rounded[name] = QuantizedTensor(
                quantize_nearest(held.parameter, held.scale, bits), held.scale
            )
        held.parameter.copy_(rounded[name].dequantize())

    def round_layer(name: str, x: Tensor) -> None:
        # A layer that is used twice is rounded for its first input.
        if name in rounded:
            return
        layer = layers[name]
        bits, scale = layer.config.weight_bits, layer.scale()
        with naming(name):
            check_finite(x, "the input of its layer")
            moments = second_moments(layer, layer.quantized_input(x))
            codes = round_to_moments(layer.weight, scale, bits, moments)
        rounded[name] = QuantizedTensor(codes, scale)
        layer.weight.copy_(rounded[name].dequantize())

    with watched_inputs(layers, round_layer):
        forward(model)
    return rounded


def round_to_moments(weight: Tensor, scale: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Round weights so that outputs, not weights, change little.

    Parameters
    ----------
    weight, scale, bits
        As in `quantize_nearest`.
    moments : Tensor
        ``X^T X`` of the inputs, ``[groups, fan_in, fan_in]``.

    Returns
    -------
    Tensor
        Codes, int16, shape of `weight`. With a diagonal ``X^T X`` those of `quantize_nearest`, but
        for ties.

    Raises
    ------
    NonFiniteError
        If a weight, a moment or a scale is NaN or infinite, or a scale too small to divide by.

    Notes
    -----
    Algorithm 1 of GPTQ (arXiv:2210.17323), inputs of the largest moments first.
    """
    check_finite(weight.detach(), "the weight")
    check_scale(scale)
    # Of finite inputs too, if they are large.
    check_finite(moments, "the second moments of the inputs")
    groups, fan_in = moments.shape[:2]
    limit = largest_code(bits)
    hessian = moments.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # Inputs that are always zero decide nothing; a one keeps the matrix invertible.
    diagonal += torch.where(mean > 0, _DAMPING * mean, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    back = order.argsort(dim=1)
    hessian = _reordered(_reordered(hessian, order, 2), order, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = (weight.detach().flatten(1) / scale[:, None]).reshape(groups, -1, fan_in)
    left = _reordered(left, order, 2)
    codes = torch.empty_like(left)
    for i in range(fan_in):
        codes[..., i] = left[..., i].round().clamp_(-limit, limit)
        error = (left[..., i] - codes[..., i]) / upper[:, i, i, None]
        left[..., i + 1 :] -= error[..., None] * upper[:, None, i, i + 1 :]
    return _reordered(codes, back, 2).reshape(weight.shape).to(torch.int16)


def second_moments(layer: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    """Return ``X^T X``, ``[groups, fan_in, fan_in]``, of the rows that a layer's outputs weigh.

    For a convolution these are its patches; of many images only every n-th is looked at.
    """
    if isinstance(layer, nn.Linear):
        rows: Tensor = x.reshape(1, -1, x.shape[-1])
        rows = rows[:, :: -(-rows.shape[1] // _ROWS)]
        return rows.mT @ rows
    outputs = max(1, x.shape[2] * x.shape[3] // (layer.stride[0] * layer.stride[1]))
    every = -(-x.shape[0] * outputs // _ROWS)
    patches = F.unfold(
        _padded(layer, x[::every]), layer.kernel_size, layer.dilation, 0, layer.stride
    )
    rows = patches.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return rows @ rows.mT


def _padded(layer: QuantConv2d, x: Tensor) -> Tensor:
    # The layer stores its padding in this order, whether it was given as numbers or as "same".
    sides = layer._reversed_padding_repeated_twice
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _reordered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Reorder each group's rows or columns; `order` is ``[groups, fan_in]``."""
    index = order[:, None, :] if dim == 2 else order[:, :, None]
    return x.gather(dim, index.expand(x.shape))
