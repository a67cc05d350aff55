"""Alignment: what low-bit training does to a weight because of the level that it starts on.

A client whose weights never leave a coarse grid drifts. A weight on the outermost level can only
move inwards, and the rounding noise of every step carries the others after it; how far depends on
the level, not on the data. All low-bit clients of a round start on the same levels, so that their
average keeps the drift in full, while the high-bit clients' movement has none. Where both are at
hand the drift is seen: it is what separates the mean movements of the two groups over all weights
that start on one level. This is a block of the dequantizer in closed form: a correction of so many
steps for each level, after which the weights of a level move on average as those of the groups
above do.
"""

import torch
from torch import Tensor

from quant.grid import largest_code, per_channel
from quant.update import QuantizedTensor

# Finer grids are cut into this many runs of neighbouring levels.
_MOST_LEVELS = 15


def level_drift(moved: Tensor, target: Tensor, start: QuantizedTensor, bits: int) -> Tensor:
    """Return by how many steps ``target`` exceeds ``moved`` on each level that weights start on.

    It is the mean difference over the mean step, not the mean of their ratios: a channel of tiny
    steps, in which any movement is countless steps, shows little about the others.

    Parameters
    ----------
    moved : Tensor
        Movement of a low-bit group from its start, ``[channels, ...]``.
    target : Tensor
        Movement of the groups of higher bit-width, same shape.
    start : QuantizedTensor
        What the low-bit group started from.
    bits : int
        Its width.

    Returns
    -------
    Tensor
        Float32 ``[levels]``, in steps of the grid; 0 where no weight starts.

    Examples
    --------
    >>> start = QuantizedTensor(torch.tensor([[1, -1]], dtype=torch.int8), torch.tensor([0.5]))
    >>> level_drift(torch.tensor([[-0.25, 0.0]]), torch.zeros(1, 2), start, bits=2)
    tensor([0.0000, 0.0000, 0.5000])
    """
    level, count = _levels(start.codes, bits)
    step = per_channel(start.scale, moved.ndim).expand_as(moved)
    steps, difference = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, level, values.flatten().double())
        for values in (step, target - moved)
    )
    return torch.where(steps > 0, difference / steps, 0.0).float()


def add_drift(moved: Tensor, drift: Tensor, start: QuantizedTensor, bits: int) -> Tensor:
    """Return a movement with the drift of each weight's starting level added.

    >>> start = QuantizedTensor(torch.tensor([[1, -1]], dtype=torch.int8), torch.tensor([0.5]))
    >>> add_drift(torch.zeros(1, 2), torch.tensor([0.2, 0.0, -0.2]), start, bits=2)
    tensor([[-0.1000,  0.1000]])
    """
    level, _ = _levels(start.codes, bits)
    return moved + drift[level].reshape(moved.shape) * per_channel(start.scale, moved.ndim)


def trained_channels(moved: Tensor, start: QuantizedTensor, bits: int) -> Tensor:
    """Return which channels a low-bit group trained at all: the others have no drift.

    In an embedding these are the rows of the words that its clients have seen.

    Parameters
    ----------
    moved, start, bits
        As of `level_drift`.

    Returns
    -------
    Tensor
        Bool ``[channels]``.

    Examples
    --------
    >>> start = QuantizedTensor(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2))
    >>> trained_channels(torch.tensor([[0.0, 0.0], [0.0, 0.1]]), start, bits=4)
    tensor([False,  True])
    """
    # More than the rounding of a float32 mean leaves of codes that are all the same.
    least = per_channel(start.scale, moved.ndim) * (largest_code(bits) * 1e-6)
    return (moved.abs() > least).flatten(1).any(1)


def align_levels(
    moved: Tensor,
    start: QuantizedTensor,
    bits: int,
    target: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Take the level drift out of what a low-bit group trained.

    Parameters
    ----------
    moved, start, bits
        As of `level_drift`.
    target : Tensor, optional
        Movement of the groups of higher bit-width, from which the drift is seen.
    seen : Tensor, optional
        Drift seen last, which is taken out where there is no target.

    Returns
    -------
    tuple of Tensor
        The movement, and the drift that was taken out; None if none is known.

    Examples
    --------
    >>> start = QuantizedTensor(torch.tensor([[1, -1]], dtype=torch.int8), torch.tensor([0.5]))
    >>> align_levels(torch.tensor([[-0.25, 0.0]]), start, 2, target=torch.zeros(1, 2))[0]
    tensor([[0., 0.]])
    """
    rows = trained_channels(moved, start, bits)
    trained = QuantizedTensor(start.codes[rows], start.scale[rows])
    if target is not None:
        seen = level_drift(moved[rows], target[rows], trained, bits)
    if seen is None:
        return moved, None
    aligned = moved.clone()
    aligned[rows] = add_drift(moved[rows], seen, trained, bits)
    return aligned, seen


def _levels(codes: Tensor, bits: int) -> tuple[Tensor, int]:
    """Number the level of each weight from 0; return the numbers, flat, and how many there are."""
    most = min(largest_code(bits), _MOST_LEVELS // 2)
    level = (codes.flatten().float() * (most / largest_code(bits))).round().long() + most
    return level, 2 * most + 1
