"""The update: a model at a bit-width, or the difference of two, as codes, scales and floats."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from core.arguments import check_kind, check_names, check_number, check_tensors
from core.bits import FLOAT_BITS
from quant.grid import dequantize, naming, per_channel, quantize_nearest, quantize_stochastic
from quant.scales import absmax_scale, fit_scale

Content = Literal["weights", "difference"]


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes ``[channels, ...]`` on the grid given by float32 scales ``[channels]``.

    >>> QuantizedTensor(torch.tensor([[3, -1]], dtype=torch.int8), torch.tensor([0.5])).dequantize()
    tensor([[ 1.5000, -0.5000]])
    """

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
        Weights of the layers that compute on a grid (`quant.quantizable_weights`); empty at 32
        bits.
    floats : mapping of str to Tensor
        All other tensors, float32.

    Examples
    --------
    >>> update = Update(32, "weights", {}, {"bias": torch.zeros(2)})
    >>> update.spec.shapes
    {'bias': (2,)}
    """

    bits: int
    content: Content
    quantized: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        # NumPy's too, which no JSON holds.
        object.__setattr__(self, "bits", int(self.bits))

    @property
    def scales(self) -> dict[str, Tensor]:
        """Scales of the quantized tensors by name."""
        return {name: tensor.scale for name, tensor in self.quantized.items()}

    @property
    def spec(self) -> "UpdateSpec":
        """Names and shapes of all tensors; at 32 bits none of them is marked as on a grid."""
        shapes = {name: tuple(tensor.codes.shape) for name, tensor in self.quantized.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.floats.items()}
        return UpdateSpec(shapes, frozenset(self.quantized))

    def dequantize(self) -> dict[str, Tensor]:
        """Return every tensor in float32, exactly as the sender holds it."""
        on_grid = {name: tensor.dequantize() for name, tensor in self.quantized.items()}
        return {**on_grid, **self.floats}


@dataclass(frozen=True)
class UpdateSpec:
    """Names and shapes of a model's tensors, and which of them have a grid.

    `quant.spec_of` makes it of a model: which weights are quantized is decided by layer.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        Tensors are sent in this order, which is their own, whatever order was given: those of two
        and more dimensions first, each kind sorted by name.
    on_grid : frozenset of str
        Names of the tensors that an update below 32 bits holds as codes and scales. All others,
        as biases, normalization and layers that compute in float32, are float32 at every width.

    Raises
    ------
    ValueError
        If a tensor on a grid is not among them.

    Examples
    --------
    >>> UpdateSpec({"bias": (2,), "weight": (2, 3)}, frozenset({"weight"})).floats(bits=4)
    ['bias']
    """

    shapes: Mapping[str, tuple[int, ...]]
    on_grid: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        ordered = sorted(self.shapes.items(), key=lambda item: (len(item[1]) < 2, item[0]))
        object.__setattr__(self, "shapes", dict(ordered))
        object.__setattr__(self, "on_grid", frozenset(self.on_grid))
        if unknown := sorted(self.on_grid - self.shapes.keys()):
            raise ValueError(f"{unknown[0]} is to be quantized, but there is no such tensor")
        if numbers := sorted(name for name in self.on_grid if not self.shapes[name]):
            raise ValueError(f"{numbers[0]} is to be quantized, but is one number")

    @cached_property
    def _hash(self) -> int:
        return hash((tuple(self.shapes.items()), self.on_grid))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Texts have other hashes in other processes.
        return type(self), (self.shapes, self.on_grid)

    @classmethod
    def of(cls, state: Mapping[str, object], on_grid: Iterable[str] = ()) -> "UpdateSpec":
        """Take the specification from a state dict; what holds no floats is left out.

        Parameters
        ----------
        state : mapping of str to object
            State dict; integer tensors, as step counters, and what is no tensor are not sent.
        on_grid : iterable of str
            As of the class.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in float_tensors(state).items()}
        return cls(shapes, check_names("on_grid", on_grid))

    def quantized(self, bits: int) -> list[str]:
        """Names of the tensors that an update of width `bits` quantizes."""
        return [n for n in self.shapes if bits != FLOAT_BITS and n in self.on_grid]

    def floats(self, bits: int) -> list[str]:
        """Names of the tensors that an update of width `bits` leaves float32."""
        return [n for n in self.shapes if bits == FLOAT_BITS or n not in self.on_grid]


def float_tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return what of a state dict holds floating-point numbers: what can be sent and averaged."""
    check_kind("state", state, Mapping)
    return {
        name: value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def is_variance(name: str) -> bool:
    """Return whether a tensor of this name holds BatchNorm's variances, which are not negative.

    >>> is_variance("bn.running_var"), is_variance("bn.running_mean")
    (True, False)
    """
    return name.endswith("running_var")


def is_statistic(name: str) -> bool:
    """Return whether a tensor of this name holds BatchNorm's statistics: no step optimizes them.

    >>> is_statistic("bn.running_mean"), is_statistic("bn.weight")
    (True, False)
    """
    return name.endswith(("running_mean", "running_var"))


def fixed_point(
    state: Mapping[str, Tensor], names: Iterable[str], step: float
) -> dict[str, Tensor]:
    """Return the scales of a fixed-point model: one step for every weight of the named tensors.

    Raises
    ------
    ValueError
        If the step is not a positive number, or there is no such tensor.

    Examples
    --------
    >>> fixed_point({"w": torch.zeros(2, 3)}, ["w"], step=0.25)
    {'w': tensor([0.2500, 0.2500])}
    """
    check_number("step", step, above=0)
    named = _named(state, names)
    return {name: torch.full((tensor.shape[0],), step) for name, tensor in named.items()}


def fit_scales(state: Mapping[str, Tensor], names: Iterable[str], bits: int) -> dict[str, Tensor]:
    """Fit the scale of each named tensor to its values (`quant.fit_scale`).

    Raises
    ------
    NonFiniteError
        If one of them holds a NaN or an infinity; the message names it.
    ValueError
        If there is no such tensor.

    Examples
    --------
    >>> fit_scales({"w": torch.tensor([[0.5, -12.7]]), "b": torch.ones(1)}, ["w"], bits=8)
    {'w': tensor([0.1000])}
    """
    scales = {}
    for name, tensor in _named(state, names).items():
        with naming(name):
            scales[name] = fit_scale(tensor, bits)
    return scales


def _named(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors of a state, in its order."""
    check_kind("state", state, Mapping)
    wanted = check_names("names", names)
    if odd := sorted(wanted - state.keys()):
        raise ValueError(f"names: there is no tensor {odd[0]!r}")
    named = {name: tensor for name, tensor in state.items() if name in wanted}
    check_tensors("state", named)
    if odd := [name for name, tensor in named.items() if not tensor.ndim]:
        raise ValueError(f"names: {odd[0]} is one number; allowed: tensors [channels, ...]")
    return named


def quantize_state(
    state: Mapping[str, Tensor],
    bits: int,
    scales: Mapping[str, Tensor] | None = None,
    *,
    dither: int = 0,
) -> Update:
    """Bring a model to a bit-width by rounding to nearest, or with a dither.

    Parameters
    ----------
    state : mapping of str to Tensor
        State dict; what holds no floats is passed over.
    bits : int
        2 to 16, or 32 to leave everything as it is.
    scales : mapping of str to Tensor
        Scale of each tensor that is quantized, as `weight_scales` has them of a prepared model and
        `fit_scales` fits them; what has no scale stays float32. Not needed at 32 bits.
    dither : int
        Seed of the noise with which weights are rounded stochastically, the same noise whatever the
        weights and the scales are; 0: they are rounded to nearest.

    Raises
    ------
    NonFiniteError
        If a tensor that is quantized holds a NaN or an infinity; the message names it.
    ValueError
        If `scales` is missing below 32 bits, names a missing tensor, or holds what is not positive.

    Examples
    --------
    >>> state = {"w": torch.tensor([[0.9, -2.0]]), "b": torch.tensor([0.3])}
    >>> update = quantize_state(state, 4, {"w": torch.tensor([0.5])})
    >>> update.quantized["w"].codes, update.floats["b"]
    (tensor([[ 2, -4]], dtype=torch.int8), tensor([0.3000]))
    """
    if bits != FLOAT_BITS and scales is None:
        raise ValueError(
            f"scales is None; at {bits} bits it names what is quantized (weight_scales, fit_scales)"
        )
    if scales is not None:
        check_tensors("scales", scales)
    tensors = float_tensors(state)
    spec = UpdateSpec.of(tensors, () if bits == FLOAT_BITS else scales or ())
    quantized = {}
    noise = torch.Generator().manual_seed(dither) if dither else None
    for name in spec.quantized(bits):
        assert scales is not None  # Or nothing would be quantized.
        with naming(name):
            if noise is None:
                codes = quantize_nearest(tensors[name], scales[name], bits)
            else:
                codes = quantize_stochastic(tensors[name], scales[name], bits, noise)
        quantized[name] = QuantizedTensor(codes, scales[name].detach().clone())
    return Update(bits, "weights", quantized, {n: tensors[n].float() for n in spec.floats(bits)})


def quantize_fitted(state: Mapping[str, Tensor], bits: int, names: Iterable[str]) -> Update:
    """Round the named tensors of a state to nearest, on grids that are fitted to them.

    Parameters
    ----------
    state, bits
        As of `quantize_state`.
    names : iterable of str
        As of `fit_scales`; not looked at where 32 bits leave everything as it is.

    Examples
    --------
    >>> quantize_fitted({"w": torch.tensor([[12.7, -0.3]])}, 8, ["w"]).quantized["w"].codes
    tensor([[127,  -3]], dtype=torch.int8)
    """
    scales = None if bits == FLOAT_BITS else fit_scales(state, names, bits)
    return quantize_state(state, bits, scales)


def quantize_difference(
    difference: Mapping[str, Tensor],
    bits: int,
    generator: torch.Generator,
    names: Iterable[str],
) -> Update:
    """Quantize the difference between two models without bias.

    QSGD's stochastic quantizer (Alistarh et al., arXiv:1610.02132) with ``s = 2**(bits-1) - 1``
    levels on each side, one bucket an output channel, scaled by the bucket's largest magnitude:
    ``E[Q(x)] = x`` and ``E|Q(x) - x|^2 <= n max|x|^2 / (4 s^2)`` for a bucket of ``n`` values.

    Parameters
    ----------
    difference : mapping of str to Tensor
        Floating-point tensors.
    bits : int
        2 to 16, or 32 to leave everything as it is.
    generator : torch.Generator
        Seeded source of the rounding noise.
    names : iterable of str
        Which of them are quantized (`quantizable_weights`); the others stay float32.

    Raises
    ------
    NonFiniteError
        If one of those holds a NaN or an infinity; the message names it.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> update = quantize_difference({"w": torch.tensor([[0.7, -0.2]])}, 4, generator, ["w"])
    >>> update.content, update.quantized["w"].codes
    ('difference', tensor([[ 7, -2]], dtype=torch.int8))
    """
    check_kind("difference", difference, Mapping)
    tensors = float_tensors(difference)
    spec = UpdateSpec.of(tensors, check_names("names", names))
    quantized = {}
    for name in spec.quantized(bits):
        with naming(name):
            scale = absmax_scale(tensors[name], bits)
            codes = quantize_stochastic(tensors[name], scale, bits, generator)
        quantized[name] = QuantizedTensor(codes, scale)
    floats = {name: tensors[name].float() for name in spec.floats(bits)}
    return Update(bits, "difference", quantized, floats)


def without_noise(update: Update, generator: torch.Generator) -> dict[str, Tensor]:
    """Dequantize a difference, and subtract what is known of the noise that it was rounded with.

    A code is ``c = round(x + u)``, ``x`` the value in steps and ``u`` uniform within half a step
    (subtractive dither: Roberts, 1962). ``c - k u`` is right on average for every ``k``. Its
    variance is ``s - k s + k^2 / 12`` with ``s = f (1 - f)`` and ``f`` the fraction of ``x``: that
    of `Update.dequantize` at ``k = 0``, and least at ``k = 6 s``. Of each tensor the mean of ``s``
    is ``E[c^2] - E[(c - u)^2] + 1/12``.

    Parameters
    ----------
    update : Update
        Of `quantize_difference`.
    generator : torch.Generator
        In the state in which that was given its own.

    Returns
    -------
    dict of str to Tensor
        Float32.

    Examples
    --------
    >>> sent = {"w": torch.linspace(-1, 1, 999)[None]}
    >>> first, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    >>> update = quantize_difference(sent, 3, first, ["w"])
    >>> errors = [x["w"] - sent["w"] for x in (update.dequantize(), without_noise(update, again))]
    >>> bool(errors[1].square().mean() < 0.6 * errors[0].square().mean())
    True
    """
    values = update.dequantize()
    for name, tensor in update.quantized.items():
        codes = tensor.codes.float()
        noise = 0.5 - torch.rand(codes.shape, generator=generator)
        spread = codes.square().mean() - (codes - noise).square().mean() + 1 / 12
        known = (6 * spread).clamp(0, 1) * noise
        values[name] -= known * per_channel(tensor.scale, codes.ndim)
    return values
