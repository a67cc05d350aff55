"""How large the values of a payload are at most, without a look at its codes."""

import numpy as np

from quant.codec.layout import layout_of
from quant.codec.wire import fixed_size, parts_of
from quant.grid import largest_code
from quant.update import UpdateSpec


def squares_at_most(data: bytes, spec: UpdateSpec, bits: int) -> tuple[float, float]:
    """Bound the sums of squares of a payload's values.

    What `decode_update` would refuse may have any bound, but is not refused here.

    Parameters
    ----------
    data, spec, bits
        As of `decode_update`.

    Returns
    -------
    tuple of float
        That of the parameters, where all codes count as if they were the largest, and that of
        BatchNorm's statistics.
    """
    layout = layout_of(spec, bits)
    if len(data) < fixed_size(layout):
        return 0.0, 0.0
    scales, floats, _ = parts_of(data, layout)
    starts, of_statistics = layout.kinds_of_floats
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(scales, dtype=np.float64) @ layout.codes_per_scale
        parameters = squares * largest_code(bits) ** 2 if layout.quantized else 0.0
        statistics = 0.0
        if starts.size:
            sums = np.add.reduceat(np.square(floats), starts, dtype=np.float64)
            statistics = sums[of_statistics].sum()
            parameters += sums[~of_statistics].sum()
    return float(parameters), float(statistics)
