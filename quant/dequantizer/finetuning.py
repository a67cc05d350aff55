"""Fine-tuning of the progressive dequantizer: reconstruction of high-bit weights, and distillation.

The server makes its own training pairs. It takes the weights of the clients with the highest
bit-width, and asks what a client of every lower rung would have sent in their place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from torch.nn import functional as F

from core.arguments import check_number
from core.bits import FLOAT_BITS
from quant.dequantizer.ladder import (
    ProgressiveDequantizer,
    Reference,
    StartReference,
)
from quant.grid import dequantize, is_finite, per_channel, quantize_nearest, quantize_stochastic
from quant.lowbit.eager import Adam

# Weights that one step looks at; larger models are sampled channel by channel.
_WEIGHTS_PER_STEP = 100_000

Predict = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """How the dequantizer is trained.

    Attributes
    ----------
    steps : int
        Adam steps a call.
    learning_rate : float
        Adam's step size.
    distill_weight : float
        ``lambda`` of the paper; 0 leaves the distillation term out.
    stochastic : bool
        Whether the low-bit clients round stochastically from their quantized start (strict
        training) rather than to nearest (quantization-aware training). Matters with
        `StartReference`; `GlobalReference` has the paper's pairs, rounded to nearest.
    group_size : int
        Clients whose mean is dequantized at once; matters where they round stochastically.

    Examples
    --------
    >>> FineTuning(steps=5, distill_weight=0.0).learning_rate
    0.003
    """

    steps: int = 20
    learning_rate: float = 3e-3
    distill_weight: float = 0.1
    stochastic: bool = False
    group_size: int = 1

    def __post_init__(self) -> None:
        check_number("steps", self.steps, least=1, whole=True)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("distill_weight", self.distill_weight, least=0)
        check_number("group_size", self.group_size, least=1, whole=True)


@dataclass(frozen=True)
class Losses:
    """Mean losses over one fine-tuning.

    Attributes
    ----------
    reconstruction : float
        Mean absolute error of the blocks, in steps of the lowest grid, summed over them.
    distill : float or None
        Minus the similarity; None where left out.
    undone : bool
        Whether a loss or a weight became non-finite; the blocks are then as they were before.

    Examples
    --------
    >>> Losses(reconstruction=0.5, distill=-0.75).undone
    False
    """

    reconstruction: float
    distill: float | None
    undone: bool = False


def fine_tune(
    dequantizer: ProgressiveDequantizer,
    high: Mapping[str, Tensor],
    high_bits: int,
    reference: Reference,
    config: FineTuning,
    predict: Predict | None,
    generator: torch.Generator,
) -> Losses:
    """Train the blocks on the weights of the high-bit clients.

    Parameters
    ----------
    dequantizer : ProgressiveDequantizer
        Trained in place; left as it was if training diverges, which no later training would mend.
    high : mapping of str to Tensor
        Float32 weights of the high-bit clients (their mean), quantized tensors only.
    high_bits : int
        Bit-width of those clients. Rungs above it have no pairs and stay as they are.
    reference : Reference
        As for dequantization.
    config : FineTuning
        Steps, step size, loss weight, and how the low-bit clients round.
    predict : callable or None
        ``f(u; w)``: logits of the network on the server's buffer, given the quantized tensors.
        None leaves the distillation term out.
    generator : torch.Generator
        Seeded source of channel samples and rounding noise.

    Returns
    -------
    Losses

    Notes
    -----
    ``L = L_recon + lambda L_distill`` of the paper's section "Progressive Dequantizer". Errors
    are measured in steps of the lowest grid, so that layers of all magnitudes count alike.

    Examples
    --------
    >>> high = {"w": torch.tensor([[1.0, 0.4]])}
    >>> reference = GlobalReference(Rungs.of(high, (2, 32)))
    >>> dequantizer = ProgressiveDequantizer((2, 32), reference.num_features, ["w"], seed=0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> fine_tune(dequantizer, high, 32, reference, FineTuning(), None, generator).undone
    False
    """
    rungs = [b for b in dequantizer.ladder if b < high_bits]
    if not rungs:
        return Losses(0.0, None)
    if config.distill_weight <= 0:
        predict = None
    with torch.no_grad():
        teacher = predict(high) if predict is not None else None
    before = {name: tensor.clone() for name, tensor in dequantizer.state_dict().items()}
    optimizer = Adam(
        [p for b in rungs for p in dequantizer.blocks[str(b)].parameters()], lr=config.learning_rate
    )
    reconstruction = similarity = 0.0
    for _ in range(config.steps):
        rows = _sample_channels(high, generator)
        sampled = replace(reference, start=reference.start.channels(rows))
        target = {name: weight[rows[name]] for name, weight in high.items()}
        sent = _as_sent(target, rungs, sampled, config, generator)
        loss = _reconstruction(dequantizer, sent, target, rungs, sampled)
        reconstruction += float(loss.detach())
        if predict is not None and teacher is not None:
            dequantized = dequantizer(sent[rungs[0]], rungs[0], sampled)
            student = {n: w.index_copy(0, rows[n], dequantized[n]) for n, w in high.items()}
            alike = F.cosine_similarity(predict(student), teacher, dim=1).mean()
            similarity += float(alike.detach())
            loss = loss - config.distill_weight * alike
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = all(is_finite(parameter.detach()) for parameter in dequantizer.parameters())
    undone = not (tuned and isfinite(reconstruction + similarity))
    if undone:
        dequantizer.load_state_dict(before)
    mean_similarity = -similarity / config.steps if teacher is not None else None
    return Losses(reconstruction / config.steps, mean_similarity, undone)


def _reconstruction(
    dequantizer: ProgressiveDequantizer,
    sent: Mapping[int, Mapping[str, Tensor]],
    target: Mapping[str, Tensor],
    rungs: list[int],
    reference: Reference,
) -> Tensor:
    """``L_recon``: mean absolute error of every block, in steps of the lowest grid, summed."""
    total = torch.zeros(())
    steps = reference.start.scales[rungs[0]]
    for bits in rungs:
        dequantized = dequantizer.step_up(sent[bits], bits, reference)
        above = dequantizer.ladder[dequantizer.ladder.index(bits) + 1]
        wanted = sent.get(above, target)
        errors = [
            ((dequantized[n] - wanted[n]) / per_channel(steps[n], w.ndim)).flatten()
            for n, w in target.items()
        ]
        total = total + torch.cat(errors).abs().mean()
    return total


@torch.no_grad()
def _as_sent(
    high: Mapping[str, Tensor],
    rungs: list[int],
    reference: Reference,
    config: FineTuning,
    generator: torch.Generator,
) -> dict[int, dict[str, Tensor]]:
    """What clients on each rung would have sent, had they trained as the high-bit ones did."""
    from_start = isinstance(reference, StartReference) and config.stochastic
    start = reference.start
    sent: dict[int, dict[str, Tensor]] = {}
    for bits in rungs:
        sent[bits] = {}
        for name, weight in high.items():
            scale = start.scales[bits][name]
            if from_start:
                moved = start.values[bits][name] + (weight - start.values[FLOAT_BITS][name])
                draws = [
                    dequantize(quantize_stochastic(moved, scale, bits, generator), scale)
                    for _ in range(config.group_size)
                ]
                sent[bits][name] = torch.stack(draws).mean(0)
            else:
                sent[bits][name] = dequantize(quantize_nearest(weight, scale, bits), scale)
    return sent


def _sample_channels(high: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    share = min(1.0, _WEIGHTS_PER_STEP / sum(w.numel() for w in high.values()))
    rows = {}
    for name, weight in high.items():
        channels = weight.shape[0]
        count = max(1, round(share * channels))
        picked = torch.randperm(channels, generator=generator)[:count]
        rows[name] = picked.sort().values
    return rows
