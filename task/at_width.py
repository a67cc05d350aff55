"""A model at a bit-width, as a client of it computes: prepared, with scales, and calibrated."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.errors import SettingsError
from core.seeds import Stream, drawn_under
from core.settings import LowBitTraining, Settings
from quant import (
    FLOAT_BITS,
    QuantConfig,
    check_integer,
    fixed_point,
    prepare,
    prepare_integer,
    quantizable_weights,
    set_scales,
    unsupported_layers,
)
from task.calibration import calibrate_activations, calibrate_normalization
from task.examples import Inputs


def at_width(
    model: nn.Module,
    settings: Settings,
    bits: int,
    scales: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a float32 model that computes at a bit-width, as a client of it would.

    `scales` are those of weights that came on their grid.
    """
    model = copy.deepcopy(model)
    if bits == FLOAT_BITS:
        return model
    widths = QuantConfig(bits, settings.activation_bits_of(bits))
    return prepare_for(model, widths, settings.low_bit_training, settings.weight_step, scales)


def ready_to_evaluate(
    model: nn.Module,
    settings: Settings,
    bits: int,
    scales: Mapping[str, Tensor],
    examples: Inputs,
    device: torch.device | None = None,
) -> nn.Module:
    """Return a copy of a model at a bit-width with all that it takes from unlabelled examples.

    Parameters
    ----------
    model : nn.Module
        Float32 weights.
    settings : Settings
        Activation width and whether BatchNorm statistics are recalibrated.
    bits : int
        Width, 2 to 16, or 32.
    scales : mapping of str to Tensor
        Of weights that came on their grid.
    examples : Inputs
        The server's buffer, or a client's own.
    device : torch.device, optional
        Where the copy computes; the CPU by default.
    """
    network = at_width(model, settings, bits, scales)
    network.to(device)
    with drawn_under(settings.seed, Stream.CALIBRATION):
        calibrate_activations(network, examples)
        if settings.calibrate_normalization and len(examples) > 1:
            calibrate_normalization(network, examples, settings.server_buffer)
    return network


def prepare_for(
    model: nn.Module,
    config: QuantConfig,
    low_bit_training: LowBitTraining,
    weight_step: float,
    scales: Mapping[str, Tensor] | None,
) -> nn.Module:
    """Make a float32 model compute at a width, in place, as it is trained; return it.

    Parameters
    ----------
    model : nn.Module
        Float32 model.
    config : QuantConfig
        Widths of weights, activations and gradients.
    low_bit_training : {"qat", "strict", "integer"}
        How the model is trained.
    weight_step : float
        One step for all weights (fixed point); 0 fits each channel's.
    scales : mapping of str to Tensor or None
        Of weights that came on their grid.

    Raises
    ------
    SettingsError
        If nothing of the model computes at a low width, or not in integers.
    """
    if low_bit_training == "integer":
        check_trained_in_integers(model, type(model).__name__)
        # Its grid is that of the width, whatever the weights came on.
        return prepare_integer(model, config)
    check_quantizable(model, type(model).__name__)
    prepare(model, config)
    if weight_step:
        names = quantizable_weights(model)
        set_scales(model, fixed_point(model.state_dict(), names, weight_step))
    set_scales(model, scales or {})
    return model


def check_quantizable(model: nn.Module, name: str) -> None:
    """Refuse a model of which nothing computes at a low bit-width.

    Raises
    ------
    SettingsError
        If it has no layer that is quantized (`quant.quantizable_weights`).
    """
    if quantizable_weights(model):
        return
    kinds = {type(m).__name__ for m in model.modules() if not list(m.children())}
    left = unsupported_layers(model)
    raise SettingsError(
        f"model: {name!r} has no layer to quantize, only {', '.join(sorted(kinds)) or 'none'}; "
        f"{left[0] if left else 'none of them has weights of two or more dimensions'}"
    )


def check_trained_in_integers(model: nn.Module, name: str) -> None:
    """Refuse a model that integer training cannot train.

    Raises
    ------
    SettingsError
        If it is not built of the layers that have an integer form (`quant.check_integer`).
    """
    try:
        check_integer(model)
    except ValueError as error:
        raise SettingsError(
            f"model: {name!r} with low-bit-training integer: {error}; allowed: vgg7, or a model of "
            "your own from quant.Scaled, IntegerInput, IntegerActivation and IntegerOutput"
        ) from None
