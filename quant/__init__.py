"""Quantization for mixed-precision federations: grids, packing, layers, dequantizer, masks.

Tensors and bytes in, tensors and bytes out; nothing here knows of Flower.
"""

from core.bits import ALLOWED_WIDTHS, FLOAT_BITS, MAX_BITS, MIN_BITS, check_bits, is_width
from quant.alignment import add_drift, level_drift
from quant.codec.bounds import squares_at_most
from quant.codec.device_packing import pack_tensor
from quant.codec.flat import FlatUpdate, UpdateSum
from quant.codec.model_file import ModelFileError, PackedModel, load_model
from quant.codec.packing import PackingError, pack, packed_size, unpack
from quant.codec.reading import OpenedUpdate, UpdateError, decode_update, open_update
from quant.codec.wire import STYPE, encode_update, payload_size
from quant.dequantizer.finetuning import FineTuning, Losses, fine_tune
from quant.dequantizer.ladder import (
    GlobalReference,
    ProgressiveDequantizer,
    Reference,
    Rungs,
    StartReference,
    ladder_of,
)
from quant.grid import (
    NonFiniteError,
    ScaleError,
    absmax_scale,
    dequantize,
    fake_quantize,
    fit_scale,
    is_finite,
    largest_code,
    mse_scale,
    quantize_nearest,
    quantize_stochastic,
)
from quant.lowbit.eager import SGD
from quant.lowbit.strict_sgd import StrictSGD
from quant.qat.layers import (
    QuantConfig,
    QuantConv2d,
    QuantLinear,
    calibrate_activations,
    federated_state,
    layers_by_weight,
    load_state,
    prepare,
    quantizable_weights,
    quantize_model,
    quantized_layers,
    refit_scales,
    set_generator,
    set_scales,
    spec_of,
    tensors_of,
    watched_inputs,
    weight_scales,
)
from quant.qat.rounding import calibrated_rounding
from quant.relevancy import cosine, relevancy_mask
from quant.update import (
    QuantizedTensor,
    Update,
    UpdateSpec,
    fit_scales,
    fixed_point,
    is_statistic,
    is_variance,
    quantize_difference,
    quantize_fitted,
    quantize_state,
)

__all__ = [
    "ALLOWED_WIDTHS",
    "FLOAT_BITS",
    "MAX_BITS",
    "MIN_BITS",
    "SGD",
    "STYPE",
    "FineTuning",
    "FlatUpdate",
    "GlobalReference",
    "Losses",
    "ModelFileError",
    "NonFiniteError",
    "OpenedUpdate",
    "PackedModel",
    "PackingError",
    "ProgressiveDequantizer",
    "QuantConfig",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedTensor",
    "Reference",
    "Rungs",
    "ScaleError",
    "StartReference",
    "StrictSGD",
    "Update",
    "UpdateError",
    "UpdateSpec",
    "UpdateSum",
    "absmax_scale",
    "add_drift",
    "calibrate_activations",
    "calibrated_rounding",
    "check_bits",
    "cosine",
    "decode_update",
    "dequantize",
    "encode_update",
    "fake_quantize",
    "federated_state",
    "fine_tune",
    "fit_scale",
    "fit_scales",
    "fixed_point",
    "is_finite",
    "is_statistic",
    "is_variance",
    "is_width",
    "ladder_of",
    "largest_code",
    "layers_by_weight",
    "level_drift",
    "load_model",
    "load_state",
    "mse_scale",
    "open_update",
    "pack",
    "pack_tensor",
    "packed_size",
    "payload_size",
    "prepare",
    "quantizable_weights",
    "quantize_difference",
    "quantize_fitted",
    "quantize_model",
    "quantize_nearest",
    "quantize_state",
    "quantize_stochastic",
    "quantized_layers",
    "refit_scales",
    "relevancy_mask",
    "set_generator",
    "set_scales",
    "spec_of",
    "squares_at_most",
    "tensors_of",
    "unpack",
    "watched_inputs",
    "weight_scales",
]
