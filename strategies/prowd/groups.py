"""The clients of one bit-width in a round: what they sent and what they started from, on average.

Low-bit clients start from the float32 model, or from codes that the server sent, and send rounded
weights. How much of what is seen is rounding and how much is movement, only a look at the same
rounding of the start tells: on the scales of the update, and with its dither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exchange.replies import ClientUpdate
from exchange.states import State
from quant import FLOAT_BITS, QuantizedTensor, Update, WeightedMean, start_of


@dataclass(frozen=True)
class Rung:
    """How the clients of a width see the model that a round begins with.

    Attributes
    ----------
    bits : int
        Width of what they send.
    codes : mapping of str to QuantizedTensor
        The model on their grid, rounded as they round it if no dither is asked of them.
    code_bits : int
        Width of these.
    received : dict of str to Tensor
        What is quantized of the model as it reaches them, float32.
    stored_bits : int
        As of `quant.start_of`.
    """

    bits: int
    codes: Mapping[str, QuantizedTensor]
    code_bits: int
    received: State
    stored_bits: int = 0

    def start_of(self, item: ClientUpdate) -> State | None:
        """Return what a client started from, rounded as it rounds; None: `codes`."""
        update = item.update
        if not update.quantized:
            return self.received
        if not item.dither and self._on_same_grid(update):
            return None
        return start_of(update, self.received, item.dither, self.stored_bits).dequantize()

    def starts_of(self, item: ClientUpdate, weight: float) -> list[tuple[State | None, float]]:
        """Return what the clients of an update started from, and what each counts for."""
        if not item.members:
            return [(self.start_of(item), weight)]
        # Of a group's mean: its clients are on the grid of the codes, or each has its dither.
        if item.from_received or self.bits == FLOAT_BITS:
            return [(self.received, weight)]
        if not any(member.dither for member in item.members):
            return [(None, weight)]
        total = sum(member.weight for member in item.members)
        on_grid = Update(self.bits, "weights", self.codes, {})
        return [
            (
                start_of(on_grid, self.received, m.dither, self.stored_bits).dequantize(),
                weight * m.weight / total,
            )
            for m in item.members
        ]

    def _on_same_grid(self, update: Update) -> bool:
        return update.bits == self.code_bits and all(
            torch.equal(known.scale, update.quantized[name].scale)
            for name, known in self.codes.items()
        )


@dataclass
class Group:
    """What came from the clients of one width.

    Attributes
    ----------
    rung : Rung or None
        None for Float32 clients.
    from_start : bool
        Whether their starts are averaged too.
    moved_from : dict of str to Tensor or None
        What the differences that they send are from; None: they send weights.
    """

    rung: Rung | None
    from_start: bool
    moved_from: State | None = None
    _sent: WeightedMean = field(default_factory=WeightedMean)
    _starts: WeightedMean = field(default_factory=WeightedMean)
    # Weight of those whose start is the rung's own codes.
    _on_codes: float = 0.0

    @property
    def weight(self) -> float:
        """Sum of the weights of its clients."""
        return self._sent.weight

    @property
    def count(self) -> int:
        """Number of its clients."""
        return self._sent.count

    def add(self, item: ClientUpdate, weight: float) -> None:
        """Add a client's update."""
        self._sent.add_update(item.update, weight)
        if self.rung is None or not self.from_start or self.moved_from is not None:
            return
        for start, share in self.rung.starts_of(item, weight):
            if start is None:
                self._on_codes += share
            else:
                self._starts.add(start, share)

    def mean(self) -> State:
        """Return the mean of their models."""
        return self._moved(self._sent.mean())

    def model_of(self, item: ClientUpdate) -> State:
        """Return the model of one of them."""
        return self._moved(item.update.dequantize())

    def _moved(self, sent: State) -> State:
        if self.moved_from is None:
            return sent
        return {name: tensor + sent[name] for name, tensor in self.moved_from.items()}

    def start_of(self, item: ClientUpdate) -> State | None:
        """Return what one of them started from; None where that is the rung's own codes."""
        return None if self.rung is None else self.rung.start_of(item)

    def start(self) -> State:
        """Return the mean of what its clients started from."""
        assert self.rung is not None, "it is asked of low-bit groups only"
        if not self._starts.count:
            return dequantized(self.rung.codes)
        if self._on_codes:
            self._starts.add(dequantized(self.rung.codes), self._on_codes)
            self._on_codes = 0.0
        return self._starts.mean()


def dequantized(codes: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """Return the values of quantized tensors."""
    return {name: tensor.dequantize() for name, tensor in codes.items()}
