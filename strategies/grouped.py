"""GroupedAvg: clients of one bit-width are averaged among themselves only."""

from collections.abc import Iterator, Mapping
from typing import Any

from core.options import Options
from exchange.replies import ClientUpdate
from exchange.states import State, join_states, split_states
from quant import WeightedMean
from strategies.base import MixedPrecisionStrategy
from strategies.context import StrategyContext


class GroupedAvg(MixedPrecisionStrategy):
    """One global model per bit-width: no precision is mixed, and nothing learned across widths.

    The model that the run passes from round to round is that of the highest width.

    >>> GroupedAvg().state_for(4, {"w": torch.ones(1)})
    {'w': tensor([1.])}
    """

    replaces_kept = True
    needs_means_only = True
    keeps_widths_apart = True

    def __init__(
        self, options: Options | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        self._models: dict[int, State] = {}
        self._common: State = {}

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Average each width's clients."""
        self._common = self._common or start
        averages: dict[int, WeightedMean] = {}
        for item in updates:
            average = averages.setdefault(item.client.bits, WeightedMean())
            average.add_update(item.update, item.report.num_examples)
        self._use(averages)
        return self._models[max(self._models)] if self._models else None

    def _use(self, averages: Mapping[int, WeightedMean]) -> None:
        """Make each width's model of a round's averages by width."""
        self._models |= {bits: average.mean() for bits, average in averages.items()}

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return the model of each width, and the common start."""
        models = {str(bits): model for bits, model in self._models.items()}
        return join_states({**models, "common": self._common}), {}

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Take them back."""
        models = split_states(tensors)
        self._common = models.pop("common", {})
        self._models = {int(bits): model for bits, model in models.items()}

    def state_for(self, bits: int, state: State) -> State:
        """Return the model of a width; before its clients first reported, the common start."""
        return self._models.get(bits, self._common or state)
