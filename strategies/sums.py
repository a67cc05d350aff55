"""What a strategy sees with secure aggregation: the mean of each bit-width, as of one client."""

from collections.abc import Iterator
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from core.errors import SettingsError
from core.settings import Upload
from exchange.protocol import Declaration, Report
from exchange.replies import ClientUpdate, norms_of, scale_of, too_large
from exchange.round_plan import RoundLog, RoundPlan
from exchange.secure_round import SecureRound, SecureSettings
from exchange.states import State
from quant import FLOAT_BITS, Update, ternary_scales
from strategies.context import StrategyContext
from strategies.models import ModelsByWidth


class SumsByWidth(ModelsByWidth):
    """Lets the clients of each width sum their updates, by the strategy's context."""

    upload: Upload
    # Whether it needs no more than the mean over the clients of each width.
    needs_means_only = False

    @classmethod
    def check(cls, options: Any, context: StrategyContext) -> None:
        """Refuse what does not go together; a strategy writes it."""

    @classmethod
    def check_all(cls, options: Any, context: StrategyContext) -> None:
        """Do `check`, and refuse secure aggregation where a client's own update is needed.

        Raises
        ------
        SettingsError
            As of `check`.
        """
        cls.check(options, context)
        if context.secure_aggregation and (reason := cls.why_not_secure(options, context)):
            raise SettingsError(f"secure-aggregation: true with {reason}")

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

    def examples_of(self, reported: int) -> int:
        """Return what a client's examples count for; every strategy's base does."""
        raise NotImplementedError

    def agree_on_keys(self, grid: Grid, plan: RoundPlan, log: RoundLog) -> SecureRound:
        """Let the clients of a round agree on keys; those that do not are taken off the plan."""
        settings = SecureSettings(
            self.context.secure_threshold,
            self.context.secure_min_group,
            self.context.secure_float_bits,
            self.context.round_timeout,
        )
        secure = SecureRound(grid, plan, log, settings)
        secure.agree(self._counted)
        return secure

    def sum_scales(self, bits: int, start: State, model: Update) -> dict[str, Tensor]:
        """Return the scales of the grid on which the updates of a width are summed.

        Parameters
        ----------
        bits : int
            The clients' width.
        start : dict of str to Tensor
            The model that the round begins with.
        model : Update
            The same as these clients are sent it.
        """
        if bits == FLOAT_BITS:
            return {}
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
        for item in plan.secure.sums(self._counted):
            bits, numbers = item.client.bits, [member.number for member in item.members]
            norms = norms_of(item.update.floats)
            if large := too_large({bits: norms}, sent, self.context.norm_bound):
                log.rejected |= dict.fromkeys(numbers, large[bits])
                continue
            log.aggregated += numbers
            reports += plan.secure.reports_of(bits)
            yield item

    def _counted(self, client: Declaration) -> int:
        """Return what a client counts for in its sum, by the examples that it declared."""
        return 1 if self.weighs_alike else self.examples_of(client.num_examples)
