"""ProWD: progressive weight dequantization and selective aggregation.

The clients of one bit-width form a group. Per round the server

1. dequantizes each group's weights to float32, rung by rung (`quant.ProgressiveDequantizer`),
2. compares each low-bit group's movement with that of the highest-bit group and masks the
   coordinates that are not relevant to it (`quant.relevancy_mask`),
3. aggregates what is left, coordinate by coordinate,

and every few rounds fine-tunes the dequantizer on the high-bit group's weights.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from quant import (
    FLOAT_BITS,
    MAX_BITS,
    MIN_BITS,
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
from strategies.replies import ClientUpdate
from task.errors import SettingsError
from task.options import Options
from task.protocol import Declaration, Instruction
from task.seeds import derive_seed

Share = Annotated[float, Field(ge=0, le=1)]


class ProWDOptions(Options):
    """ProWD's own settings (`prowd-...`).

    The poster's literal form is ``reference="global", dequantize="client", mask_at_most=tau,
    mask_at_least=0, normalization="clients", aggregate="weights", low_bit_weight=1``.
    """

    reference: Literal["client-start", "global"] = Field(
        "client-start",
        description="What a low-bit client's movement is measured from: the quantized model that "
        "it started from, or the float32 global model.",
    )
    ladder: str = Field(
        "auto", description="Rungs of the dequantizer, as in 4,8,16,32; auto: from the widths."
    )
    dequantize: Literal["group", "client"] = Field(
        "group", description="Lift the mean of a group, or each client's weights."
    )
    downlink: Literal["float32", "client-bits"] = Field(
        "float32", description="Send every client the float32 model, or its own grid's codes."
    )
    finetune_every: Annotated[int, Field(ge=0)] = Field(
        5, description="Rounds between fine-tunings of the dequantizer; 0: never trained."
    )
    finetune_steps: Annotated[int, Field(ge=1)] = Field(20, description="Steps of a fine-tuning.")
    finetune_learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.003, description="Step size of a fine-tuning."
    )
    distill_weight: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Weight lambda of the distillation loss."
    )
    mask_at_most: Share = Field(1.0, description="tau: largest share of coordinates kept.")
    mask_at_least: Share = Field(0.9, description="Smallest share of coordinates kept.")
    low_bit_weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="Weight of a low-bit example against a high-bit one."
    )
    normalization: Literal["count", "clients"] = Field(
        "count",
        description="Divide each coordinate by the clients that contribute to it, or by all.",
    )
    aggregate: Literal["differences", "weights"] = Field(
        "differences", description="Mask and average movements, or weights."
    )

    @field_validator("ladder")
    @classmethod
    def _ladder_rises(cls, value: str) -> str:
        if value != "auto":
            parse_ladder(value)
        return value

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ProWDOptions":
        if self.mask_at_least > self.mask_at_most:
            raise SettingsError(
                f"prowd-mask-at-least: {self.mask_at_least:g} is above prowd-mask-at-most "
                f"{self.mask_at_most:g}"
            )
        return self


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
        self.predict = predict
        self.dequantizer: ProgressiveDequantizer | None = None

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Ask for weights; send the model in float32 or on the client's grid."""
        on_grid = self.options.downlink == "client-bits"
        return Instruction(server_round, downlink_bits=client.bits if on_grid else FLOAT_BITS)

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Dequantize, mask and aggregate."""
        weights = {name: t for name, t in start.items() if is_quantized(t.shape)}
        reference = self._reference(weights)
        dequantizer = self._dequantizer(weights, reference)
        groups = self._collect(updates, dequantizer, reference)
        if not groups:
            return None
        high = max(groups)
        means = {bits: group.mean() for bits, group in groups.items()}
        every = self.options.finetune_every
        if every and (server_round - 1) % every == 0 and min(groups) < high:
            self._fine_tune(server_round, groups, means, reference)
        if self.options.dequantize == "group":
            for bits, mean in means.items():
                mean.update(self._lift({n: mean[n] for n in weights}, bits, reference))
        masks = self._masks(means, high, start, weights)
        return self._aggregate(start, means, groups, masks, high)

    def _collect(
        self,
        updates: Iterator[ClientUpdate],
        dequantizer: ProgressiveDequantizer,
        reference: Reference,
    ) -> dict[int, WeightedMean]:
        """Sum the updates of each width; one model's memory a width."""
        groups: dict[int, WeightedMean] = {}
        for item in updates:
            values = item.update.dequantize()
            bits = item.client.bits
            if self.options.dequantize == "client":
                quantized = {n: t for n, t in values.items() if is_quantized(t.shape)}
                values |= self._lift(quantized, bits, reference)
            groups.setdefault(bits, WeightedMean()).add(values, item.report.num_examples)
        return dict(sorted(groups.items()))

    def _lift(self, values: State, bits: int, reference: Reference) -> State:
        with torch.no_grad():
            return self.dequantizer(values, bits, reference)

    def _masks(
        self, means: dict[int, State], high: int, start: State, weights: State
    ) -> dict[int, State]:
        """Relevancy mask of each low-bit group, 1 where a coordinate is kept."""
        masks = {}
        high_move = _flat(means[high], start, weights)
        for bits in means:
            if bits == high:
                continue
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
        high: int,
    ) -> State:
        """Selective aggregation, coordinate by coordinate."""
        shares = {
            bits: group.weight * (1.0 if bits == high else self.options.low_bit_weight)
            for bits, group in groups.items()
        }
        total = sum(shares.values())
        literal = self.options.aggregate == "weights"
        new = {}
        for name, anchor in start.items():
            moved, contributed = torch.zeros_like(anchor), torch.zeros_like(anchor)
            for bits, mean in means.items():
                mask = masks[bits].get(name) if bits in masks else None
                share = shares[bits] if mask is None else mask * shares[bits]
                moved += (mean[name] if literal else mean[name] - anchor) * share
                contributed += share
            if self.options.normalization == "clients":
                contributed = torch.full_like(anchor, total)
            step = torch.where(contributed > 0, moved / contributed.clamp(min=1e-12), 0.0)
            new[name] = step if literal else anchor + step
        return new

    def _reference(self, weights: State) -> Reference:
        kind = StartReference if self.options.reference == "client-start" else GlobalReference
        return kind(Rungs.of(weights, self._ladder()))

    def _ladder(self) -> tuple[int, ...]:
        widths = list(self.nodes.widths()) or [FLOAT_BITS]
        if self.options.ladder == "auto":
            return ladder_of(widths)
        # A width without a rung could not be lifted.
        return tuple(sorted({*parse_ladder(self.options.ladder), *widths}))

    def _dequantizer(self, weights: State, reference: Reference) -> ProgressiveDequantizer:
        ladder = reference.start.ladder
        if self.dequantizer is None or self.dequantizer.ladder != ladder:
            self.dequantizer = ProgressiveDequantizer(
                ladder, reference.num_features, list(weights), derive_seed(self.seed, 3)
            )
        return self.dequantizer

    def _fine_tune(
        self,
        server_round: int,
        groups: dict[int, WeightedMean],
        means: dict[int, State],
        reference: Reference,
    ) -> None:
        high = max(groups)
        state = means[high]
        in_groups = self.options.dequantize == "group"
        low_counts = [group.count for bits, group in groups.items() if bits != high]
        losses = fine_tune(
            self.dequantizer,
            {n: t for n, t in state.items() if is_quantized(t.shape)},
            high,
            reference,
            FineTuning(
                steps=self.options.finetune_steps,
                learning_rate=self.options.finetune_learning_rate,
                distill_weight=self.options.distill_weight,
                stochastic=self.low_bit_training == "strict",
                group_size=max(low_counts) if in_groups else 1,
            ),
            self.predict and (lambda weights: self.predict({**state, **weights})),
            torch.Generator().manual_seed(derive_seed(self.seed, 4, server_round)),
        )
        self.round_log.own["reconstruction-loss"] = losses.reconstruction
        if losses.distill is not None:
            self.round_log.own["distill-loss"] = losses.distill


def parse_ladder(text: str) -> tuple[int, ...]:
    """Read ``"4,8,16,32"``.

    Raises
    ------
    ValueError
        If the widths do not rise, do not end at 32, or are none that exist.
    """
    try:
        ladder = tuple(int(part) for part in text.split(","))
    except ValueError:
        ladder = ()
    valid = all(MIN_BITS <= bits <= MAX_BITS for bits in ladder[:-1]) and ladder[-1:] == (
        FLOAT_BITS,
    )
    if not valid or list(ladder) != sorted(set(ladder)):
        raise ValueError(
            f"a ladder is auto, or rising widths of {MIN_BITS} to {MAX_BITS} and then "
            f"{FLOAT_BITS}, as in 4,8,16,32"
        )
    return ladder


def _flat(state: State, start: State, names: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(state[n] - start[n]).flatten() for n in names])


def _unflat(flat: Tensor, like: Mapping[str, Tensor]) -> State:
    parts = flat.split([t.numel() for t in like.values()])
    return {n: part.reshape(t.shape) for (n, t), part in zip(like.items(), parts, strict=True)}
