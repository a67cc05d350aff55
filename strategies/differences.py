"""FedPAQ, FedCOM and FedCOMGATE: quantized differences, averaged, and a step of the server."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from core.errors import SettingsError
from core.options import Options, WidthOrNone
from core.settings import Upload
from exchange.protocol import Declaration, Instruction, Report
from exchange.replies import ClientUpdate
from exchange.states import Snapshot, State
from quant import is_statistic
from strategies.base import MixedPrecisionStrategy
from strategies.context import StrategyContext
from strategies.fedavg import mean_of


class DifferenceOptions(Options):
    """Settings of the strategies that send quantized differences (`fedpaq-bits`, ...)."""

    bits: WidthOrNone = Field(
        0, description="Target bits of a difference; 0: each client's own width."
    )


class ServerStepOptions(DifferenceOptions):
    """The same, with a step size of the server (`fedcom-server-learning-rate`, ...)."""

    server_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Step size gamma with which the server applies the average difference."
    )


class FedPAQ(MixedPrecisionStrategy):
    """Periodic averaging of quantized differences (Reisizadeh et al., 2020, arXiv:1909.13014).

    Algorithm 1: a sample of the clients takes several local steps each and sends ``Q(w_i - w)``,
    ``Q`` unbiased (`quant.quantize_difference`); the server adds their mean, weighted by examples
    as in all strategies here, to its model.

    >>> FedPAQ(FedPAQ.Options(bits=4)).options.bits
    4
    """

    Options = DifferenceOptions
    options: DifferenceOptions
    needs_means_only = True

    @classmethod
    def preferred_upload(cls, low_bit_training: str) -> Upload:
        """Take the difference of the weights that clients hold."""
        return "stored"

    @property
    def server_learning_rate(self) -> float:
        """Step size with which the mean difference is applied."""
        return 1.0

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Ask for a difference at the target bits."""
        return Instruction(server_round, uplink="difference", uplink_bits=self.options.bits)

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Move the model along the mean difference."""
        step = mean_of(updates)
        if not step:
            return None
        return {
            name: tensor.add(
                step[name], alpha=1.0 if is_statistic(name) else self.server_learning_rate
            )
            for name, tensor in start.items()
        }


class FedCOM(FedPAQ):
    """Federated averaging with compression (Haddadpour et al., 2021, arXiv:2007.01154).

    Algorithm 1: as FedPAQ, and the server applies the mean with a step size of its own.

    >>> FedCOM(FedCOM.Options(bits=4, server_learning_rate=0.5)).server_learning_rate
    0.5
    """

    Options = ServerStepOptions
    options: ServerStepOptions

    @property
    def server_learning_rate(self) -> float:
        """``gamma``."""
        return self.options.server_learning_rate


class FedCOMGATE(FedCOM):
    """FedCOM with gradient tracking (Haddadpour et al., 2021, arXiv:2007.01154, Algorithm 2).

    Every client corrects its gradients by how its differences deviate from the average, and keeps
    that correction from round to round (`client_app.tracking`). Weighted by examples, the
    corrections of all clients sum to zero. That holds only while the same clients contribute to
    every round; when one fails, is rejected, joins, or lost what it kept, a new epoch begins and
    all start clean. All clients must train in every round, as in the paper.

    A client takes the average from the model that it is sent next, so that needs to be exact.

    Raises
    ------
    SettingsError
        If `fraction_train` is below 1, `broadcast` sends codes, or `optimizer` is not SGD.

    Examples
    --------
    >>> FedCOMGATE(FedCOMGATE.Options(bits=4)).server_learning_rate
    1.0
    """

    needs_means_only = False

    def __init__(
        self, options: ServerStepOptions | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        self._epoch = 1
        self._members: set[int] = set()
        self._steps = 0

    @classmethod
    def check(cls, options: ServerStepOptions, context: StrategyContext) -> None:
        """Refuse settings with which the corrections are wrong."""
        if context.fraction_train < 1:
            raise SettingsError(
                f"fraction-train: {context.fraction_train:g}, but fedcomgate's corrections need "
                "every client in every round; allowed: 1"
            )
        if context.optimizer != "sgd":
            raise SettingsError(
                f"optimizer: {context.optimizer} with fedcomgate, whose corrections are of the "
                "gradients that SGD moves by; allowed: sgd"
            )
        if context.broadcast != "float32":
            raise SettingsError(
                f"broadcast: {context.broadcast!r} with fedcomgate; its corrections need the exact "
                "model; allowed: float32"
            )

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return the epoch of tracking; the corrections themselves stay with the clients."""
        return {}, {
            "epoch": self._epoch,
            "members": sorted(self._members),
            "steps": self._steps,
        }

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Take it back; if a client has lost its correction, a new epoch begins by itself."""
        self._epoch, self._steps = values["epoch"], values["steps"]
        self._members = set(values["members"])

    def roll_back(self, before: Snapshot) -> None:
        """Begin a new epoch as well: the clients have kept what they sent in that round."""
        super().roll_back(before)
        self._begin_epoch()

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Ask for a difference, and for tracking."""
        return replace(
            super().instruct(server_round, client),
            tracking_epoch=self._epoch,
            tracking_steps=self._steps,
            server_learning_rate=self.server_learning_rate,
        )

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Move the model, and begin a new epoch if not all members contributed as they should."""
        reports: dict[int, Report] = {}
        state = super().combine(server_round, start, _noting(updates, reports))
        begins = not self._members
        kept = begins or not any(report.began_clean for report in reports.values())
        complete = begins or set(reports) == self._members
        if state is not None and kept and complete and not self.round_log.left_out:
            self._members = set(reports)
            self._steps = max(report.steps for report in reports.values())
        else:
            self._begin_epoch()
        return state

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._members = set()


def _noting(updates: Iterator[ClientUpdate], reports: dict[int, Report]) -> Iterator[ClientUpdate]:
    for item in updates:
        reports[item.client.partition_id] = item.report
        yield item
