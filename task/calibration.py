"""What a few unlabelled images tell about a model at a bit-width."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quant import QuantizedTensor, calibrated_rounding
from task.training import to_input

_BATCH = 128
# Values of all images that pass at once when a model is rounded; bounds the memory.
_MOST_VALUES = 2**22


@torch.no_grad()
def calibrate_normalization(model: nn.Module, pixels: np.ndarray) -> None:
    """Replace the statistics of every BatchNorm layer by those of the given images, in place.

    Quantized weights shift the distributions inside a network, so that statistics averaged over
    clients of several widths fit none of them. No labels are needed.
    """
    with _collected_statistics(model) as found:
        for part in np.array_split(pixels, -(-len(pixels) // _BATCH)) if found else ():
            model(to_input(part))


def round_weights(model: nn.Module, pixels: np.ndarray) -> dict[str, QuantizedTensor]:
    """Bring the weights of a prepared model to their grids with an eye on unlabelled images.

    The normalization behind a rounded layer uses the statistics of these images: no others fit.

    Parameters
    ----------
    model : nn.Module
        Quantization-aware model (`at_width`); changed in place.
    pixels : ndarray
        uint8 ``[n, channels, size, size]``; of very large images only the first few are used.

    Returns
    -------
    dict of str to QuantizedTensor
        By weight name.
    """
    images = to_input(pixels[: max(2, _MOST_VALUES // pixels[0].size)])
    with _collected_statistics(model):
        return calibrated_rounding(model, lambda network: network(images))


@contextmanager
def _collected_statistics(model: nn.Module) -> Iterator[bool]:
    """Let BatchNorm compute with, and average, the statistics of what passes; yield if any does."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    try:
        yield bool(layers)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
