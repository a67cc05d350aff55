"""ProWD: progressive weight dequantization and selective aggregation.

The clients of one bit-width form a group. Per round the server

1. dequantizes each group's weights to float32, rung by rung (`quant.ProgressiveDequantizer`), and
   takes out what low-bit training does to a weight because of its level (`quant.level_drift`),
2. compares each low-bit group's movement with that of the highest-bit group and masks the
   coordinates that are not relevant to it (`quant.relevancy_mask`),
3. aggregates what is left, coordinate by coordinate, while what is not quantized, normalization
   and biases, stays with each width,

and every few rounds fine-tunes the dequantizer on the high-bit group's weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from logging import WARNING
from typing import Any, cast

import torch
from flwr.common.logger import log
from torch import Tensor

from core.constructors import Broadcast
from core.seeds import Stream, client_seed, derive_seed, difference_noise, drawn_under
from core.settings import Upload
from exchange.protocol import Declaration, Instruction, Uplink
from exchange.replies import ClientUpdate
from exchange.states import State, join_states, split_states
from quant import (
    FLOAT_BITS,
    FineTuning,
    GlobalReference,
    ProgressiveDequantizer,
    Reference,
    Rungs,
    StartReference,
    Update,
    WeightedMean,
    fine_tune,
    ladder_of,
    quantize_state,
    stored_bits_of,
    ternary_scales,
    upload_bits,
    without_noise,
)
from strategies.base import MixedPrecisionStrategy
from strategies.context import Predict, StrategyContext
from strategies.prowd.aggregation import aggregate, relevancy_masks, remove_drift
from strategies.prowd.distributions import WeightDistributions
from strategies.prowd.groups import Group, Rung, dequantized
from strategies.prowd.options import FineTuningOptions, ProWDOptions, parse_ladder


class ProWD(MixedPrecisionStrategy):
    """Progressive weight dequantization (Yoon et al., ICML 2022) for mixed-precision federations.

    Parameters
    ----------
    options : ProWDOptions, optional
        The method's own settings.
    context : StrategyContext, optional
        Of it, `low_bit_training` decides what the dequantizer's training pairs look like; without
        `predict` the distillation term is left out.

    Examples
    --------
    >>> context = StrategyContext(seed=1, quantized=["conv.weight"])
    >>> ProWD(ProWDOptions(low_bit_weight=0.5), context).options.low_bit_weight
    0.5
    """

    Options: type[FineTuningOptions] = ProWDOptions
    options: ProWDOptions
    needs_means_only = True

    def __init__(
        self, options: FineTuningOptions | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        if self.context.upload is None and self.context.secure_aggregation and self._is_qat:
            # Codes of few bits are summed as they are; a difference would take fixed point.
            self.upload = "dithered"
        self.dequantizer: ProgressiveDequantizer | None = None
        self._widths: set[int] = set()
        self._tuned_in = 0
        self._drift: dict[int, State] = {}
        self._own: dict[int, State] = {}
        self._velocity: State = {}

    @classmethod
    def preferred_upload(cls, low_bit_training: str) -> Upload:
        """Send what was seen to gain: `experiments/qat.toml`, `experiments/paper.toml`."""
        by_training: dict[str, Upload] = {"qat": "stored", "integer": "dithered"}
        return by_training.get(low_bit_training, "forward")

    @classmethod
    def why_not_secure(cls, options: Any, context: StrategyContext) -> str:
        """Refuse to dequantize the weights of single clients."""
        if options.dequantize == "client":
            return "prowd-dequantize client, which needs each client's weights; allowed: group"
        return super().why_not_secure(options, context)

    @property
    def weighs_alike(self) -> bool:
        """Whether clients count alike: also where the paper's 1 / N counts clients."""
        return super().weighs_alike or self.options.normalization == "clients"

    @classmethod
    def preferred_broadcast(cls, low_bit_training: str, has_buffer: bool) -> Broadcast:
        """Let strict clients start on the server's grid; qat ones start between its levels."""
        return "calibrated" if low_bit_training == "strict" and has_buffer else "float32"

    def chosen(self) -> dict[str, str]:
        """Return broadcast and upload, and whether low-bit movements are aligned."""
        return {**super().chosen(), "prowd-align": "on" if self._aligns else "off"}

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Ask for weights; or, of qat's latent ones, for how far they moved, at the own width."""
        uplink: Uplink = "difference" if self._sends_difference(client.bits) else "weights"
        return Instruction(server_round, uplink=uplink)

    def _sends_difference(self, bits: int) -> bool:
        # The weights of other trainings lie on a grid, and cost no more.
        return self._is_qat and self.upload == "stored" and bits != FLOAT_BITS

    @property
    def _is_qat(self) -> bool:
        return self.context.low_bit_training == "qat"

    def state_for(self, bits: int, state: State) -> State:
        """Return the global weights with the normalization and biases of a width."""
        return {**state, **self._own.get(bits, {})}

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return the dequantizer, what is known of the widths, and when it was tuned."""
        values: dict[str, object] = {"widths": sorted(self._widths), "tuned-in": self._tuned_in}
        parts = {f"drift/{bits}": drift for bits, drift in self._drift.items()}
        parts |= {f"own/{bits}": own for bits, own in self._own.items()}
        if self._velocity:
            parts["velocity"] = self._velocity
        if self.dequantizer is not None:
            parts["dequantizer"] = dict(self.dequantizer.state_dict())
            values["dequantizer"] = self.dequantizer.arguments
        return join_states(parts), values

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Take them back."""
        self._widths, self._tuned_in = set(values["widths"]), values["tuned-in"]
        self.dequantizer, self._drift, self._own = None, {}, {}
        parts = split_states(tensors)
        if "dequantizer" in values:
            self.dequantizer = ProgressiveDequantizer(**values["dequantizer"], seed=0)
            # Where all clients are Float32 it has no block, and so no tensor.
            self.dequantizer.load_state_dict(parts.get("dequantizer", {}))
        self._velocity = parts.get("velocity", {})
        for path, part in parts.items():
            kind, _, bits = path.partition("/")
            if bits:
                {"drift": self._drift, "own": self._own}[kind][int(bits)] = part

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Dequantize, mask and aggregate."""
        weights = {name: start[name] for name in self._quantized(start)}
        updates = map(self._without_noise, updates)
        # A group's mean needs one model's memory; weights dequantized singly need all the codes.
        kept = list(updates) if self.options.dequantize == "client" else None
        groups = self._average(updates if kept is None else kept, start)
        if not groups:
            return None
        means = {bits: group.mean() for bits, group in groups.items()}
        seen = None
        if self.round_log.detailed and len(means) > 1:
            seen = WeightDistributions(means, weights)
        reference = self._reference(weights, groups)
        self._grow_dequantizer(weights, reference)
        if self._is_due(server_round, groups):
            self._fine_tune(server_round, groups, means, reference)
        if kept is None:
            for bits, mean in means.items():
                mean.update(self._dequantize(mean, groups[bits], reference))
        else:
            means = self._dequantize_each(kept, groups, reference)
        shares = self._shares(groups)
        if self._aligns:
            remove_drift(means, start, groups, shares, self._drift)
        if seen is not None:
            self.round_log.weights = seen.to_record(means)
        path = (self.context.seed, server_round)
        masks, figures = relevancy_masks(means, start, list(weights), self.options, *path)
        self.round_log.own |= figures
        floats, common = {}, start
        if self.options.own_normalization:
            floats, common = self._keep_own(means), weights
        aggregated = aggregate(common, means, shares, masks, self.options)
        return {**start, **aggregated, **self._step(weights, aggregated), **floats}

    def _quantized(self, state: State) -> list[str]:
        """Return which tensors low-bit clients quantize; none where only Float32 ones take part."""
        only_float = self.context.quantized is None and self._widths <= {FLOAT_BITS}
        return [] if only_float else self.on_grid(state)

    @property
    def _aligns(self) -> bool:
        """Whether low-bit movements are aligned; by itself only where that was seen to gain."""
        if self.options.align == "auto":
            return self.context.low_bit_training == "strict"
        return self.options.align == "on"

    def _weight_of(self, item: ClientUpdate) -> float:
        # The 1 / N of the paper ("Selective Weight Aggregation") counts clients, not examples.
        literal = self.options.normalization == "clients"
        return float(item.count if literal else item.report.num_examples)

    def _average(self, updates: Iterable[ClientUpdate], start: State) -> dict[int, Group]:
        """Average the updates of each width; the widths rise."""
        groups: dict[int, Group] = {}
        from_start = self.options.reference == "client-start"
        for item in updates:
            bits = item.client.bits
            if bits not in groups:
                of_differences = self._sends_difference(bits)
                moved_from = self.state_at(bits, start) if of_differences else None
                groups[bits] = Group(self._rung(bits, start), from_start, moved_from)
            groups[bits].add(item, self._weight_of(item))
        return dict(sorted(groups.items()))

    def _without_noise(self, item: ClientUpdate) -> ClientUpdate:
        """Subtract the noise that a client's difference was rounded with: the run's seed tells."""
        if item.update.content != "difference" or not item.update.quantized or item.members:
            return item
        seed = client_seed(self.context.seed, item.report.server_round, item.client.partition_id)
        moved = without_noise(item.update, difference_noise(seed))
        return replace(item, update=Update(FLOAT_BITS, "difference", {}, moved))

    def _rung(self, bits: int, start: State) -> Rung | None:
        """Return how clients of a width see the model that the round began with."""
        if bits == FLOAT_BITS:
            return None
        model, training = self.model_for(bits, start), self.context.low_bit_training
        codes, code_bits = model.quantized, bits
        sent_bits = upload_bits(bits, training, self.upload)
        if training == "integer" and self.upload != "stored":
            held, code_bits = dequantized(codes), sent_bits
            codes = quantize_state(held, code_bits, ternary_scales(held, held)).quantized
        as_floats = self.context.broadcast == "float32"
        received = self.state_at(bits, start) if as_floats else dequantized(model.quantized)
        received = {name: received[name] for name in codes}
        return Rung(sent_bits, codes, code_bits, received, stored_bits_of(bits, training))

    def _dequantize(self, values: State, group: Group, reference: Reference) -> State:
        """Dequantize what is quantized in the mean model of a group."""
        bits, start = FLOAT_BITS, None
        if group.rung is not None:
            bits, start = group.rung.bits, group.start()
        return self._to_float32(values, bits, start, reference)

    def _dequantize_each(
        self, kept: Iterable[ClientUpdate], groups: Mapping[int, Group], reference: Reference
    ) -> dict[int, State]:
        """Dequantize the model of every client; return the mean of each group."""
        averaged = {bits: WeightedMean() for bits in groups}
        for item in kept:
            group = groups[item.client.bits]
            values, bits = group.model_of(item), FLOAT_BITS
            if group.rung is not None:
                bits = group.rung.bits
            values |= self._to_float32(values, bits, group.start_of(item), reference)
            averaged[item.client.bits].add(values, self._weight_of(item))
        return {bits: mean.mean() for bits, mean in averaged.items()}

    def _to_float32(
        self, values: State, bits: int, start: State | None, reference: Reference
    ) -> State:
        """Dequantize values on a rung, of clients that started from values on that rung."""
        assert self.dequantizer is not None, "it is grown before anything is dequantized"
        if start is not None and bits != FLOAT_BITS:
            reference = replace(reference, start=reference.start.beginning(bits, start))
        quantized = {name: values[name] for name in self._quantized(values)}
        with torch.no_grad():
            return cast(State, self.dequantizer(quantized, bits, reference))

    def _step(self, weights: State, aggregated: State) -> State:
        """Apply the movement of the weights with the server's step size and momentum.

        Momentum as in FedAvgM (Hsu et al., 2019, arXiv:1909.06335).
        """
        rate, momentum = self.options.server_learning_rate, self.options.server_momentum
        if rate == 1 and not momentum:
            return {}
        moved = {name: aggregated[name] - tensor for name, tensor in weights.items()}
        if momentum:
            for name, velocity in self._velocity.items():
                moved[name].add_(velocity, alpha=momentum)
            self._velocity = moved
        return {name: tensor.add(moved[name], alpha=rate) for name, tensor in weights.items()}

    def _keep_own(self, means: Mapping[int, State]) -> State:
        """Keep what is not quantized for each width; return that of the widest."""
        for bits, mean in means.items():
            on_grid = self._quantized(mean)
            self._own[bits] = {name: t for name, t in mean.items() if name not in on_grid}
        return self._own.get(max(self._widths), {})

    def _shares(self, groups: Mapping[int, Group]) -> dict[int, float]:
        """Weight of each group in the aggregate."""
        high = max(groups)
        return {
            bits: group.weight * (1.0 if bits == high else self.options.low_bit_weight)
            for bits, group in groups.items()
        }

    def _reference(self, weights: State, groups: Mapping[int, Group]) -> Reference:
        kind = StartReference if self.options.reference == "client-start" else GlobalReference
        known = {g.rung.bits: g.rung.codes for g in groups.values() if g.rung is not None}
        return kind(Rungs.of(weights, self._ladder(groups), known))

    def _ladder(self, widths: Iterable[int]) -> tuple[int, ...]:
        # It only grows: a width that is away for a round keeps its rung.
        self._widths |= {*widths, *self.nodes.widths()}
        training = self.context.low_bit_training
        rungs = {upload_bits(bits, training, self.upload) for bits in self._widths}
        if self.options.ladder == "auto":
            return ladder_of(sorted(rungs))
        # A width without a rung could not be dequantized.
        return tuple(sorted({*parse_ladder(self.options.ladder), *rungs}))

    def _grow_dequantizer(self, weights: State, reference: Reference) -> None:
        """Make the dequantizer, or a longer one that keeps the blocks whose rungs are the same."""
        old, ladder = self.dequantizer, reference.start.ladder
        if old is not None and old.ladder == ladder:
            return
        seed = derive_seed(self.context.seed, Stream.DEQUANTIZER)
        new = ProgressiveDequantizer(ladder, reference.num_features, list(weights), seed)
        if old is not None:
            same = set(pairwise(old.ladder)) & set(pairwise(ladder))
            for bits, _ in same:
                new.blocks[str(bits)].load_state_dict(old.blocks[str(bits)].state_dict())
        self.dequantizer = new

    def _is_due(self, server_round: int, groups: Mapping[int, Group]) -> bool:
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
        groups: Mapping[int, Group],
        means: dict[int, State],
        reference: Reference,
    ) -> None:
        assert self.dequantizer is not None, "it is grown before it is tuned"
        *low, high = groups
        state = means[high]
        in_groups = self.options.dequantize == "group"
        config = FineTuning(
            steps=self.options.finetune_steps,
            learning_rate=self.options.finetune_learning_rate,
            distill_weight=self.options.distill_weight,
            stochastic=self._rounds_at_random,
            group_size=max(groups[bits].count for bits in low) if in_groups else 1,
        )
        losses = fine_tune(
            self.dequantizer,
            {name: state[name] for name in self._quantized(state)},
            high,
            reference,
            config,
            self._predicting(server_round, state),
            torch.Generator().manual_seed(
                derive_seed(self.context.seed, Stream.FINE_TUNING, server_round)
            ),
        )
        if losses.undone:
            log(WARNING, "Round %d: fine-tuning diverged and is undone", server_round)
            self.round_log.own["finetuning-undone"] = 1
            return
        self.round_log.own["reconstruction-loss"] = losses.reconstruction
        if losses.distill is not None:
            self.round_log.own["distill-loss"] = losses.distill

    @property
    def _rounds_at_random(self) -> bool:
        """Whether what low-bit clients send was rounded stochastically, in training or after it."""
        if self.upload == "dithered" or self.context.low_bit_training == "strict":
            return True
        return self.context.low_bit_training == "integer" and self.upload == "stored"

    def _predicting(self, server_round: int, state: State) -> Predict | None:
        """Return ``f(u; w)`` with all else of a model as it is: in a round one mask of dropout."""
        predict = self.context.predict
        if predict is None:
            return None

        def predicted(weights: Mapping[str, Tensor]) -> Tensor:
            with drawn_under(self.context.seed, Stream.DISTILLATION, server_round):
                return predict({**state, **weights})

        return predicted
