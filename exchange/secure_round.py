"""The server's side of a round of secure aggregation: its steps, and the sums.

Before they train, the devices of each group (`exchange.secure_groups`) agree on keys; after that
the server gets masked integers only, and at the end what unmasks each group's sum, never one
device's. Whoever fails at a step is out of the round, and a group that has too few devices left is
left out as a whole.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from exchange.inbox import match_replies, receive
from exchange.protocol import Declaration, Report, plain
from exchange.replies import BadReply, ClientUpdate, Reply
from exchange.round_plan import RoundLog, RoundPlan
from exchange.secure import (
    KEYS,
    OPEN,
    REVEAL,
    SCALES,
    SECURE,
    SHARES,
    STEPS,
    keys_wanted,
    opening_wanted,
    reveal_wanted,
    scales_record,
    shares_wanted,
)
from exchange.secure_groups import Counted, Group, SecureSettings, group_of, widths_together
from privacy import (
    GroupAggregation,
    MessageError,
    NotEnoughError,
    UnmaskingError,
    roster_to_bytes,
)
from privacy.noisy_grid import NoisyGrid
from privacy.sum_grid import SumGrid
from quant import Update


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
        self._groups: list[Group] = []

    def agree(self, counted: Counted) -> None:
        """Let the devices of each group agree on keys, before any of them trains.

        Who does not is taken off the plan, and the reason noted.

        Parameters
        ----------
        counted : callable
            Examples that a device counts for.
        """
        clients = list(self._plan.clients.values())
        sizes = Counter(client.bits for client in clients)
        for widths in widths_together(sizes, self._settings):
            of_widths = [client for client in clients if client.bits in widths]
            if len(of_widths) < self._settings.min_group:
                self._leave_out(of_widths, self._too_few(len(of_widths), widths))
            else:
                self._groups.append(group_of(of_widths, self._plan, self._settings, counted))
        self._step(
            KEYS, lambda group, _: keys_wanted(group.context), GroupAggregation.take_keys, self._log
        )
        self._each(_collect_roster)
        self._step(SHARES, self._shares_for, GroupAggregation.take_shares, self._log)
        # Nobody is handed anything in a group whose step does not end well.
        self._each(lambda group: group.left and group.sums.handed_to(min(group.left)))
        self._step(OPEN, _shares_to_open, GroupAggregation.take_complaints, self._log)
        self._each(self._hear_complaints)
        for group in self._groups:
            group.begin()
        taking_part = {number for group in self._groups for number in group.left}
        for node, client in list(self._plan.clients.items()):
            if client.partition_id not in taking_part:
                del self._plan.clients[node]

    def prepare(self, bits: int, model: Update, scales: Callable[[], dict[str, Tensor]]) -> None:
        """Fix the grid of a group, from the model that its devices are sent; the widest count.

        Parameters
        ----------
        bits : int
            The width of the devices.
        model : Update
            That model.
        scales : callable
            Gives the scales of its codes, where they sum codes.
        """
        group = self._group(bits)
        if bits == group.bits:
            group.prepare(self._plan, model, scales)

    def add_to(self, content: RecordDict, client: Declaration) -> None:
        """Put what the sum needs into a message to train."""
        group = self._group(client.bits)
        grid = group.grid_made()
        content[SECURE] = group.plan_for(client.partition_id).to_record()
        content[SCALES] = scales_record(grid.scales)
        if group.is_merged and isinstance(grid, SumGrid):
            content[STEPS] = ConfigRecord(dict(grid.steps))

    def payload_bytes(self, client: Declaration) -> int:
        """Return how long a device's masked vector is."""
        return self._group(client.bits).sums.payload_bytes

    @property
    def largest_payload(self) -> int:
        """Bytes of the longest one."""
        return max((group.sums.payload_bytes for group in self._groups), default=0)

    def take(self, reply: Reply) -> None:
        """Add a device's masked vector to the sum of its group.

        Raises
        ------
        BadReply
            If it is none.
        """
        group, number = self._group(reply.client.bits), reply.client.partition_id
        try:
            group.sums.take_masked(number, reply.payload)
        except MessageError as error:
            raise BadReply(str(error)) from None
        group.reports[number] = reply.report

    def sums(self, counted: Counted) -> Iterator[ClientUpdate]:
        """Unmask each group's sum; yield its mean as if one client had sent it, by rising width."""
        for group in self._groups:
            group.left = set(group.reports)
        self._each(lambda group: group.sums.to_reveal())
        # Who fails here has sent its vector, and is in the sum all the same.
        silent = RoundLog()
        self._step(REVEAL, _reveal_for, GroupAggregation.take_revealed, silent)
        for number, reason in silent.left_out.items():
            log(WARNING, "partition %d does not reveal its shares: %s", number, reason)
        totals: dict[int, list[np.ndarray]] = {}
        self._each(lambda group: totals.update({group.bits: group.sums.total()}), few=False)
        # All are seen from here on, whatever a strategy reads of them.
        self._log.noise_multiplier = min(
            (
                group.grid.effective_noise(len(group.reports))
                for group in self._groups
                if isinstance(group.grid, NoisyGrid)
            ),
            default=None,
        )
        for group in self._groups:
            self._log.secure[str(group.bits)] = group.figures()
            yield group.mean(totals[group.bits], self._plan, counted)

    def noise_norm(self, bits: int) -> float:
        """Return the norm that the noise in the mean of a group hardly ever exceeds."""
        group = self._group(bits)
        if not isinstance(group.grid, NoisyGrid):
            return 0.0
        drawn = sum(self._plan.widths[width].drawn for width in group.widths)
        return group.grid.noise_norm(len(group.reports), drawn)

    def reports_of(self, bits: int) -> list[Report]:
        """Return the reports of the devices that are in the sum of a group, by number."""
        reports = self._group(bits).reports
        return [reports[number] for number in sorted(reports)]

    # --- the steps -------------------------------------------------------------------------------

    def _group(self, bits: int) -> Group:
        return next(group for group in self._groups if bits in group.widths)

    def _step(
        self,
        kind: str,
        content: Callable[[Group, int], RecordDict],
        take: Callable[[GroupAggregation, int, Mapping[str, object]], None],
        noted: RoundLog,
    ) -> None:
        """Ask all devices that are left one thing, and give their answers to their groups."""
        messages, clients, left = [], {}, set[int]()
        for group in self._groups:
            for number in sorted(group.left):
                clients[self._nodes[number]] = group.clients[number]
                messages.append(Message(content(group, number), self._nodes[number], kind))
        # None of it travels as an array.
        replies = receive(self._grid, [lambda: messages], self._settings.timeout, most_bytes=0)
        for client, reply in match_replies(messages, clients, replies, noted):
            record = reply.content.get(SECURE)
            given = dict(record) if isinstance(record, ConfigRecord) else {}
            try:
                take(self._group(client.bits).sums, client.partition_id, given)
                left.add(client.partition_id)
            except MessageError as error:
                noted.rejected[client.partition_id] = plain(str(error))
        for group in self._groups:
            group.left &= left

    def _each(self, do: Callable[[Group], object], few: bool = True) -> None:
        """Do what ends a step with each group, and leave out those that it fails for."""
        for group in list(self._groups):
            try:
                do(group)
            except (NotEnoughError, UnmaskingError) as error:
                reason = f"the group of {_named(group.widths)} bits is left out: {error}"
            else:
                if not few or len(group.left) >= self._settings.min_group:
                    continue
                reason = self._too_few(len(group.left), group.widths)
            self._leave_out(group.clients.values(), reason)
            self._groups.remove(group)

    def _leave_out(self, clients: Iterable[Declaration], reason: str) -> None:
        for client in clients:
            if client.partition_id not in self._log.left_out:
                self._log.rejected[client.partition_id] = plain(reason)

    def _too_few(self, devices: int, widths: list[int]) -> str:
        return (
            f"secure-min-group: {devices} devices of {_named(widths)} bits are left; "
            f"allowed: {self._settings.min_group} or more"
        )

    def _shares_for(self, group: Group, number: int) -> RecordDict:
        return shares_wanted(number, group.roster, self._settings.least(len(group.clients)))

    def _hear_complaints(self, group: Group) -> None:
        """Take those out of a group whose shares too few can open, and note who says so of whom."""
        for owner, holders in group.sums.complaints().items():
            log(WARNING, "partition %d: its shares do not open, as said by %s", owner, holders)
            self._log.complaints[str(owner)] = holders
        group.without = group.sums.without()
        for number in group.left & set(group.without):
            self._log.rejected[number] = plain(group.sums.left_out[number])
        group.left -= set(group.without)


def _collect_roster(group: Group) -> None:
    group.roster = roster_to_bytes(group.sums.roster())


def _shares_to_open(group: Group, number: int) -> RecordDict:
    return opening_wanted(group.sums.handed_to(number))


def _reveal_for(group: Group, number: int) -> RecordDict:
    return reveal_wanted(*group.sums.to_reveal())


def _named(widths: list[int]) -> str:
    return " and ".join(map(str, widths))
