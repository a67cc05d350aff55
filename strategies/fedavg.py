"""FedAvg: the mean of the clients' weights, each naively dequantized to float32."""

from collections.abc import Iterator

from exchange.averaging import mean_of
from exchange.replies import ClientUpdate
from exchange.states import State
from strategies.base import MixedPrecisionStrategy


class FedAvg(MixedPrecisionStrategy):
    """Federated averaging (McMahan et al., 2017, arXiv:1602.05629) over clients of any bit-width.

    Every client's codes are turned into the float32 values that they stand for and averaged,
    weighted by its number of examples.
    """

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Return the mean of the clients' weights."""
        return mean_of(updates) or None
