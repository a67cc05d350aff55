"""Bit-widths with the ways to fit a scale to them, and weights to fit it to."""

import torch

from quant import absmax_scale, fit_scale, mse_scale

WIDTHS = range(2, 17)
CLIPPED = (2, 3, 4)
FITS = [
    *((k, fit) for k in WIDTHS for fit in (absmax_scale, fit_scale)),
    *((k, mse_scale) for k in CLIPPED),
]


def weights(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
