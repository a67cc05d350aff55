"""ProWD: progressive weight dequantization and selective aggregation.

The clients of one bit-width form a group. Per round the server

1. dequantizes each group's weights to float32, rung by rung (`quant.ProgressiveDequantizer`),
2. compares each low-bit group's movement with that of the highest-bit group and masks the
   coordinates that are not relevant to it (`quant.relevancy_mask`),
3. aggregates what is left, coordinate by coordinate,

and every few rounds fine-tunes the dequantizer on the high-bit group's weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from quant import (
    FLOAT_BITS,
    FineTuning,
    GlobalReference,
    ProgressiveDequantizer,
    Reference,
    Rungs,
    StartReference,
    cosine,
    fine_tune,
    is_quantized,
    ladder_of,
    relevancy_mask,
)
from strategies.averaging import WeightedMean
from strategies.base import MixedPrecisionStrategy, State
from strategies.prowd_options import ProWDOptions, parse_ladder
from strategies.replies import ClientUpdate
from task.protocol import Declaration, Instruction
from task.seeds import derive_seed


class ProWD(MixedPrecisionStrategy):
    """Progressive weight dequantization (Yoon et al., ICML 2022) for mixed-precision federations.

    Parameters
    ----------
    options : ProWDOptions, optional
        The method's own settings.
    low_bit_training : {"qat", "strict"}
        How the low-bit clients train: it decides what the dequantizer's training pairs look like.
    predict : callable, optional
        ``f(u; w)``: logits on the server's buffer for a float32 state dict. Without it the
        distillation term is left out.
    **kwargs
        Of `MixedPrecisionStrategy`.
    """

    Options = ProWDOptions

    def __init__(
        self,
        options: ProWDOptions | None = None,
        *,
        low_bit_training: Literal["qat", "strict"] = "qat",
        predict: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.options = options or ProWDOptions()
        self.low_bit_training = low_bit_training
        self.predict = predict or self.predict
        self.dequantizer: ProgressiveDequantizer | None = None
        self._widths: set[int] = set()
        self._tuned_in = 0

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Ask for weights; send the model in float32 or on the client's grid."""
        on_grid = self.options.downlink == "client-bits"
        return Instruction(server_round, downlink_bits=client.bits if on_grid else FLOAT_BITS)

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return the dequantizer, the widths that its ladder knows, and when it was tuned."""
        values = {"widths": sorted(self._widths), "tuned-in": self._tuned_in}
        if self.dequantizer is None:
            return {}, values
        return dict(self.dequantizer.state_dict()), {**values, **self.dequantizer.arguments}

    def restore(self, tensors: State, values: Mapping[str, object]) -> None:
        """Take them back."""
        self._widths, self._tuned_in = set(values["widths"]), values["tuned-in"]
        if tensors:
            arguments = {key: values[key] for key in ("ladder", "num_features", "names")}
            self.dequantizer = ProgressiveDequantizer(**arguments, seed=0)
            self.dequantizer.load_state_dict(tensors)

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Dequantize, mask and aggregate."""
        weights = {name: t for name, t in start.items() if is_quantized(t.shape)}
        # A group's mean needs one model's memory; weights lifted one by one need all the codes.
        kept = list(updates) if self.options.dequantize == "client" else None
        groups = self._average(updates if kept is None else kept)
        if not groups:
            return None
        means = {bits: group.mean() for bits, group in groups.items()}
        reference = self._reference(weights)
        self._grow_dequantizer(weights, reference)
        if self._is_due(server_round, groups):
            self._fine_tune(server_round, groups, means, reference)
        if kept is None:
            for bits, mean in means.items():
                mean.update(self._lift(mean, bits, reference))
        else:
            lifted = self._average(kept, lambda v, bits: v | self._lift(v, bits, reference))
            means = {bits: group.mean() for bits, group in lifted.items()}
        masks = self._masks(means, start, weights)
        return self._aggregate(start, means, groups, masks)

    def _average(
        self,
        updates: Iterable[ClientUpdate],
        lift: Callable[[State, int], State] = lambda values, bits: values,
    ) -> dict[int, WeightedMean]:
        """Average the updates of each width; the widths rise."""
        groups: dict[int, WeightedMean] = {}
        for item in updates:
            bits = item.client.bits
            # The poster's 1 / N counts clients, not examples.
            literal = self.options.normalization == "clients"
            weight = 1.0 if literal else float(item.report.num_examples)
            values = lift(item.update.dequantize(), bits)
            groups.setdefault(bits, WeightedMean()).add(values, weight)
        return dict(sorted(groups.items()))

    def _lift(self, values: State, bits: int, reference: Reference) -> State:
        """Dequantize what is quantized in a model of this width."""
        quantized = {name: t for name, t in values.items() if is_quantized(t.shape)}
        with torch.no_grad():
            return self.dequantizer(quantized, bits, reference)

    def _masks(self, means: dict[int, State], start: State, weights: State) -> dict[int, State]:
        """Relevancy mask of each low-bit group, 1 where a coordinate is kept."""
        masks = {}
        *low, high = means
        high_move = _flat(means[high], start, weights)
        for bits in low:
            low_move = _flat(means[bits], start, weights)
            keep = relevancy_mask(
                low_move,
                high_move,
                at_most=self.options.mask_at_most,
                at_least=self.options.mask_at_least,
            )
            masks[bits] = _unflat(keep.float(), weights)
            self.round_log.own[f"mask-density-{bits}"] = float(keep.float().mean())
            self.round_log.own[f"cosine-{bits}"] = cosine(low_move, high_move)
            self.round_log.own[f"cosine-masked-{bits}"] = cosine(low_move * keep, high_move)
        return masks

    def _aggregate(
        self,
        start: State,
        means: dict[int, State],
        groups: dict[int, WeightedMean],
        masks: dict[int, State],
    ) -> State:
        """Selective aggregation, coordinate by coordinate."""
        high = max(groups)
        shares = {
            bits: group.weight * (1.0 if bits == high else self.options.low_bit_weight)
            for bits, group in groups.items()
        }
        by_count = self.options.normalization == "count"
        literal = self.options.aggregate == "weights"
        new = {}
        for name, anchor in start.items():
            total = torch.zeros_like(anchor)
            # The high-bit group is never masked, so that no coordinate is left without weight.
            contributed = torch.zeros_like(anchor)
            for bits, mean in means.items():
                mask = masks[bits].get(name) if bits in masks else None
                share = shares[bits] if mask is None else mask * shares[bits]
                total += (mean[name] if literal else mean[name] - anchor) * share
                contributed += share
            average = total / (contributed if by_count else sum(shares.values()))
            new[name] = average if literal else anchor + average
        return new

    def _reference(self, weights: State) -> Reference:
        kind = StartReference if self.options.reference == "client-start" else GlobalReference
        return kind(Rungs.of(weights, self._ladder()))

    def _ladder(self) -> tuple[int, ...]:
        # It only grows: a width that is away for a round keeps its rung.
        self._widths |= self.nodes.widths().keys()
        if self.options.ladder == "auto":
            return ladder_of(sorted(self._widths))
        # A width without a rung could not be lifted.
        return tuple(sorted({*parse_ladder(self.options.ladder), *self._widths}))

    def _grow_dequantizer(self, weights: State, reference: Reference) -> None:
        """Make the dequantizer, or a longer one that keeps the blocks whose rungs are the same."""
        old, ladder = self.dequantizer, reference.start.ladder
        if old is not None and old.ladder == ladder:
            return
        seed = derive_seed(self.seed, 3)
        new = ProgressiveDequantizer(ladder, reference.num_features, list(weights), seed)
        if old is not None:
            same = set(pairwise(old.ladder)) & set(pairwise(ladder))
            for bits, _ in same:
                new.blocks[str(bits)].load_state_dict(old.blocks[str(bits)].state_dict())
        self.dequantizer = new

    def _is_due(self, server_round: int, groups: Mapping[int, WeightedMean]) -> bool:
        """Whether to fine-tune: every so many rounds, or at the next that has two widths."""
        every = self.options.finetune_every
        period = (server_round - 1) // every + 1 if every else 0
        if len(groups) < 2 or period <= self._tuned_in:
            return False
        self._tuned_in = period
        return True

    def _fine_tune(
        self,
        server_round: int,
        groups: dict[int, WeightedMean],
        means: dict[int, State],
        reference: Reference,
    ) -> None:
        *low, high = groups
        state = means[high]
        in_groups = self.options.dequantize == "group"
        config = FineTuning(
            steps=self.options.finetune_steps,
            learning_rate=self.options.finetune_learning_rate,
            distill_weight=self.options.distill_weight,
            stochastic=self.low_bit_training == "strict",
            group_size=max(groups[bits].count for bits in low) if in_groups else 1,
        )
        predict = None
        if self.predict is not None:
            predict = lambda weights: self.predict({**state, **weights})  # noqa: E731
        losses = fine_tune(
            self.dequantizer,
            {n: t for n, t in state.items() if is_quantized(t.shape)},
            high,
            reference,
            config,
            predict,
            torch.Generator().manual_seed(derive_seed(self.seed, 4, server_round)),
        )
        self.round_log.own["reconstruction-loss"] = losses.reconstruction
        if losses.distill is not None:
            self.round_log.own["distill-loss"] = losses.distill


def _flat(state: State, start: State, names: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(state[n] - start[n]).flatten() for n in names])


def _unflat(flat: Tensor, like: Mapping[str, Tensor]) -> State:
    parts = flat.split([t.numel() for t in like.values()])
    return {n: part.reshape(t.shape) for (n, t), part in zip(like.items(), parts, strict=True)}
