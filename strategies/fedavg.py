"""FedAvg: the mean of the clients' weights, each naively dequantized to float32."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from exchange.replies import ClientUpdate
from exchange.states import State
from quant import WeightedMean
from strategies.base import MixedPrecisionStrategy


class FedAvg(MixedPrecisionStrategy):
    """Federated averaging (McMahan et al., 2017, arXiv:1602.05629) over clients of any bit-width.

    Every client's codes are turned into the float32 values that they stand for and averaged,
    weighted by its number of examples.

    >>> FedAvg(context=StrategyContext(fraction_train=0.5)).context.fraction_train
    0.5
    """

    needs_means_only = True

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Return the mean of the clients' weights."""
        return mean_of(updates) or None


def mean_of(updates: Iterable[ClientUpdate]) -> dict[str, Tensor]:
    """Return the mean of what the clients sent, weighted by examples; empty if none did."""
    average = WeightedMean()
    for item in updates:
        # A client that was asked for nothing sent no tensor.
        if item.update.floats or item.update.quantized:
            average.add_update(item.update, item.report.num_examples)
    return average.mean()
