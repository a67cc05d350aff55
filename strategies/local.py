"""Local training: no client learns from another; the baseline that a federation must beat."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from logging import WARNING
from typing import Any

from flwr.common.logger import log

from core.options import Options
from exchange.protocol import BY_BROADCAST, Declaration, Instruction
from exchange.replies import ClientUpdate
from exchange.states import State
from strategies.base import MixedPrecisionStrategy
from strategies.context import StrategyContext


class Local(MixedPrecisionStrategy):
    """Every client trains its own model, from the common start, and sends nothing but its report.

    The model travels down once, in the first round that a client takes part in; after that each
    continues from its own, which it keeps. All clients evaluate theirs; no other model exists.

    >>> Local().instruct(1, Declaration(0, 1, 4, 100, "")).uplink
    'nothing'
    """

    evaluates_on_server = False
    # No update is sent; the server evaluates no model, and calibrates none if it sends no codes.
    idle: Mapping[str, tuple[str, ...]] = {
        "norm-bound": (),
        "upload": (),
        "server-device": ("auto", "float32", "nearest"),
        "lossless-coding": ("auto", "float32"),
    }

    def __init__(
        self, options: Options | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        if 0 < (share := self.context.fraction_evaluate) < 1:
            log(WARNING, "fraction-evaluate: %g, but in local training all clients evaluate", share)
        self.context = replace(self.context, fraction_evaluate=1.0)
        self._started: set[int] = set()

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Send the model to those that have none yet."""
        downlink_bits = 0 if client.partition_id in self._started else BY_BROADCAST
        return Instruction(server_round, uplink="nothing", downlink_bits=downlink_bits)

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return which clients have begun; the models themselves stay with them."""
        return {}, {"started": sorted(self._started)}

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Take it back; a client that lost its model fails once and is sent the start again."""
        self._started = set(values["started"])

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Note which clients have begun; the common start stays as it is."""
        self._started.update(item.client.partition_id for item in updates)
        # One that failed may have lost its model: it is sent the start again, to begin from only
        # if it has.
        self._started -= self.round_log.failed.keys()
        return None
