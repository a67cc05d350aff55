"""The progressive dequantizer: low-bit weights to float32, one trained block per rung of a ladder.

A block maps a weight on rung ``pi_j`` to rung ``pi_{j+1}``. It works element by element and adds a
correction, measured in steps of the lower grid, to a base value::

    phi_j(q) = base_j(q) + step_j * MLP(features of q)

What the base and the features are is the dequantizer's `Reference`:

``GlobalReference``
    the paper's form: the base is ``q`` and the block sees the code, its scale and its layer.
``StartReference``
    the server also knows the model that the client started from, on every rung. The base is
    ``q + (start_{j+1} - start_j)``, which removes the rounding error of the start, and the block
    also sees how far the weight moved from its start and where the finer start lies in its cell.

With untrained blocks (the last layer starts at zero) the result is exactly the sum of the bases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core.arguments import check_tensors
from core.bits import FLOAT_BITS, MAX_BITS
from core.seeds import seed_torch
from quant.grid import largest_code, per_channel
from quant.update import QuantizedTensor, quantize_fitted

_HIDDEN = 16
_WEIGHTS_AT_ONCE = 500_000
_ALL = slice(None)
_GLOBAL_FEATURES = 4
_START_FEATURES = 6


def ladder_of(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the ladder for a federation: its widths, and every doubling up to 16.

    >>> ladder_of([4, 32])
    (4, 8, 16, 32)
    """
    rungs = set(widths) | {FLOAT_BITS}
    bits = min(widths)
    while bits <= MAX_BITS:
        rungs.add(bits)
        bits *= 2
    return tuple(sorted(rungs))


@dataclass(frozen=True)
class Rungs:
    """One model on every rung of the ladder.

    Attributes
    ----------
    ladder : tuple of int
        Widths, rising, the last 32.
    scales : mapping of int to mapping of str to Tensor
        Per rung below 32, the scale ``[channels]`` of each quantized tensor.
    values : mapping of int to mapping of str to Tensor
        Per rung, the tensors on that rung, as float32.

    Examples
    --------
    >>> Rungs.of({"w": torch.tensor([[1.0, 0.4]])}, (2, 32)).values[2]["w"]
    tensor([[1., 0.]])
    """

    ladder: tuple[int, ...]
    scales: Mapping[int, Mapping[str, Tensor]]
    values: Mapping[int, Mapping[str, Tensor]]

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        ladder: Sequence[int],
        known: Mapping[int, Mapping[str, QuantizedTensor]] | None = None,
    ) -> "Rungs":
        """Quantize float tensors to every rung.

        Parameters
        ----------
        weights : mapping of str to Tensor
            Float32 weights.
        ladder : sequence of int
            Widths, rising, the last 32.
        known : mapping of int to mapping of str to QuantizedTensor, optional
            The model as it already is on some rungs; on the others it is rounded to nearest.
        """
        check_tensors("weights", weights)
        ladder = tuple(ladder)
        if list(ladder) != sorted(set(ladder)) or ladder[-1] != FLOAT_BITS:
            raise ValueError(f"a ladder rises to {FLOAT_BITS}; got {ladder}")
        scales, values = {}, {FLOAT_BITS: dict(weights)}
        for bits in ladder[:-1]:
            rung = (known or {}).get(bits)
            if rung is None:
                rung = quantize_fitted(weights, bits, weights).quantized
            scales[bits] = {name: rung[name].scale for name in weights}
            values[bits] = {name: rung[name].dequantize() for name in weights}
        return cls(ladder, scales, values)

    def beginning(self, bits: int, values: Mapping[str, Tensor]) -> "Rungs":
        """Return the same model with other values on one rung, as one client rounds it there."""
        return replace(self, values={**self.values, bits: values})

    def channels(self, rows: Mapping[str, Tensor]) -> "Rungs":
        """Return the same model cut down to some output channels of each tensor."""
        scales = {b: {n: t[rows[n]] for n, t in s.items()} for b, s in self.scales.items()}
        values = {b: {n: t[rows[n]] for n, t in v.items()} for b, v in self.values.items()}
        return Rungs(self.ladder, scales, values)


@dataclass(frozen=True)
class GlobalReference:
    """Blocks that see a code, its scale and its layer only (the paper's form).

    >>> start = Rungs.of({"w": torch.tensor([[1.0, 0.4]])}, (2, 32))
    >>> GlobalReference(start).base(start.values[2]["w"], "w", 2, 32)
    tensor([[1., 0.]])
    """

    start: Rungs
    num_features = _GLOBAL_FEATURES

    def base(self, q: Tensor, name: str, low: int, high: int) -> Tensor:
        """Value that the block between rungs `low` and `high` corrects."""
        return q

    def features(
        self, q: Tensor, name: str, low: int, high: int, depth: float, rows: slice = _ALL
    ) -> Tensor:
        """Inputs of the block, ``[q.numel(), 4]``: code, magnitude, log of the step, depth.

        `q` holds the channels `rows` of the tensor `name`.
        """
        step = per_channel(self.start.scales[low][name][rows], q.ndim)
        code = q / (step * largest_code(low))
        log_step = step.log2().expand_as(q) / 8
        return torch.stack([code, code.abs(), log_step, torch.full_like(q, depth)], -1).flatten(
            0, -2
        )


@dataclass(frozen=True)
class StartReference(GlobalReference):
    """Blocks that also know the model, on every rung, from which the client started.

    >>> start = Rungs.of({"w": torch.tensor([[1.0, 0.4]])}, (2, 32))
    >>> StartReference(start).base(start.values[2]["w"], "w", 2, 32)
    tensor([[1.0000, 0.4000]])
    """

    num_features = _START_FEATURES

    def base(self, q: Tensor, name: str, low: int, high: int) -> Tensor:
        """Value that the block between rungs `low` and `high` corrects."""
        return q + (self.start.values[high][name] - self.start.values[low][name])

    def features(
        self, q: Tensor, name: str, low: int, high: int, depth: float, rows: slice = _ALL
    ) -> Tensor:
        """Inputs of the block, ``[q.numel(), 6]``: those, then movement and place in the cell."""
        step = per_channel(self.start.scales[low][name][rows], q.ndim)
        start = self.start.values[low][name][rows]
        finer = self.start.values[high][name][rows]
        moved = ((q - start) / step).clamp(-4, 4)
        place = ((finer - start) / step).clamp(-1, 1)
        known = torch.stack([moved, place], -1).flatten(0, -2)
        return torch.cat([super().features(q, name, low, high, depth, rows), known], 1)


Reference = GlobalReference | StartReference


class ProgressiveDequantizer(nn.Module):
    """A ladder of trained blocks.

    Parameters
    ----------
    ladder : sequence of int
        Widths, rising, the last 32 (`ladder_of`).
    num_features : int
        Features of the reference that it will be used with.
    names : sequence of str
        Quantized tensors of the model, in the order of its layers.
    seed : int
        Seeds the blocks' first layers; their last layers start at zero.

    Notes
    -----
    ``phi`` of the paper's section "Progressive Dequantizer".

    Examples
    --------
    >>> reference = StartReference(Rungs.of({"w": torch.tensor([[1.0, 0.4]])}, (2, 32)))
    >>> dequantizer = ProgressiveDequantizer((2, 32), reference.num_features, ["w"], seed=0)
    >>> dequantizer(reference.start.values[2], 2, reference)["w"].detach()
    tensor([[1.0000, 0.4000]])
    """

    def __init__(
        self, ladder: Sequence[int], num_features: int, names: Sequence[str], seed: int
    ) -> None:
        super().__init__()
        self.ladder = tuple(ladder)
        # All that the constructor needs but the seed.
        self.arguments = {
            "ladder": list(ladder),
            "num_features": num_features,
            "names": list(names),
        }
        self.depth = {name: i / max(len(names) - 1, 1) for i, name in enumerate(names)}
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            blocks = [_block(num_features) for _ in self.ladder[:-1]]
        self.blocks = nn.ModuleDict(
            {str(bits): block for bits, block in zip(self.ladder, blocks, strict=False)}
        )

    def step_up(
        self, values: Mapping[str, Tensor], bits: int, reference: Reference
    ) -> dict[str, Tensor]:
        """Apply the block of rung `bits`: values on that rung to values on the next."""
        high = self.ladder[self.ladder.index(bits) + 1]
        block = self.blocks[str(bits)]
        dequantized = {name: reference.base(q, name, bits, high) for name, q in values.items()}
        *_, last = block.children()
        if not torch.is_grad_enabled() and not any(p.any() for p in last.parameters()):
            return dequantized  # An untrained block adds zero, at more cost than all else.
        for name, q in values.items():
            step = per_channel(reference.start.scales[bits][name], q.ndim)
            correction = torch.cat(
                [
                    block(reference.features(part, name, bits, high, self.depth[name], rows))
                    for part, rows in _channel_chunks(q)
                ]
            )
            dequantized[name] = dequantized[name] + step * correction.reshape(q.shape)
        return dequantized

    def forward(
        self, values: Mapping[str, Tensor], bits: int, reference: Reference
    ) -> dict[str, Tensor]:
        """Dequantize float32 values on rung `bits` to rung 32, block by block.

        Parameters
        ----------
        values : mapping of str to Tensor
            Dequantized values ``codes * scale``, or the mean of several clients' values.
        bits : int
            A rung of the ladder.
        reference : Reference
            What the server knows of the start.

        Returns
        -------
        dict of str to Tensor
            Float32 weights. At 32 bits, `values` themselves.
        """
        for rung in self.ladder[self.ladder.index(bits) : -1]:
            values = self.step_up(values, rung, reference)
        return dict(values)


def _channel_chunks(q: Tensor) -> list[tuple[Tensor, slice]]:
    """Cut a tensor into runs of channels: the block's hidden layers take 40 times its memory."""
    count = max(1, _WEIGHTS_AT_ONCE * q.shape[0] // max(q.numel(), 1))
    starts = range(0, q.shape[0], count)
    return [(q[i : i + count], slice(i, i + count)) for i in starts]


def _block(num_features: int) -> nn.Sequential:
    last = nn.Linear(_HIDDEN, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(num_features, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), last
    )
