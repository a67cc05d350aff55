"""Weighted means of models, summed one client at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from exchange.replies import ClientUpdate
from quant import Update, UpdateSum


class WeightedMean:
    """Weighted mean of models in float32, summed one at a time in one model's memory."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._total: UpdateSum | None = None
        self.weight = 0.0
        self.count = 0

    def add(self, model: Mapping[str, Tensor], weight: float) -> None:
        """Add a client's float32 tensors; the same order of calls gives the same bits."""
        for name, tensor in model.items():
            self._add(name, tensor, weight)
        self.weight += weight
        self.count += 1

    def add_update(self, update: Update, weight: float) -> None:
        """Add ``update.dequantize()``, without ever having it in memory."""
        if self._total is None:
            self._total = UpdateSum(update.spec)
            for name, total in self._total.tensors().items():
                if name in self._sums:
                    total.copy_(self._sums[name])
                self._sums[name] = total
        self._total.add(update, weight)
        self.weight += weight
        self.count += 1

    def _add(self, name: str, tensor: Tensor, weight: float) -> None:
        if name in self._sums:
            self._sums[name].add_(tensor, alpha=weight)
        else:
            self._sums[name] = torch.mul(tensor, weight)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean; empty if nothing was added."""
        return {name: tensor / self.weight for name, tensor in self._sums.items()}


def mean_of(updates: Iterable[ClientUpdate]) -> dict[str, Tensor]:
    """Return the mean of what the clients sent, weighted by examples; empty if none did."""
    average = WeightedMean()
    for item in updates:
        # A client that was asked for nothing sent no tensor.
        if item.update.floats or item.update.quantized:
            average.add_update(item.update, item.report.num_examples)
    return average.mean()
