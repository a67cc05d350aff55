"""How large the values of a payload are at most, without a look at its codes."""

import numpy as np

from quant.grid import largest_code
from quant.layout import layout_of
from quant.update import UpdateSpec
from quant.wire import fixed_size, parts_of


def squares_at_most(data: bytes, spec: UpdateSpec, bits: int) -> dict[str, float]:
    """Bound the sum of squares of every tensor in a payload.

    What `decode_update` would refuse may have any bound, but is not refused here.

    Parameters
    ----------
    data, spec, bits
        As of `decode_update`.

    Returns
    -------
    dict of str to float
        By tensor: that of its values if they are floats; if they are codes, that which they had if
        all of them were the largest.
    """
    layout = layout_of(spec, bits)
    if len(data) < fixed_size(layout):
        return {}
    scales, floats, _ = parts_of(data, layout)
    largest = largest_code(bits) if layout.quantized else 0
    with np.errstate(over="ignore", invalid="ignore"):
        of_codes = np.square(scales * np.float32(largest)) * layout.codes_per_scale
        squares = [
            _sums(of_codes, layout.scale_counts),
            _sums(np.square(floats), layout.float_counts),
        ]
    return dict(zip(spec.shapes, np.concatenate(squares).tolist(), strict=True))


def _sums(values: np.ndarray, counts: list[int]) -> np.ndarray:
    """Sum up consecutive parts of a flat array, in float64."""
    sizes = np.array(counts, int)
    filled = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[filled]
    sums = np.zeros(len(counts))
    if starts.size:
        sums[filled] = np.add.reduceat(values, starts, dtype=np.float64)
    return sums
