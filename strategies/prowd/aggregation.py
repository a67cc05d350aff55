"""From the groups' mean models to one: without level drift, masked, coordinate by coordinate."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.seeds import Stream, derive_seed
from exchange.states import State
from quant import WeightedMean, align_levels, cosine, relevancy_mask
from strategies.prowd.groups import Group
from strategies.prowd.options import ProWDOptions


def remove_drift(
    means: Mapping[int, State],
    start: State,
    groups: Mapping[int, Group],
    shares: Mapping[int, float],
    seen: dict[int, State],
) -> None:
    """Take the drift out of each low-bit group, seen against all groups above it, in place.

    Parameters
    ----------
    means : mapping of int to dict of str to Tensor
        Mean model of each group; the widths rise.
    start : dict of str to Tensor
        The model that the round began with.
    groups : mapping of int to Group
        The groups.
    shares : mapping of int to float
        Their weights.
    seen : dict of int to dict of str to Tensor
        Drift seen last, which a group that has none above it in this round has removed; updated.
    """
    above = WeightedMean()
    for bits in reversed(list(means)):
        target = above.mean()
        drift = seen.setdefault(bits, {})
        if (rung := groups[bits].rung) is not None:
            for name, codes in rung.codes.items():
                moved = means[bits][name] - start[name]
                towards = target[name] - start[name] if target else None
                aligned, found = align_levels(
                    moved, codes, rung.code_bits, towards, drift.get(name)
                )
                if found is not None:
                    drift[name] = found
                    means[bits][name] = start[name] + aligned
        above.add(means[bits], shares[bits])


def relevancy_masks(
    means: Mapping[int, State],
    start: State,
    names: Sequence[str],
    options: ProWDOptions,
    seed: int,
    server_round: int,
) -> tuple[dict[int, State], dict[str, object]]:
    """Make the relevancy mask of each low-bit group, 1 where a coordinate is kept.

    Parameters
    ----------
    means, start
        As of `remove_drift`.
    names : sequence of str
        The weights that low-bit clients quantize.
    options : ProWDOptions
        How much is kept.
    seed, server_round : int
        Of the run and of the round, for masks at random.

    Returns
    -------
    tuple of dict
        The masks by width, and figures of them for the record.
    """
    masks: dict[int, State] = {}
    figures: dict[str, object] = {}
    *low, high = means
    if not low or not names:
        return masks, figures
    high_move = _movement(means[high], start, names)
    for bits in low:
        low_move = _movement(means[bits], start, names)
        keep = relevancy_mask(
            low_move, high_move, at_most=options.mask_at_most, at_least=options.mask_at_least
        )
        if options.mask == "random":
            generator = torch.Generator().manual_seed(
                derive_seed(seed, Stream.MASK, server_round, bits)
            )
            keep = keep[torch.randperm(keep.numel(), generator=generator)]
        sizes = [start[name].numel() for name in names]
        parts = zip(names, keep.float().split(sizes), strict=True)
        masks[bits] = {name: part.reshape(start[name].shape) for name, part in parts}
        figures[f"mask-density-{bits}"] = float(keep.float().mean())
        if not keep.all():
            by_layer = {name: float(mask.mean()) for name, mask in masks[bits].items()}
            figures[f"mask-density-by-layer-{bits}"] = by_layer
        figures[f"cosine-{bits}"] = cosine(low_move, high_move)
        figures[f"cosine-masked-{bits}"] = cosine(low_move * keep, high_move)
    return masks, figures


def aggregate(
    start: State,
    means: Mapping[int, State],
    shares: Mapping[int, float],
    masks: Mapping[int, State],
    options: ProWDOptions,
) -> State:
    """Aggregate selectively, coordinate by coordinate.

    Parameters
    ----------
    start : dict of str to Tensor
        What is aggregated of the model that the round began with.
    means, shares
        As of `remove_drift`.
    masks : mapping of int to dict of str to Tensor
        `relevancy_masks`.
    options : ProWDOptions
        What is averaged, and by what it is divided.
    """
    by_count = options.normalization == "count"
    literal = options.aggregate == "weights"
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


def _movement(state: State, start: State, names: Sequence[str]) -> Tensor:
    return torch.cat([(state[n] - start[n]).flatten() for n in names])
