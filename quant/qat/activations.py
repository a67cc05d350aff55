"""What passes between layers, on a grid: activations forward, output gradients backward.

Both have one scale a tensor. That of an output gradient is taken from the tensor itself; so is that
of an activation, until it is fitted to a few images (`calibrate_activations`). A fitted grid stays
as it is, as integer hardware needs it, costs no pass over the tensor to find its range, and clips
the rare large values for a finer step.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from quant.grid import check_finite, largest_code, nan_unless_finite

# Keeps the inverse of a scale finite.
_SMALLEST_RANGE = torch.finfo(torch.float32).tiny * 2**16
# Magnitudes are counted in so many bins to find the clipping point of least squared error.
_BINS = 2048
_SIGNIFICAND_BITS = 24
# Values at a time that noise is added to, which needs memory of its own.
_BLOCK = 1 << 17
_CLIP_CANDIDATES = torch.arange(20, 4, -1) / 20


@dataclass(frozen=True)
class ActivationGrid:
    """The levels ``scale * {low, ..., high}`` of a layer's input.

    Attributes
    ----------
    scale : float
        Step.
    low, high : int
        Outermost codes: ``[0, 2**bits - 1]`` where nothing is negative, as after a ReLU, and
        symmetric otherwise. Neither has a zero point.
    """

    scale: float
    low: int
    high: int


def fit_activation_grid(x: Tensor, bits: int) -> ActivationGrid:
    """Fit a grid to a tensor: of several clipping points that of the least mean squared error.

    Parameters
    ----------
    x : Tensor
        Float tensor of any shape.
    bits : int
        Width, 2 to 16.

    Raises
    ------
    NonFiniteError
        If a value is NaN or infinite.
    """
    x = x.detach()
    check_finite(x, "the input")
    low, high = (float(end) for end in _range(x))
    limit = largest_code(bits) if low < 0 else 2**bits - 1
    largest = max(high, -low, _SMALLEST_RANGE)
    counts = torch.histc(x.abs().float(), _BINS, 0, largest).cpu()
    value = (torch.arange(_BINS) + 0.5) * (largest / _BINS)
    scales = _CLIP_CANDIDATES * (largest / limit)
    nearest = (value / scales[:, None]).round_().clamp_(max=limit) * scales[:, None]
    errors = ((nearest - value).square_() * counts).sum(dim=1)
    return ActivationGrid(float(scales[errors.argmin()]), -limit if low < 0 else 0, limit)


def put_on_grid(x: Tensor, grid: ActivationGrid) -> Tensor:
    """Put a tensor on a fitted grid.

    The gradient passes unchanged where nothing was clipped and is zero where it was. If a value is
    NaN or infinite, all of the result is NaN: clipping would make a number of an infinity.
    """
    return cast(Tensor, _PutOnGrid.apply(x, grid))


def fake_quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Put a tensor on one grid of `bits` bits, its range taken from the tensor itself.

    A tensor without negative entries, as after a ReLU, uses the unsigned grid
    ``[0, 2**bits - 1]``; any other the symmetric one. Neither has a zero point. Nothing is clipped,
    so that the straight-through gradient passes unchanged everywhere.
    """
    return cast(Tensor, _QuantizeActivation.apply(x, bits))


def fake_quantize_gradient(
    gradient: Tensor, bits: int, generator: torch.Generator | None = None
) -> Tensor:
    """Put a gradient on one symmetric grid of `bits` bits, by stochastic rounding.

    The grid spans the largest magnitude. A value between two levels goes to the upper one with the
    probability of its distance from the lower one, so that the mean over many draws is the
    gradient itself; to nearest, all that is below half a step would vanish. Values on a level stay
    there. If a value is NaN or infinite, all of the result is NaN.

    Parameters
    ----------
    gradient : Tensor
        Float tensor of any shape.
    bits : int
        Width, 2 to 16.
    generator : torch.Generator, optional
        Source of the noise, on the gradient's device; torch's own by default.

    Notes
    -----
    Stochastic rounding is that of Gupta et al. (arXiv:1502.02551), for gradients that of DoReFa-Net
    (arXiv:1606.06160). The noise has 16 bits, or those that float32 leaves beside more than eight
    of the code: a probability is off by half of its last one at most, 2**-17 at up to eight.
    """
    limit = largest_code(bits)
    low, high = _range(gradient)
    scale = _scale_of(torch.maximum(high, -low) / limit)
    codes = gradient.mul(scale.reciprocal())
    noise_bits = min(16, _SIGNIFICAND_BITS - bits)
    # All of its memory, in the order of its memory: the result of an operation has no gaps.
    values = codes.as_strided((codes.numel(),), (1,))
    for part in values.split(_BLOCK if values.device.type == "cpu" else values.numel()):
        noise = _random_integers(part, noise_bits, generator)
        # From -1/2 to 1/2 and never at either, so that what is on a level stays there.
        part.add_(noise, alpha=2.0**-noise_bits).add_(2.0 ** -(noise_bits + 1)).round_()
        # The inverse of the scale may be a last bit too large.
        part.clamp_(-limit, limit)
    return codes.mul_(scale)


def quantize_output_gradient(
    y: Tensor, bits: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return `y`; its gradient is put on a grid of `bits` bits in the backward pass.

    `generator` is as in `fake_quantize_gradient`.
    """
    return cast(Tensor, _QuantizeOutputGradient.apply(y, bits, generator))


class _PutOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ActivationGrid) -> Tensor:
        ctx.save_for_backward(x)
        # Half a step further is still rounded to the outermost level.
        ctx.ends = [
            (code + half) * grid.scale for code, half in ((grid.low, -0.5), (grid.high, 0.5))
        ]
        step = nan_unless_finite(x).add(grid.scale)
        return x.mul(1 / grid.scale).round_().clamp_(grid.low, grid.high).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # One pass: zero outside of the ends.
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.ends), None


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        limit, unsigned = largest_code(bits), 2**bits - 1
        low, high = _range(x)
        # Written without a branch on a value, which would stall a GPU.
        scale = torch.where(low < 0, torch.maximum(high, -low) / limit, high / unsigned)
        return _on_spanning_grid(x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _QuantizeOutputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, generator: torch.Generator | None) -> Tensor:
        ctx.bits, ctx.generator = bits, generator
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return fake_quantize_gradient(gradient, ctx.bits, ctx.generator), None, None


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        # In the order of its memory: seven times as fast.
        x = x.permute(0, 2, 3, 1)
    return torch.aminmax(x.detach())


def _on_spanning_grid(x: Tensor, scale: Tensor) -> Tensor:
    # A tenth of the time of torch's fake_quantize_per_tensor_affine, which is not vectorized; no
    # clipping is needed where the scale spans the tensor.
    scale = _scale_of(scale)
    return x.mul(scale.reciprocal()).round_().mul_(scale)


def _scale_of(step: Tensor) -> Tensor:
    return step.float().clamp(min=_SMALLEST_RANGE)


def _random_integers(like: Tensor, bits: int, generator: torch.Generator | None) -> Tensor:
    """Return uniform signed integers of up to 16 bits, one a value of a flat tensor."""
    # Four at a draw: a quarter of the time, which on a CPU is most of that of the rounding.
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    integers = draws.view(torch.int16)[: like.numel()]
    return integers if bits == 16 else integers.bitwise_right_shift_(16 - bits)
