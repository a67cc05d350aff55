"""The integers that a group of devices sums: exact, as all of a bit-width share one grid.

The weights that low-bit devices hold on a grid are codes already. All other tensors, and all of a
group that has no such grid, travel in fixed point, as how far they moved from the start, rounded
without bias.
Codes and differences are multiplied by the device's weight, a small integer, and the sums are taken
modulo ``2**m`` with the smallest m that holds the largest one: nothing is clipped or rounded by
the sum itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from quant import (
    FLOAT_BITS,
    Update,
    UpdateSpec,
    is_statistic,
    largest_code,
    moved_by,
    quantize_state,
)

# How far a tensor may move in a round in fixed point: so many times its largest value, or one, if
# that is larger. Statistics of BatchNorm begin at 0 and 1 and may go far in the first round.
_REACH, _REACH_OF_STATISTICS = 4.0, 64.0
# Of the weights within a group.
LARGEST_WEIGHT = 255


class GridError(ValueError):
    """What a device would send does not lie on the grid that it was given; one line."""


@dataclass(frozen=True)
class SumGrid:
    """The grid of one group in one round.

    Attributes
    ----------
    spec : UpdateSpec
        The model's tensors.
    bits : int
        Width of the codes, 2 to 16, or 32 where everything travels in fixed point.
    scales : mapping of str to Tensor
        Float32 scales ``[channels]`` of the tensors that are quantized.
    start : mapping of str to Tensor
        Float32 model as the devices received it.
    float_bits : int
        Width of the differences in fixed point, 16 to 24.
    dither, stored_bits : int
        On a device: as of `quant.moved_by`.
    given_steps : mapping of str to float
        Fixed-point steps of a group whose devices have several starts; else they follow from it.

    Examples
    --------
    >>> spec = UpdateSpec({"b": (2,)})
    >>> grid = SumGrid(spec, 32, {}, {"b": torch.zeros(2)}, float_bits=16)
    >>> grid.mean([np.zeros(0, np.int64), np.array([32767, 0])], weight=2)
    {'b': tensor([2., 0.])}
    """

    spec: UpdateSpec
    bits: int
    scales: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    float_bits: int
    dither: int = 0
    stored_bits: int = 0
    given_steps: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def _quantized(self) -> list[str]:
        return self.spec.quantized(self.bits)

    @cached_property
    def _floats(self) -> list[str]:
        return self.spec.floats(self.bits)

    @cached_property
    def steps(self) -> dict[str, float]:
        """Fixed-point step of each tensor that is not quantized."""
        if self.given_steps:
            return dict(self.given_steps)
        most = _largest(self.float_bits)
        return {name: _reach(name, self.start[name]) / most for name in self._floats}

    def integers(
        self, update: Update, weight: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what a device adds to the sums, as signed int64, and nothing of it is masked yet.

        Parameters
        ----------
        update : Update
            What it would send in the clear: weights on these scales. Where there are none, weights
            or a difference of any width, on whatever grid.
        weight : int
            What it counts for, from 1.
        generator : Generator
            Of the stochastic rounding to fixed point.

        Raises
        ------
        GridError
            If the update lies on other scales.
        """
        codes = []
        if not self._quantized:
            moved = moved_by(update, self.start, self.dither, self.stored_bits)
        elif list(update.quantized) != self._quantized:
            raise GridError(f"an update of {update.bits} bits; the group's grid has {self.bits}")
        else:
            moved = {n: update.floats[n].double() - self.start[n].double() for n in self._floats}
        for name in self._quantized:
            tensor = update.quantized[name]
            if not torch.equal(tensor.scale, self.scales[name]):
                raise GridError(f"{name} was trained on other scales than the group's")
            codes.append(tensor.codes.reshape(-1).numpy().astype(np.int64))
        floats = [self._fixed_point(name, moved[name], generator) for name in self._floats]
        return _joined(codes) * weight, _joined(floats) * weight

    def mean(self, sums: Sequence[np.ndarray], weight: int) -> dict[str, Tensor]:
        """Return the mean model of devices whose integers have these sums.

        Parameters
        ----------
        sums : sequence of ndarray
            Of codes, and of fixed-point differences, int64.
        weight : int
            Sum of the weights of those devices.
        """
        codes, floats = (torch.from_numpy(total).double() / weight for total in sums)
        mean = {}
        for name, part in self._split(codes, self._quantized):
            scale = self.scales[name].double().reshape(-1, *(1,) * (part.ndim - 1))
            mean[name] = (part * scale).float()
        for name, part in self._split(floats, self._floats):
            mean[name] = (self.start[name].double() + part * self.steps[name]).float()
        return {name: mean[name] for name in self.spec.shapes}

    def start_as_held(self) -> dict[str, Tensor]:
        """Return the start as devices hold it that train on this grid."""
        if self.bits == FLOAT_BITS:
            return dict(self.start)
        return quantize_state(self.start, self.bits, self.scales).dequantize()

    def _fixed_point(self, name: str, moved: Tensor, generator: np.random.Generator) -> np.ndarray:
        values = moved.reshape(-1).numpy()
        if not np.isfinite(values).all():
            # NaN as an integer would be anything, and times an even weight nothing.
            raise GridError(f"{name} is not finite; training diverged")
        most = _largest(self.float_bits)
        scaled = np.clip(values / self.steps[name], -most, most)
        low = np.floor(scaled)
        up = generator.random(low.shape) < scaled - low
        return low.astype(np.int64) + up

    def _split(self, values: Tensor, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        sizes = [self.start[name].numel() for name in names]
        shaped = zip(names, values.split(sizes) if names else (), strict=True)
        return [(name, part.reshape(self.start[name].shape)) for name, part in shaped]


def sum_widths(
    spec: UpdateSpec, bits: int, float_bits: int, total_weight: int
) -> list[tuple[int, int]]:
    """Return count and bits of the sums of codes, and of those of fixed-point differences.

    Parameters
    ----------
    spec : UpdateSpec
        The model's tensors.
    bits, float_bits : int
        As of `SumGrid`.
    total_weight : int
        Sum of the weights of all devices of the group.

    Examples
    --------
    Codes of 4 bits of twenty devices take nine bits:

    >>> sum_widths(UpdateSpec({"w": (2, 3), "b": (2,)}, {"w"}), 4, 16, total_weight=20)
    [(6, 9), (2, 21)]
    """
    parts = (
        (spec.quantized(bits), 0 if bits == FLOAT_BITS else largest_code(bits)),
        (spec.floats(bits), _largest(float_bits)),
    )
    # Two's complement: m bits hold sums below 2**(m - 1) in magnitude.
    return [
        (sum(prod(spec.shapes[name]) for name in names), (most * total_weight).bit_length() + 1)
        for names, most in parts
    ]


def group_weights(examples: Mapping[int, int]) -> dict[int, int]:
    """Return small integers in proportion to the examples of each device, 1 to 255.

    Parameters
    ----------
    examples : mapping of int to int
        By device.

    Examples
    --------
    >>> group_weights({0: 500, 1: 500}), group_weights({0: 100, 1: 51})
    ({0: 1, 1: 1}, {0: 51, 1: 26})
    """
    most = max(examples.values())
    weights = {d: max(1, round(LARGEST_WEIGHT * n / most)) for d, n in examples.items()}
    common = int(np.gcd.reduce(list(weights.values())))
    return {device: weight // common for device, weight in weights.items()}


def _largest(float_bits: int) -> int:
    return int(2 ** (float_bits - 1) - 1)


def _reach(name: str, start: Tensor) -> float:
    times = _REACH_OF_STATISTICS if is_statistic(name) else _REACH
    largest = float(start.abs().max()) if start.numel() else 0.0
    return times * max(1.0, largest)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
