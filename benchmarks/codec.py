"""Quantizing and packing, and the way back, against a copy of the same float32 weights."""

import numpy as np
import torch

from benchmarks.measure import Figure, ratio, report, side_by_side
from quant import absmax_scale, dequantize, pack, quantize_nearest, unpack

_ROWS, _COLUMNS, _REPEATS = 1000, 10_000, 9
_FAST_WIDTHS, _FAST_GOAL, _GOAL = (4, 8, 16), 3.0, 5.0


def main() -> None:
    """Time every width on ten million weights."""
    torch.set_num_threads(1)
    weights = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    figures: list[Figure] = []
    for bits in range(2, 17):
        figures += _width(weights, bits)
    report("codec", figures)


def _width(weights: torch.Tensor, bits: int) -> list[Figure]:
    scale = absmax_scale(weights, bits)
    packed = pack(quantize_nearest(weights, scale, bits).numpy(), bits)
    copy, back = np.empty(weights.shape, np.float32), torch.empty(weights.shape)

    def unpack_and_dequantize() -> None:
        codes = torch.from_numpy(unpack(packed, bits, weights.numel()))
        dequantize(codes.reshape(weights.shape), scale, out=back)

    seconds = side_by_side(
        {
            "copy": lambda: np.copyto(copy, weights.numpy()),
            "there": lambda: pack(quantize_nearest(weights, scale, bits).numpy(), bits),
            "back": unpack_and_dequantize,
        },
        _REPEATS,
    )
    goal = _FAST_GOAL if bits in _FAST_WIDTHS else _GOAL
    labels = {"there": "quantize and pack", "back": "unpack and dequantize"}
    return [
        ratio(f"{bits}-bit, {label}, against a copy", seconds[way], seconds["copy"], goal)
        for way, label in labels.items()
    ]
