"""Integer training of weights: the functions of WAGE, and its update on the weights' own grid.

WAGE (Wu et al., 2018, arXiv:1802.04680) trains with weights, activations, gradients and errors
(here: output gradients) that are all integers of few bits, its ``2-8-8-8``. A client of k bits
stores its weights S on the grid of step ``sigma(k) = 2**(1 - k)``, computes with their ternary
form T(S), and moves them by whole steps, rounded stochastically. The network that does so is
prepared in `quant.lowbit.integer_layers`.

Three things differ from the paper. Weights are clipped at 0.5, the outer ternary level, as in the
authors' code, and not at ``1 - sigma``: a weight further out would take longer to come back and
compute nothing else meanwhile. Of k bits, ``eta`` stands for the same movement as of 8. And
scales are powers of two by comparison with sqrt(1/2), not by a logarithm, whose last bit differs
from machine to machine.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.arguments import check_kind, check_number, check_tensors
from core.bits import check_bits, check_width
from quant.grid import check_finite, code_type, largest_code, naming, nan_unless_finite
from quant.lowbit.eager import Eager
from quant.update import QuantizedTensor, Update, quantize_state

# Largest exponents of a scale that is an ordinary float32, and whose inverse is.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -126, 126
# `eta` counts steps of this width's grid.
_ETA_BITS = 8
# The outer level of the ternary weights.
_OUTER = 0.5


def sigma(bits: int) -> float:
    """Return the step of the grid of a width, ``2**(1 - bits)``.

    >>> sigma(8)
    0.0078125
    """
    return 2.0 ** (1 - check_bits(bits))


def quantize_unit(x: Tensor, bits: int) -> Tensor:
    """Return WAGE's Q(x, k): nearest level of ``(-1, 1)``, ties to even (its equations 5 and 6).

    Parameters
    ----------
    x : Tensor
        Float32, of any shape. A NaN stays NaN.
    bits : int
        Width k, 2 to 16; the levels are ``{-2**(k-1) + 1, ..., 2**(k-1) - 1} * sigma(k)``.

    Returns
    -------
    Tensor
        Float32, shape of `x`.

    Examples
    --------
    >>> quantize_unit(torch.tensor([0.3, -0.9, 5.0]), 3)
    tensor([ 0.2500, -0.7500,  0.7500])
    """
    limit = largest_code(bits)
    return x.mul(1 / sigma(bits)).round_().clamp_(-limit, limit).mul_(sigma(bits))


def shift_of(x: Tensor) -> Tensor:
    """Return the power of two nearest to the largest magnitude, ``2**round(log2 max|x|)``.

    Parameters
    ----------
    x : Tensor
        Float32, of any shape, one value or more.

    Returns
    -------
    Tensor
        Float32, one number: 1 where all values are zero, NaN where one is NaN or infinite.

    Examples
    --------
    >>> shift_of(torch.tensor([0.1, -2.9])), shift_of(torch.tensor([0.1, 2.8]))
    (tensor(4.), tensor(2.))
    """
    largest = x.detach().abs().amax()
    mantissa, exponent = torch.frexp(largest)
    # Of at most 48 bits, and so exact; it is never a half itself.
    exponent = exponent - (mantissa.double().square() < 0.5).to(exponent.dtype)
    power = exponent.clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT).float().exp2()
    return torch.where(largest > 0, power, 1.0) + nan_unless_finite(largest)


def quantize_shifted(x: Tensor, bits: int) -> Tensor:
    """Return WAGE's Q_E: Q(x / shift(x), k); the scale is not put back (its equation 11).

    Parameters
    ----------
    x : Tensor
        Float32 output gradient, of any shape. If a value is NaN or infinite, all become NaN.
    bits : int
        Width k, 2 to 16.

    Returns
    -------
    Tensor
        Float32, shape of `x`.

    Examples
    --------
    >>> quantize_shifted(torch.tensor([3.0, -1.0, 0.1]), 3)
    tensor([ 0.7500, -0.2500,  0.0000])
    """
    return quantize_unit(x / shift_of(x), bits)


def stored_codes(weight: Tensor, bits: int) -> Tensor:
    """Return the codes of the stored weights S that a client of a width starts from.

    Parameters
    ----------
    weight : Tensor
        Float32 weights, of any shape.
    bits : int
        Width k, 2 to 16.

    Returns
    -------
    Tensor
        ``clip(round(weight / sigma(k)), -2**(k-2), 2**(k-2))``, int8 up to 8 bits and int16 above;
        S is `sigma` times it, from -0.5 to 0.5.

    Raises
    ------
    NonFiniteError
        If a weight is NaN or infinite.

    Examples
    --------
    >>> stored_codes(torch.tensor([0.011, -0.3, 0.7]), 8)
    tensor([  1, -38,  64], dtype=torch.int8)
    """
    check_finite(weight.detach(), "the weight")
    return stored(weight.detach(), bits).mul_(1 / sigma(bits)).to(code_type(bits))


def stored(weight: Tensor, bits: int) -> Tensor:
    """Return S itself, float32; a NaN stays NaN.

    >>> stored(torch.tensor([0.3, 0.7]), 8) * 128
    tensor([38., 64.])
    """
    step = sigma(bits)
    return weight.mul(1 / step).round_().mul_(step).clamp_(-_OUTER, _OUTER)


def stored_state(state: Mapping[str, Tensor], names: Iterable[str], bits: int) -> Update:
    """Bring a float32 model to the stored weights that a client of a width starts from.

    Parameters
    ----------
    state : mapping of str to Tensor
        State dict.
    names : iterable of str
        Which tensors are weights of integer layers; all others stay float32.
    bits : int
        Width, 2 to 16.

    Returns
    -------
    Update
        Codes of that width; the scale of each channel is `sigma`.

    Examples
    --------
    >>> stored_state({"w": torch.tensor([[0.7, 0.1]])}, ["w"], 8).quantized["w"].codes
    tensor([[64, 13]], dtype=torch.int8)
    """
    on_grid = {}
    for name in names:
        with naming(name):
            codes = stored_codes(state[name], bits)
        on_grid[name] = QuantizedTensor(codes, torch.full(codes.shape[:1], sigma(bits)))
    floats = {name: tensor for name, tensor in state.items() if name not in on_grid}
    return Update(bits, "weights", on_grid, quantize_state(floats, bits, {}).floats)


def ternary(weight: Tensor) -> Tensor:
    """Return T(S), what a layer computes with: -0.5, 0 or 0.5, whichever is nearest.

    Parameters
    ----------
    weight : Tensor
        Float32 stored weights S, of any shape; those on ±0.25 become 0.

    Returns
    -------
    Tensor
        Float32, shape of `weight`.

    Examples
    --------
    >>> ternary(torch.tensor([0.25, 0.2578125, -0.5]))
    tensor([ 0.0000,  0.5000, -0.5000])
    """
    return weight.mul(2).round_().clamp_(-1, 1).mul_(_OUTER)


class IntegerSGD(Eager, Optimizer):
    """WAGE's update: whole steps on the grid of the stored weights, rounded stochastically.

    A step takes ``u = lr 2**(k-8) g`` of each weight's gradient g, which is to be at most about 1
    (`quant.lowbit.integer_layers.scale_gradients`), rounds it up or down at random so that it is u
    on average, and moves the weight by so many steps of ``sigma(k)``, at most to ±0.5 (the
    paper's equations 12 to 14). There is no momentum.

    Parameters
    ----------
    parameters : mapping of str to nn.Parameter
        By name, all of integer layers; they are brought onto the grid, to the nearest level, at
        once. Noise is drawn in this order.
    bits : int
        Width k of the stored weights, 2 to 16.
    lr : float
        The paper's eta: steps of the 8-bit grid that a gradient of 1 is worth.
    generator : torch.Generator
        Seeded source of the rounding noise.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([[0.3, 0.5]]))
    >>> optimizer = IntegerSGD({"w": weight}, 8, lr=2.0, generator=torch.Generator())
    >>> weight.grad = torch.tensor([[1.0, -1.0]])
    >>> optimizer.step()
    >>> weight.detach() * 128
    tensor([[36., 64.]])
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        bits: int,
        *,
        lr: float,
        generator: torch.Generator,
    ) -> None:
        check_width("bits", bits, or_float=False)
        check_number("lr", lr, above=0)
        check_kind("generator", generator, torch.Generator)
        check_tensors("parameters", parameters)
        super().__init__(list(parameters.values()), {"lr": lr})
        self._named = dict(parameters)
        self._bits = bits
        self._generator = generator
        with torch.no_grad():
            for name, weight in self._named.items():
                with naming(name):
                    weight.copy_(self._values(stored_codes(weight, bits)))

    def _values(self, codes: Tensor) -> Tensor:
        return codes.float().mul_(sigma(self._bits))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient.

        Raises
        ------
        NonFiniteError
            If a gradient holds a NaN or an infinity; the message names it.
        """
        for name, weight in self._named.items():
            if weight.grad is None:
                continue
            with naming(name):
                check_finite(weight.grad, "the gradient")
            eta = self.param_groups[0]["lr"] * 2.0 ** (self._bits - _ETA_BITS)
            steps = _rounded(weight.grad * eta, self._generator)
            weight.sub_(steps, alpha=sigma(self._bits)).clamp_(-_OUTER, _OUTER)


def _rounded(u: Tensor, generator: torch.Generator) -> Tensor:
    """Return whole numbers that are `u` on average."""
    noise = torch.rand(u.shape, generator=generator, device=u.device)
    whole = u.floor()
    return whole + (noise < u.sub_(whole))
