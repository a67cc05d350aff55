"""Differential privacy of devices: movements that are clipped, and sums of them with noise.

With secure aggregation every device adds its share of the noise to its integers before it masks
them, so that nobody sees a sum without noise; otherwise the server adds it. Either way a device is
its movement from the start, as it holds it: what is protected is all that it contributes. The
statistics of BatchNorm are left as they were, and not sent: without a bound of their own they would
use up the clip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor

from privacy.accounting import distributed_noise_multiplier
from privacy.clipping import clip_factor, norm_of, round_within, rounded_clip
from privacy.noise import device_sigma, discrete_gaussian, with_gaussian_noise
from quant import Update, UpdateSpec, is_statistic, moved_by

# How many standard deviations of a sum's noise its bits have room for: beyond once in 10**22.
_TAIL = 10.0


def movement_of(
    update: Update, received: Mapping[str, Tensor], dither: int = 0, stored_bits: int = 0
) -> dict[str, Tensor]:
    """Return how far a device went from its start (`quant.moved_by`); statistics as not at all.

    Parameters
    ----------
    update : Update
        What it would send in the clear.
    received : mapping of str to Tensor
        Float32 model that it was sent.
    dither, stored_bits : int
        As of `quant.start_of`.

    Examples
    --------
    >>> update = Update(32, "weights", {}, {"b": torch.tensor([3.0])})
    >>> movement_of(update, {"b": torch.tensor([1.0])})
    {'b': tensor([2.], dtype=torch.float64)}
    """
    moved = moved_by(update, received, dither, stored_bits)
    return {name: tensor * 0 if is_statistic(name) else tensor for name, tensor in moved.items()}


@dataclass(frozen=True)
class NoisyGrid:
    """The grid on which a group sums movements with noise.

    Attributes
    ----------
    spec : UpdateSpec
        The model's tensors.
    clip : float
        Largest norm of a movement.
    noise_multiplier : float
        Standard deviation of the sum's noise, by the norm that movements have after rounding.
    devices : int
        The fewest whose sum is unmasked: their shares of the noise are enough.
    float_bits : int
        The clip has ``2**(float_bits - 1)`` steps.
    start : mapping of str to Tensor
        Float32 model as the devices received it.
    dither, stored_bits : int
        On a device: as of `movement_of`.
    """

    spec: UpdateSpec
    clip: float
    noise_multiplier: float
    devices: int
    float_bits: int
    start: Mapping[str, Tensor] = field(default_factory=dict)
    dither: int = 0
    stored_bits: int = 0

    @property
    def scales(self) -> dict[str, Tensor]:
        """Of codes, of which there are none."""
        return {}

    @cached_property
    def dimension(self) -> int:
        """Number of coordinates that have noise."""
        return sum(self._sizes[name] for name in self.spec.shapes if not is_statistic(name))

    @property
    def step(self) -> float:
        """Size of one integer."""
        return float(self.clip / 2 ** (self.float_bits - 1))

    @cached_property
    def bound(self) -> float:
        """Largest norm of a movement after rounding: what the noise is in proportion to."""
        return rounded_clip(self.clip, np.full(self.dimension, self.step))

    @property
    def sigma(self) -> float:
        """Standard deviation of a device's noise, in integers."""
        return device_sigma(self.noise_multiplier, self.bound, self.devices) / self.step

    def widths(self, devices: int) -> list[tuple[int, int]]:
        """Return count and bits of the sums over so many devices, as `sum_widths` does."""
        noise = _TAIL * self.sigma * np.sqrt(devices)
        largest = ceil(devices * self.bound / self.step + noise)
        return [(0, 1), (sum(self._sizes.values()), largest.bit_length() + 1)]

    def effective_noise(self, devices: int) -> float:
        """Return the noise multiplier to account a sum over so many devices with."""
        z, count = self.noise_multiplier, max(devices, 1)
        return distributed_noise_multiplier(z, self.sigma, count, self.dimension)

    def integers(
        self, update: Update, weight: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a device's movement, clipped, rounded and with its share of the noise.

        The noise is of the system's secure random numbers, whatever the generator.
        """
        if weight != 1:
            raise ValueError(f"weight: {weight} is not allowed: with noise each device counts once")
        moved = movement_of(update, self.start, self.dither, self.stored_bits)
        factor = clip_factor(norm_of(moved), self.clip)
        is_noisy = [not is_statistic(name) for name in self.spec.shapes]
        with_noise = np.repeat(is_noisy, list(self._sizes.values()))
        codes = np.zeros(with_noise.size, np.int64)
        values = self._flat(moved)[with_noise] * (factor / self.step)
        steps = np.full(values.shape, self.step)
        rounded = round_within(values, steps, self.bound, generator)
        codes[with_noise] = rounded + discrete_gaussian(self.sigma, rounded.shape)
        return np.zeros(0, np.int64), codes

    def noise_norm(self, devices: int, divisor: float) -> float:
        """Return the norm that the noise in a mean hardly ever exceeds.

        Parameters
        ----------
        devices : int
            Whose shares of the noise are in the sum.
        divisor : float
            What the sum is divided by.
        """
        one = self.sigma * self.step * np.sqrt(devices) / divisor
        return float(one * (np.sqrt(self.dimension) + _TAIL))

    def mean(self, sums: Sequence[np.ndarray], weight: float) -> dict[str, Tensor]:
        """Return the start, moved by the mean of movements whose integers have this sum."""
        moved = torch.from_numpy(sums[1]).double() * (self.step / weight)
        parts = moved.split(list(self._sizes.values()))
        return {
            name: (self.start[name].double() + part.reshape(shape)).float()
            for (name, shape), part in zip(self.spec.shapes.items(), parts, strict=True)
        }

    def start_as_held(self) -> dict[str, Tensor]:
        """Return what movements are added to."""
        return dict(self.start)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: prod(shape) for name, shape in self.spec.shapes.items()}

    def _flat(self, values: Mapping[str, Tensor]) -> np.ndarray:
        parts = [values[name].double().reshape(-1).numpy() for name in self.spec.shapes]
        return np.concatenate(parts)


class NoisySum:
    """Central noise: clips movements, adds them up one at a time, and adds noise to the sum.

    Parameters
    ----------
    like : mapping of str to Tensor
        Tensors of a movement's names and shapes.
    clip : float
        Largest norm of one movement.
    """

    def __init__(self, like: Mapping[str, Tensor], clip: float) -> None:
        self._clip = clip
        self._total = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in like.items()}

    def add(self, movement: Mapping[str, Tensor]) -> None:
        """Add `movement_of` a device."""
        factor = clip_factor(norm_of(movement), self._clip)
        for name, tensor in movement.items():
            self._total[name] += tensor.double() * factor

    def mean(self, noise_multiplier: float, devices: float) -> dict[str, Tensor]:
        """Return the sum with noise, divided by a number of devices that is fixed beforehand.

        Parameters
        ----------
        noise_multiplier : float
            Standard deviation of the noise, by the clip.
        devices : float
            As of `exchange.round_plan.WidthPlan.drawn`.
        """
        sigma = noise_multiplier * self._clip
        return {
            name: (total if is_statistic(name) else with_gaussian_noise(total, sigma)).float()
            / devices
            for name, total in self._total.items()
        }
