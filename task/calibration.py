"""Calibration of a model at a bit-width with a few unlabelled examples."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import quant
from core.devices import device_of
from quant import QuantizedTensor, calibrated_rounding
from task.examples import Inputs, values_of

_BATCH = 128
# Examples that the grids of the activations are fitted to.
_ACTIVATION_EXAMPLES = 64
# Values of all examples that pass at once when a model is rounded; bounds the memory.
_MOST_VALUES = 2**22


def calibrate_activations(model: nn.Module, examples: Inputs) -> None:
    """Fit the grids of a prepared model's activations to some of the given examples, in place.

    BatchNorm uses the statistics of these meanwhile, and keeps its own.
    """
    if not len(examples):
        return
    inputs = examples.inputs(examples.spread(_ACTIVATION_EXAMPLES), device_of(model))
    with _normalized_by_batch(model, momentum=0.0):
        quant.calibrate_activations(model, lambda network: network(inputs))


@torch.no_grad()
def calibrate_normalization(model: nn.Module, examples: Inputs, most: int | None = None) -> None:
    """Replace the statistics of every BatchNorm layer by those of the given examples, in place.

    Quantized weights shift the distributions inside a network, so that statistics averaged over
    clients of several widths fit none of them. No labels are needed. Of the examples the first
    `most` are used.
    """
    index = np.arange(len(examples))[:most]
    with _collected_statistics(model) as found:
        for part in np.array_split(index, -(-len(index) // _BATCH)) if found else ():
            model(examples.inputs(part, device_of(model)))


def round_weights(model: nn.Module, examples: Inputs) -> dict[str, QuantizedTensor]:
    """Round the weights of a prepared model to their grids by GPTQ on unlabelled examples.

    The normalization behind a rounded layer uses the statistics of these: no others fit.

    Parameters
    ----------
    model : nn.Module
        Quantization-aware model (`at_width`); changed in place.
    examples : Inputs
        Of very large ones only the first few are used.

    Returns
    -------
    dict of str to QuantizedTensor
        By weight name, on the CPU.
    """
    values = values_of(examples.inputs(slice(1)))
    count = max(2, _MOST_VALUES // max(values, 1))
    inputs = examples.inputs(slice(count), device_of(model))
    with _collected_statistics(model):
        rounded = calibrated_rounding(model, lambda network: network(inputs))
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
