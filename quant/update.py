"""The update: a model at a bit-width, or the difference of two, as codes, scales and floats."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quant.arguments import check_number
from quant.grid import (
    FLOAT_BITS,
    absmax_scale,
    dequantize,
    fit_scale,
    quantize_nearest,
    quantize_stochastic,
)

Content = Literal["weights", "difference"]


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes ``[channels, ...]`` on the grid given by float32 scales ``[channels]``."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the float32 values."""
        return dequantize(self.codes, self.scale)


@dataclass(frozen=True)
class Update:
    """A model, or the difference between two, at a bit-width.

    Attributes
    ----------
    bits : int
        2 to 16, or 32 when nothing is quantized.
    content : {"weights", "difference"}
        What the values are.
    quantized : mapping of str to QuantizedTensor
        Tensors of two and more dimensions; empty at 32 bits.
    floats : mapping of str to Tensor
        All other tensors, float32.
    """

    bits: int
    content: Content
    quantized: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]

    @property
    def scales(self) -> dict[str, Tensor]:
        """Scales of the quantized tensors by name."""
        return {name: tensor.scale for name, tensor in self.quantized.items()}

    @property
    def spec(self) -> "UpdateSpec":
        """Names and shapes of all tensors."""
        shapes = {name: tuple(tensor.codes.shape) for name, tensor in self.quantized.items()}
        return UpdateSpec(shapes | {n: tuple(tensor.shape) for n, tensor in self.floats.items()})

    def dequantize(self) -> dict[str, Tensor]:
        """Return every tensor in float32, exactly as the sender holds it."""
        lifted = {name: tensor.dequantize() for name, tensor in self.quantized.items()}
        return {**lifted, **self.floats}


@dataclass(frozen=True)
class UpdateSpec:
    """Names and shapes of the tensors that both sides know.

    Tensors of two and more dimensions (the weights of convolutions and linear layers) are
    quantized; biases and normalization parameters and statistics stay float32. They are sent in
    this order, each kind sorted by name, whatever order the mapping had.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        ordered = sorted(self.shapes.items(), key=lambda item: (not is_quantized(item[1]), item[0]))
        object.__setattr__(self, "shapes", dict(ordered))

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.shapes.items()))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple:
        # Texts have other hashes in other processes.
        return type(self), (self.shapes,)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "UpdateSpec":
        """Take the specification from a state dict, integer tensors (step counters) left out."""
        return cls({n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()})

    def quantized(self, bits: int) -> list[str]:
        """Names of the tensors that an update of width `bits` quantizes."""
        return [n for n, s in self.shapes.items() if bits != FLOAT_BITS and is_quantized(s)]

    def floats(self, bits: int) -> list[str]:
        """Names of the tensors that an update of width `bits` leaves float32."""
        return [n for n, s in self.shapes.items() if bits == FLOAT_BITS or not is_quantized(s)]


def is_quantized(shape: tuple[int, ...] | torch.Size) -> bool:
    """Return whether a tensor of this shape is quantized at widths below 32 bits."""
    return len(shape) >= 2


def is_variance(name: str) -> bool:
    """Return whether a tensor of this name holds BatchNorm's variances, which are not negative."""
    return name.endswith("running_var")


def is_statistic(name: str) -> bool:
    """Return whether a tensor of this name holds BatchNorm's statistics: no step optimizes them."""
    return name.endswith(("running_mean", "running_var"))


def fixed_point(state: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """Return the scales of a fixed-point model: one step for every weight of every layer."""
    check_number("step", step, above=0)
    return {n: torch.full((t.shape[0],), step) for n, t in state.items() if is_quantized(t.shape)}


def quantize_state(
    state: Mapping[str, Tensor], bits: int, scales: Mapping[str, Tensor] | None = None
) -> Update:
    """Bring a model to a bit-width by rounding to nearest.

    Parameters
    ----------
    state : mapping of str to Tensor
        Floating-point tensors; those of two and more dimensions are quantized.
    bits : int
        2 to 16, or 32 to leave everything as it is.
    scales : mapping of str to Tensor, optional
        Scale of each quantized tensor; fitted (`fit_scale`) where not given.
    """
    spec = UpdateSpec.of(state)
    quantized = {}
    for name in spec.quantized(bits):
        scale = scales[name] if scales and name in scales else fit_scale(state[name], bits)
        codes = quantize_nearest(state[name], scale, bits)
        quantized[name] = QuantizedTensor(codes, scale.detach().clone())
    floats = {name: state[name].detach().float() for name in spec.floats(bits)}
    return Update(bits, "weights", quantized, floats)


def quantize_difference(
    difference: Mapping[str, Tensor], bits: int, generator: torch.Generator
) -> Update:
    """Quantize the difference between two models without bias.

    QSGD's stochastic quantizer (Alistarh et al., arXiv:1610.02132) with ``s = 2**(bits-1) - 1``
    levels on each side, one bucket an output channel, scaled by the bucket's largest magnitude:
    ``E[Q(x)] = x`` and ``E|Q(x) - x|^2 <= n max|x|^2 / (4 s^2)`` for a bucket of ``n`` values.

    Parameters
    ----------
    difference : mapping of str to Tensor
        Floating-point tensors; those of two and more dimensions are quantized.
    bits : int
        2 to 16, or 32 to leave everything as it is.
    generator : torch.Generator
        Seeded source of the rounding noise.
    """
    spec = UpdateSpec.of(difference)
    quantized = {}
    for name in spec.quantized(bits):
        scale = absmax_scale(difference[name], bits)
        codes = quantize_stochastic(difference[name], scale, bits, generator)
        quantized[name] = QuantizedTensor(codes, scale)
    floats = {name: difference[name].detach().float() for name in spec.floats(bits)}
    return Update(bits, "difference", quantized, floats)
