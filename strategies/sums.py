"""What a strategy sees with secure aggregation: the mean of each bit-width, as of one client."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from core.errors import SettingsError
from core.settings import Upload
from exchange.protocol import Declaration, Instruction, Report
from exchange.replies import ClientUpdate, Member, norms_of, scale_of, too_large
from exchange.round_plan import RoundLog, RoundPlan, WidthPlan
from exchange.secure_groups import SecureSettings
from exchange.secure_round import SecureRound
from exchange.states import State
from privacy.noise import MOST_CLIPS
from privacy.noisy_grid import NoisySum, movement_of
from quant import FLOAT_BITS, Update, stored_bits_of, ternary_scales
from quant.update import Content
from strategies.context import StrategyContext
from strategies.models import ModelsByWidth


class SumsByWidth(ModelsByWidth):
    """Lets the clients of each width sum their updates, by the strategy's context."""

    upload: Upload
    # Whether it needs no more than the mean over the clients of each width.
    needs_means_only = False
    # Whether it has a model for each width, which the updates of another width cannot make.
    keeps_widths_apart = False

    @classmethod
    def check(cls, options: Any, context: StrategyContext) -> None:
        """Refuse what does not go together; a strategy writes it."""

    @classmethod
    def check_all(cls, options: Any, context: StrategyContext) -> None:
        """Do `check`, and refuse secure aggregation, or merging, where it does not go together.

        Raises
        ------
        SettingsError
            As of `check`.
        """
        cls.check(options, context)
        if not (context.secure_aggregation or context.dp_clip):
            return
        if context.secure_small_groups == "merge" and cls.keeps_widths_apart:
            raise SettingsError(
                f"secure-small-groups: merge with {cls.__name__}, which has a model for each "
                "width; allowed: leave-out"
            )
        if reason := cls.why_not_secure(options, context):
            clip = f"dp-clip: {context.dp_clip:g}"
            named = "secure-aggregation: true" if context.secure_aggregation else clip
            raise SettingsError(f"{named} with {reason}")

    @classmethod
    def why_not_secure(cls, options: Any, context: StrategyContext) -> str:
        """Return with what secure aggregation does not go together; empty if all does."""
        if cls.needs_means_only:
            return ""
        return f"{cls.__name__}, which needs each client's own update; allowed: false"

    @property
    def weighs_alike(self) -> bool:
        """Whether all clients of a width count alike in its mean."""
        return self.context.weighting == "uniform"

    def counted(self, client: Declaration) -> int:
        """Return what a client counts for in its sum, by the examples that it declared."""
        raise NotImplementedError

    def _instruction_for(self, server_round: int, client: Declaration) -> Instruction:
        """Return what a client is asked, in full."""
        raise NotImplementedError

    def agree_on_keys(self, grid: Grid, plan: RoundPlan, log: RoundLog) -> SecureRound:
        """Let the clients of a round agree on keys; those that do not are taken off the plan."""
        settings = SecureSettings(
            self.context.secure_threshold,
            self.context.secure_min_group,
            self.context.secure_float_bits,
            self.context.secure_small_groups,
            self.context.round_timeout,
            self.context.low_bit_training,
            self.context.dp_clip,
            self.context.dp_noise_multiplier,
        )
        secure = SecureRound(grid, plan, log, settings)
        secure.agree(self.counted)
        return secure

    def sum_scales(self, bits: int, start: State, model: Update) -> dict[str, Tensor]:
        """Return the scales of the codes that the clients of a width sum.

        Parameters
        ----------
        bits : int
            The clients' width.
        start : dict of str to Tensor
            The model that the round begins with.
        model : Update
            The same as these clients are sent it.
        """
        if self.context.low_bit_training == "integer" and self.upload != "stored":
            return ternary_scales(start, self.on_grid(start))
        return (model if model.bits == bits else self.model_for(bits, start)).scales

    def sums_of(
        self, plan: RoundPlan, log: RoundLog, reports: list[Report]
    ) -> Iterator[ClientUpdate]:
        """Yield the mean of each width that is not out of all proportion to the model.

        Parameters
        ----------
        plan, log : RoundPlan, RoundLog
            Of the round.
        reports : list of Report
            Gets those of the clients that are in the sums.
        """
        assert plan.secure is not None, "asked of a round with secure aggregation only"
        sent = scale_of(plan.start)
        for item in plan.secure.sums(self.counted):
            bits, numbers = item.client.bits, [member.number for member in item.members]
            norms = norms_of(item.update.floats)
            # Noise is as large as it is, whatever the devices sent.
            norms["parameters"] = max(0.0, norms["parameters"] - plan.secure.noise_norm(bits))
            if large := too_large({bits: norms}, sent, self.context.norm_bound):
                log.rejected |= dict.fromkeys(numbers, large[bits])
                continue
            log.aggregated += numbers
            reports += plan.secure.reports_of(bits)
            yield item

    def plan_widths(
        self, server_round: int, plan: RoundPlan, present: Collection[Declaration]
    ) -> None:
        """Note what is fixed of each width, whoever was drawn of it, for differential privacy."""
        fraction, noise = self.context.fraction_train, self.context.dp_noise_multiplier
        for bits, count in sorted(Counter(client.bits for client in present).items()):
            client = min(
                (client for client in present if client.bits == bits),
                key=lambda client: client.partition_id,
            )
            instruction = self._instruction_for(server_round, client)
            if not self.context.secure_aggregation and count > MOST_CLIPS * noise:
                raise SettingsError(
                    f"dp-noise-multiplier: {noise:g} with {count} devices of {bits} bits; allowed: "
                    f"{count / MOST_CLIPS:.3g} or more"
                )
            plan.widths[bits] = WidthPlan(client, instruction, count, fraction * count)

    def noised(
        self, server_round: int, plan: RoundPlan, log: RoundLog, updates: Iterator[ClientUpdate]
    ) -> Iterator[ClientUpdate]:
        """Yield the mean of each width with the server's noise, as of one client.

        Also of a width that nobody was drawn of: without noise it would tell that nobody was.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        plan, log : RoundPlan, RoundLog
            Of the round.
        updates : iterator of ClientUpdate
            Of its clients.
        """
        clip, noise = self.context.dp_clip, self.context.dp_noise_multiplier
        for bits, width in plan.widths.items():
            if bits not in plan.received and (downlink := width.instruction.downlink_bits):
                model = self._encode_model(plan.start, bits, downlink)[1]
                plan.received[bits] = model.dequantize()
        sums = {bits: NoisySum(received, clip) for bits, received in plan.received.items()}
        members: dict[int, list[Member]] = {bits: [] for bits in sums}
        for item in updates:
            bits = item.client.bits
            stored_bits = stored_bits_of(bits, self.context.low_bit_training)
            sums[bits].add(movement_of(item.update, plan.received[bits], item.dither, stored_bits))
            members[bits].append(Member(item.client.partition_id, 1, item.dither))
        for bits in sorted(sums):
            if self._nobody_answered(bits, plan, log):
                continue
            width = plan.widths[bits]
            log.noise_multiplier = noise
            moved = sums.pop(bits).mean(noise, width.drawn)
            content: Content = "weights"
            if width.instruction.uplink == "difference":
                content = "difference"
            else:
                moved = {name: plan.received[bits][name] + t for name, t in moved.items()}
            # Of what devices report, nothing: it has no noise.
            report = Report(server_round, width.clients, loss=0.0, accuracy=0.0, seconds=0.0)
            update, of = Update(FLOAT_BITS, content, {}, moved), tuple(members[bits])
            yield ClientUpdate(width.client, update, report, 0, of, True, width.clients)

    def _nobody_answered(self, bits: int, plan: RoundPlan, log: RoundLog) -> bool:
        """Whether all clients of a width were asked, and failed: who answers is no secret then."""
        asked = [c.partition_id for c in plan.clients.values() if c.bits == bits]
        return self.context.fraction_train == 1 and all(number in log.failed for number in asked)
