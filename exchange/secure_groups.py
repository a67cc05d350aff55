"""The groups of a round of secure aggregation: who sums with whom, on which grid, and the means.

The devices of one bit-width are a group, and a width that has too few of them can join the next
wider one. What the groups send and receive in a round: `exchange.secure_round`.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np
from torch import Tensor

from core.errors import FederationError, SettingsError
from core.settings import LowBitTraining, SmallGroups
from exchange.protocol import Declaration, Instruction, Report
from exchange.replies import ClientUpdate, Member
from exchange.round_plan import RoundPlan, summed_bits
from exchange.secure import SumPlan
from privacy import GroupAggregation
from privacy.accounting import LEAST_SIGMA
from privacy.noise import LARGEST_SIGMA
from privacy.noisy_grid import NoisyGrid
from privacy.sum_grid import SumGrid, group_weights, sum_widths
from quant import FLOAT_BITS, Update
from quant.update import Content

Counted = Callable[[Declaration], int]


@dataclass(frozen=True)
class SecureSettings:
    """How a sum is made: `secure-threshold`, `secure-min-group`, `secure-float-bits`.

    Attributes
    ----------
    threshold : float
        Share of a group that must be left for its sum to be unmasked, above a half.
    min_group : int
        Devices that a group must have, from 2.
    float_bits : int
        Width of the differences in fixed point.
    small_groups : {"leave-out", "merge"}
        What becomes of a width that has fewer devices.
    timeout : float or None
        Seconds for each step.
    training : {"qat", "strict", "integer"}
        How low-bit clients train.
    clip, noise_multiplier : float
        Of differential privacy; 0: without.
    """

    threshold: float
    min_group: int
    float_bits: int
    small_groups: SmallGroups = "leave-out"
    timeout: float | None = None
    training: LowBitTraining = "qat"
    clip: float = 0.0
    noise_multiplier: float = 0.0

    def least(self, devices: int) -> int:
        """Return how many of a group must be left."""
        return max(2, devices // 2 + 1, ceil(self.threshold * devices))

    def noisy_grid(self, plan: RoundPlan, devices: int, start: Mapping[str, Tensor]) -> NoisyGrid:
        """Return the grid with noise of a group."""
        noise, least = self.noise_multiplier, self.least(devices)
        return NoisyGrid(plan.spec, self.clip, noise, least, self.float_bits, start)


@dataclass
class Group:
    """Devices that sum their updates.

    Attributes
    ----------
    clients : dict of int to Declaration
        All that were asked, by number.
    instructions : dict of int to Instruction
        What they were asked.
    code_bits : int
        Width of the codes that they sum; 32: all is in fixed point.
    weights : dict of int to int
        What each counts for.
    parts : list of (int, int)
        Count and bits of the sums of codes, and of those in fixed point.
    context : bytes
        What names this round of this run: what was recorded of another does not fit.
    sums : GroupAggregation
        The protocol.
    settings : SecureSettings
        How.
    left : set of int
        Who has answered so far.
    without : list of int
        Who shared secrets, and takes no part in the masking.
    grid : SumGrid or NoisyGrid, optional
        Once the model is made.
    reports : dict of int to Report
        Of those that are in the sum.
    """

    clients: dict[int, Declaration]
    instructions: dict[int, Instruction]
    code_bits: int
    weights: dict[int, int]
    parts: list[tuple[int, int]]
    context: bytes
    sums: GroupAggregation
    settings: SecureSettings
    left: set[int]
    roster: bytes = b""
    without: list[int] = field(default_factory=list)
    grid: SumGrid | NoisyGrid | None = None
    reports: dict[int, Report] = field(default_factory=dict)
    _bits: int = 0

    @property
    def widths(self) -> list[int]:
        """Bit-widths of its devices; one, or those that were merged."""
        return sorted({client.bits for client in self.clients.values()})

    @property
    def bits(self) -> int:
        """The width that its mean counts as: the widest that it has when training begins."""
        return self._bits or max(self.widths)

    @property
    def is_merged(self) -> bool:
        """Whether it has devices of several widths."""
        return len(self.widths) > 1

    def begin(self) -> None:
        """Fix the width that it counts as, now that it is known who trains."""
        self._bits = max(self.clients[number].bits for number in self.left)

    def prepare(
        self, plan: RoundPlan, model: Update, scales: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Fix the grid, from the model that devices of this width are sent."""
        start, float_bits = model.dequantize(), self.settings.float_bits
        if self.settings.clip:
            self.grid = self.settings.noisy_grid(plan, len(self.clients), start)
            return
        held = {} if self.code_bits == FLOAT_BITS else scales()
        self.grid = SumGrid(plan.spec, self.code_bits, held, start, float_bits)

    def grid_made(self) -> SumGrid | NoisyGrid:
        """Return the grid."""
        assert self.grid is not None, "its model is made before its messages, the widest first"
        return self.grid

    def plan_for(self, number: int) -> SumPlan:
        """Return what a device is told of the sum."""
        settings, (codes, floats) = self.settings, self.parts
        least = settings.least(len(self.clients))
        return SumPlan(
            self.weights[number],
            (codes, floats),
            self.code_bits,
            settings.float_bits,
            self.without,
            settings.clip,
            settings.noise_multiplier,
            least,
        )

    def figures(self) -> dict[str, Any]:
        """Return what the record says of the sum."""
        (codes, of_codes), (floats, of_floats) = self.parts
        merged = Counter(self.clients[n].bits for n in self.reports) if self.is_merged else {}
        return {
            "devices": len(self.reports),
            **{f"devices-{bits}": merged[bits] for bits in sorted(merged)},
            "code-bits": of_codes if codes else 0,
            "float-bits": of_floats if floats else 0,
        }

    def mean(self, total: list[np.ndarray], plan: RoundPlan, counted: Counted) -> ClientUpdate:
        """Return the mean of the sum as the update of one client."""
        grid, numbers, everybody = self.grid_made(), sorted(self.reports), 0
        if isinstance(grid, NoisyGrid):
            # How many sent something must not tell who did.
            of_widths = [plan.widths[bits] for bits in self.widths]
            values = grid.mean(total, sum(width.drawn for width in of_widths))
            examples = everybody = sum(width.clients for width in of_widths)
        else:
            values = grid.mean(total, sum(self.weights[number] for number in numbers))
            examples = sum(counted(self.clients[number]) for number in numbers)
        of_width = [n for n in self.clients if self.clients[n].bits == self.bits]
        shown = min(of_width, key=lambda number: (number not in self.reports, number))
        content: Content = "weights"
        if self.instructions[shown].uplink == "difference":
            content = "difference"
            held = grid.start_as_held()
            values = {name: tensor - held[name] for name, tensor in values.items()}
        return ClientUpdate(
            replace(self.clients[shown], num_examples=examples),
            Update(FLOAT_BITS, content, {}, values),
            _mean_report([self.reports[number] for number in numbers], examples),
            members=tuple(
                Member(number, self.weights[number], self.instructions[number].dither)
                for number in numbers
            ),
            from_received=self.is_merged or isinstance(grid, NoisyGrid),
            everybody=everybody,
        )


def widths_together(sizes: Mapping[int, int], settings: SecureSettings) -> list[list[int]]:
    """Return which widths sum together.

    Merged are the widths that have too few devices, each with the next wider one; if that is the
    widest, with the next narrower.

    Parameters
    ----------
    sizes : mapping of int to int
        Devices of each width.
    settings : SecureSettings
        How.

    Examples
    --------
    >>> merging = SecureSettings(0.66, 3, 20, small_groups="merge")
    >>> widths_together({2: 1, 4: 2, 8: 5, 32: 1}, merging)
    [[2, 4], [8, 32]]
    """
    if settings.small_groups == "leave-out":
        return [[bits] for bits in sorted(sizes)]
    groups: list[list[int]] = []
    small: list[int] = []
    for bits in sorted(sizes):
        small.append(bits)
        if sum(sizes[one] for one in small) >= settings.min_group:
            groups.append(small)
            small = []
    if small and groups:
        groups[-1] += small
    elif small:
        groups = [small]
    return groups


def group_of(
    clients: Iterable[Declaration], plan: RoundPlan, settings: SecureSettings, counted: Counted
) -> Group:
    """Return the group of some devices, whose protocol has not begun.

    Raises
    ------
    FederationError
        If devices of one width are asked for updates of several.
    SettingsError
        If the noise is not one that can be accounted, or drawn.
    """
    by_number = {client.partition_id: client for client in clients}
    instructions = {number: plan.instructions[number] for number in by_number}
    code_bits = _code_bits(by_number, instructions, settings.training)
    weights = group_weights({number: counted(c) for number, c in by_number.items()})
    parts = sum_widths(plan.spec, code_bits, settings.float_bits, sum(weights.values()))
    if settings.clip:
        grid = settings.noisy_grid(plan, len(by_number), {})
        _check_noise(grid)
        code_bits, parts = FLOAT_BITS, grid.widths(len(by_number))
    context, least = secrets.token_bytes(16), settings.least(len(by_number))
    sums = GroupAggregation(context, [*by_number], least, parts)
    left = set(by_number)
    return Group(by_number, instructions, code_bits, weights, parts, context, sums, settings, left)


def _code_bits(
    clients: Mapping[int, Declaration],
    instructions: Mapping[int, Instruction],
    training: LowBitTraining,
) -> int:
    asked: dict[int, set[int]] = {}
    for number, client in clients.items():
        width = summed_bits(instructions[number], client, training)
        asked.setdefault(client.bits, set()).add(width)
    if odd := [bits for bits, widths in asked.items() if len(widths) > 1]:
        raise FederationError(
            f"secure-aggregation: clients of {odd[0]} bits are asked for updates of "
            f"{sorted(asked[odd[0]])} bits; allowed: one width for all of them"
        )
    # Those of several widths have no grid in common.
    return asked.popitem()[1].pop() if len(asked) == 1 else FLOAT_BITS


def _check_noise(grid: NoisyGrid) -> None:
    """Refuse noise too fine to be accounted, or too wide to be drawn, before anybody trains."""
    if not LEAST_SIGMA <= grid.sigma <= LARGEST_SIGMA:
        noise = grid.noise_multiplier
        least, most = (noise * s / grid.sigma for s in (LEAST_SIGMA, LARGEST_SIGMA))
        raise SettingsError(
            f"dp-noise-multiplier: {noise:g} with secure-float-bits {grid.float_bits}; allowed "
            f"for this model and this many devices: {least:.3g} to {most:.3g}"
        )


def _mean_report(reports: list[Report], examples: int) -> Report:
    """Return what one client would have reported that had all examples."""
    total = sum(report.num_examples for report in reports)
    return replace(
        reports[0],
        num_examples=examples,
        loss=sum(r.loss * r.num_examples for r in reports) / total,
        accuracy=sum(r.accuracy * r.num_examples for r in reports) / total,
        seconds=sum(r.seconds for r in reports),
        steps=max(r.steps for r in reports),
    )
