"""The server's side of a round of secure aggregation: who sums with whom, and the sums.

The devices of one bit-width are a group with one grid. Before they train they agree on keys; after
that the server gets masked integers only, and at the end what unmasks each group's sum, never one
device's. Whoever fails at a step is out of the round, and a group that has too few devices left is
left out as a whole.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from logging import WARNING
from math import ceil

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from core.errors import FederationError, SettingsError
from core.settings import LowBitTraining
from exchange.inbox import match_replies, receive
from exchange.protocol import Declaration, Report, plain
from exchange.replies import BadReply, ClientUpdate, Member, Reply
from exchange.round_plan import RoundLog, RoundPlan, summed_bits
from exchange.secure import (
    KEYS,
    REVEAL,
    SCALES,
    SECURE,
    SHARES,
    SumPlan,
    keys_wanted,
    reveal_wanted,
    scales_record,
    shares_wanted,
)
from privacy import (
    GroupAggregation,
    MessageError,
    NotEnoughError,
    UnmaskingError,
    roster_to_bytes,
)
from privacy.accounting import LEAST_SIGMA
from privacy.noise import LARGEST_SIGMA
from privacy.noisy_grid import NoisyGrid
from privacy.sum_grid import SumGrid, group_weights, sum_widths
from quant import FLOAT_BITS, Update
from quant.update import Content


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
    timeout: float | None = None
    training: LowBitTraining = "qat"
    clip: float = 0.0
    noise_multiplier: float = 0.0


@dataclass
class _Group:
    """One width: its protocol, who is left, its weights, and the grid once its model is made."""

    bits: int
    width: int
    context: bytes
    clients: dict[int, Declaration]
    weights: dict[int, int]
    widths: list[tuple[int, int]]
    sums: GroupAggregation
    left: set[int]
    roster: bytes = b""
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    grid: SumGrid | NoisyGrid | None = None
    reports: dict[int, Report] = field(default_factory=dict)


class SecureRound:
    """The groups of one round.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    plan : RoundPlan
        Who is asked what.
    round_log : RoundLog
        Where it is noted who is left out, and why.
    settings : SecureSettings
        How.
    """

    def __init__(
        self, grid: Grid, plan: RoundPlan, round_log: RoundLog, settings: SecureSettings
    ) -> None:
        self._grid, self._plan, self._log, self._settings = grid, plan, round_log, settings
        self._nodes = {client.partition_id: node for node, client in plan.clients.items()}
        self._groups: dict[int, _Group] = {}

    def agree(self, counted: Callable[[Declaration], int]) -> None:
        """Let the devices of each group agree on keys, before any of them trains.

        Who does not is taken off the plan, and the reason noted.

        Parameters
        ----------
        counted : callable
            Examples that a device counts for.
        """
        for bits in sorted({client.bits for client in self._plan.clients.values()}):
            clients = [c for c in self._plan.clients.values() if c.bits == bits]
            self._add_group(bits, clients, counted)
        self._step(
            KEYS, lambda group, _: keys_wanted(group.context), GroupAggregation.take_keys, self._log
        )
        self._each(self._collect_roster)
        self._step(SHARES, self._shares_for, GroupAggregation.take_shares, self._log)
        self._each(self._collect_sealed)
        taking_part = {number for group in self._groups.values() for number in group.left}
        for node, client in list(self._plan.clients.items()):
            if client.partition_id not in taking_part:
                del self._plan.clients[node]

    def prepare(self, bits: int, model: Update, scales: Callable[[], dict[str, Tensor]]) -> None:
        """Fix the grid of a group, from the model that its devices are sent.

        Parameters
        ----------
        bits : int
            The group.
        model : Update
            That model.
        scales : callable
            Gives the scales of its codes, where they sum codes.
        """
        group = self._groups[bits]
        start, float_bits = model.dequantize(), self._settings.float_bits
        if self._settings.clip:
            group.grid = self._noisy_grid(len(group.clients), start)
            return
        held = {} if group.width == FLOAT_BITS else scales()
        group.grid = SumGrid(self._plan.spec, group.width, held, start, float_bits)

    def add_to(self, content: RecordDict, client: Declaration) -> None:
        """Put what the sum needs into a message to train."""
        group, number = self._groups[client.bits], client.partition_id
        codes, floats = group.widths
        sealed, float_bits = group.sealed[number], self._settings.float_bits
        settings, devices = self._settings, self._threshold(len(group.clients))
        noise = (settings.clip, settings.noise_multiplier, devices)
        parts, weight = (codes, floats), group.weights[number]
        plan = SumPlan(weight, parts, group.width, float_bits, sealed, *noise)
        content[SECURE] = plan.to_record()
        content[SCALES] = scales_record(_grid_of(group).scales)

    def payload_bytes(self, client: Declaration) -> int:
        """Return how long a device's masked vector is."""
        return self._groups[client.bits].sums.payload_bytes

    @property
    def largest_payload(self) -> int:
        """Bytes of the longest one."""
        return max((group.sums.payload_bytes for group in self._groups.values()), default=0)

    def take(self, reply: Reply) -> None:
        """Add a device's masked vector to the sum of its group.

        Raises
        ------
        BadReply
            If it is none.
        """
        group, number = self._groups[reply.client.bits], reply.client.partition_id
        try:
            group.sums.take_masked(number, reply.payload)
        except MessageError as error:
            raise BadReply(str(error)) from None
        group.reports[number] = reply.report

    def sums(self, counted: Callable[[Declaration], int]) -> Iterator[ClientUpdate]:
        """Unmask each group's sum; yield its mean as if one client had sent it, by rising width."""
        for group in self._groups.values():
            group.left = set(group.reports)
        self._each(lambda group: group.sums.to_reveal())
        # Who fails here has sent its vector, and is in the sum all the same.
        silent = RoundLog()
        self._step(REVEAL, self._reveal_for, GroupAggregation.take_revealed, silent)
        for number, reason in silent.left_out.items():
            log(WARNING, "partition %d does not reveal its shares: %s", number, reason)
        totals: dict[int, list[np.ndarray]] = {}
        self._each(lambda group: totals.update({group.bits: group.sums.total()}), few=False)
        # All are seen from here on, whatever a strategy reads of them.
        self._log.noise_multiplier = min(
            (
                group.grid.effective_noise(len(group.reports))
                for group in self._groups.values()
                if isinstance(group.grid, NoisyGrid)
            ),
            default=None,
        )
        for bits, group in self._groups.items():
            self._log.secure[str(bits)] = {
                "devices": len(group.reports),
                "code-bits": group.widths[0][1] if group.widths[0][0] else 0,
                "float-bits": group.widths[1][1] if group.widths[1][0] else 0,
            }
            yield self._mean_of(group, totals[bits], counted)

    def noise_norm(self, bits: int) -> float:
        """Return the norm that the noise in a width's mean hardly ever exceeds."""
        group = self._groups[bits]
        if not isinstance(group.grid, NoisyGrid):
            return 0.0
        return group.grid.noise_norm(len(group.reports), self._plan.widths[bits].drawn)

    def reports_of(self, bits: int) -> list[Report]:
        """Return the reports of the devices that are in the sum of a width, by number."""
        reports = self._groups[bits].reports
        return [reports[number] for number in sorted(reports)]

    # --- the steps -------------------------------------------------------------------------------

    def _add_group(
        self, bits: int, clients: list[Declaration], counted: Callable[[Declaration], int]
    ) -> None:
        instructions = self._plan.instructions
        asked = {
            summed_bits(instructions[c.partition_id], c, self._settings.training) for c in clients
        }
        if len(asked) > 1:
            raise FederationError(
                f"secure-aggregation: clients of {bits} bits are asked for updates of "
                f"{sorted(asked)} bits; allowed: one width for all of them"
            )
        by_number = {client.partition_id: client for client in clients}
        if len(clients) < self._settings.min_group:
            self._leave_out(by_number, self._too_few(len(clients), bits))
            return
        weights = group_weights({number: counted(c) for number, c in by_number.items()})
        [width] = asked
        total, float_bits = sum(weights.values()), self._settings.float_bits
        widths = sum_widths(self._plan.spec, width, float_bits, total)
        if self._settings.clip:
            width, grid = FLOAT_BITS, self._noisy_grid(len(clients), {})
            self._check_noise(grid)
            widths = grid.widths(len(clients))
        # It names this round of this run: what was recorded of another does not fit.
        context = secrets.token_bytes(16)
        sums = GroupAggregation(context, [*by_number], self._threshold(len(by_number)), widths)
        left = set(by_number)
        self._groups[bits] = _Group(bits, width, context, by_number, weights, widths, sums, left)

    def _check_noise(self, grid: NoisyGrid) -> None:
        """Refuse noise too fine to be accounted, or too wide to be drawn, before anybody trains."""
        if not LEAST_SIGMA <= grid.sigma <= LARGEST_SIGMA:
            noise = grid.noise_multiplier
            least, most = (noise * s / grid.sigma for s in (LEAST_SIGMA, LARGEST_SIGMA))
            raise SettingsError(
                f"dp-noise-multiplier: {noise:g} with secure-float-bits {grid.float_bits}; allowed "
                f"for this model and this many devices: {least:.3g} to {most:.3g}"
            )

    def _noisy_grid(self, devices: int, start: Mapping[str, Tensor]) -> NoisyGrid:
        settings, least = self._settings, self._threshold(devices)
        clip, noise = settings.clip, settings.noise_multiplier
        return NoisyGrid(self._plan.spec, clip, noise, least, settings.float_bits, start)

    def _threshold(self, devices: int) -> int:
        return max(2, devices // 2 + 1, ceil(self._settings.threshold * devices))

    def _step(
        self,
        kind: str,
        content: Callable[[_Group, int], RecordDict],
        take: Callable[[GroupAggregation, int, Mapping[str, object]], None],
        noted: RoundLog,
    ) -> None:
        """Ask all devices that are left one thing, and give their answers to their groups."""
        messages, clients, left = [], {}, dict[int, set[int]]()
        for group in self._groups.values():
            for number in sorted(group.left):
                clients[self._nodes[number]] = group.clients[number]
                messages.append(Message(content(group, number), self._nodes[number], kind))
        # None of it travels as an array.
        replies = receive(self._grid, [lambda: messages], self._settings.timeout, most_bytes=0)
        for client, reply in match_replies(messages, clients, replies, noted):
            record = reply.content.get(SECURE)
            given = dict(record) if isinstance(record, ConfigRecord) else {}
            try:
                take(self._groups[client.bits].sums, client.partition_id, given)
                left.setdefault(client.bits, set()).add(client.partition_id)
            except MessageError as error:
                noted.rejected[client.partition_id] = plain(str(error))
        for bits, group in self._groups.items():
            group.left = left.get(bits, set())

    def _each(self, do: Callable[[_Group], object], few: bool = True) -> None:
        """Do what ends a step with each group, and leave out those that it fails for."""
        for bits, group in list(self._groups.items()):
            try:
                do(group)
            except (NotEnoughError, UnmaskingError) as error:
                reason = f"the group of {bits} bits is left out: {error}"
            else:
                if not few or len(group.left) >= self._settings.min_group:
                    continue
                reason = self._too_few(len(group.left), bits)
            self._leave_out(group.clients, reason)
            del self._groups[bits]

    def _leave_out(self, clients: Mapping[int, Declaration], reason: str) -> None:
        for number in clients:
            if number not in self._log.left_out:
                self._log.rejected[number] = plain(reason)

    def _too_few(self, devices: int, bits: int) -> str:
        return (
            f"secure-min-group: {devices} devices of {bits} bits are left; "
            f"allowed: {self._settings.min_group} or more"
        )

    def _shares_for(self, group: _Group, number: int) -> RecordDict:
        return shares_wanted(number, group.roster, self._threshold(len(group.clients)))

    def _collect_roster(self, group: _Group) -> None:
        group.roster = roster_to_bytes(group.sums.roster())

    def _collect_sealed(self, group: _Group) -> None:
        group.sealed = {number: group.sums.sealed_for(number) for number in sorted(group.left)}

    def _reveal_for(self, group: _Group, number: int) -> RecordDict:
        return reveal_wanted(*group.sums.to_reveal())

    def _mean_of(
        self, group: _Group, total: list[np.ndarray], counted: Callable[[Declaration], int]
    ) -> ClientUpdate:
        grid, numbers = _grid_of(group), sorted(group.reports)
        if noisy := isinstance(grid, NoisyGrid):
            # How many sent something must not tell who did.
            width = self._plan.widths[group.bits]
            values, examples = grid.mean(total, width.drawn), width.clients
        else:
            values = grid.mean(total, sum(group.weights[number] for number in numbers))
            examples = sum(counted(group.clients[number]) for number in numbers)
        instructions = [self._plan.instructions[number] for number in numbers]
        content: Content = "weights"
        if instructions[0].uplink == "difference":
            content = "difference"
            held = grid.start_as_held()
            values = {name: tensor - held[name] for name, tensor in values.items()}
        members = tuple(
            Member(number, group.weights[number], instruction.dither)
            for number, instruction in zip(numbers, instructions, strict=True)
        )
        first = group.clients[numbers[0]]
        client = replace(first, num_examples=examples)
        report = _mean_report([group.reports[number] for number in numbers], examples)
        update = Update(FLOAT_BITS, content, {}, values)
        return ClientUpdate(client, update, report, 0, members, noisy)


def _grid_of(group: _Group) -> SumGrid | NoisyGrid:
    assert group.grid is not None, "its model is made before its messages"
    return group.grid


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
