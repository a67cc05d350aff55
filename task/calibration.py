"""Calibration of a model at a bit-width with a few unlabelled images."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import quant
from core.devices import device_of
from quant import QuantizedTensor, calibrated_rounding
from task.models import to_input

_BATCH = 128
# Images that the grids of the activations are fitted to.
_ACTIVATION_IMAGES = 64
# Values of all images that pass at once when a model is rounded; bounds the memory.
_MOST_VALUES = 2**22


def calibrate_activations(model: nn.Module, pixels: np.ndarray) -> None:
    """Fit the grids of a prepared model's activations to some of the given images, in place.

    BatchNorm uses the statistics of the images meanwhile, and keeps its own.
    """
    if not len(pixels):
        return
    # From all over, as they may be sorted by class.
    chosen = np.linspace(0, len(pixels) - 1, min(len(pixels), _ACTIVATION_IMAGES)).astype(int)
    images = to_input(pixels[chosen], device_of(model))
    with _normalized_by_batch(model, momentum=0.0):
        quant.calibrate_activations(model, lambda network: network(images))


@torch.no_grad()
def calibrate_normalization(model: nn.Module, pixels: np.ndarray) -> None:
    """Replace the statistics of every BatchNorm layer by those of the given images, in place.

    Quantized weights shift the distributions inside a network, so that statistics averaged over
    clients of several widths fit none of them. No labels are needed.
    """
    with _collected_statistics(model) as found:
        for part in np.array_split(pixels, -(-len(pixels) // _BATCH)) if found else ():
            model(to_input(part, device_of(model)))


def round_weights(model: nn.Module, pixels: np.ndarray) -> dict[str, QuantizedTensor]:
    """Round the weights of a prepared model to their grids by GPTQ on unlabelled images.

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
        By weight name, on the CPU.
    """
    images = to_input(pixels[: max(2, _MOST_VALUES // pixels[0].size)], device_of(model))
    with _collected_statistics(model):
        rounded = calibrated_rounding(model, lambda network: network(images))
    return {n: QuantizedTensor(t.codes.cpu(), t.scale.cpu()) for n, t in rounded.items()}


def has_statistics(model: nn.Module) -> bool:
    """Return whether a model has statistics that `calibrate_normalization` replaces."""
    return bool(_with_statistics(model))


def _with_statistics(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def _collected_statistics(model: nn.Module) -> Iterator[bool]:
    """Let BatchNorm compute with, and average, the statistics of what passes; yield if any does."""
    # Without a momentum they are averaged cumulatively.
    with _normalized_by_batch(model, momentum=None) as layers:
        for layer in layers:
            layer.reset_running_stats()
        yield bool(layers)


@contextmanager
def _normalized_by_batch(model: nn.Module, momentum: float | None) -> Iterator[list[_BatchNorm]]:
    """Let BatchNorm compute with the statistics of what passes; yield its layers."""
    layers = _with_statistics(model)
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.momentum = momentum
        layer.train()
    try:
        yield layers
    finally:
        for layer, kept in zip(layers, momenta, strict=True):
            layer.momentum = kept
        model.eval()
