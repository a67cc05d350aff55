"""Quantization for mixed-precision federations: grids, packing, layers, dequantizer, masks.

Tensors and bytes in, tensors and bytes out; nothing here knows of Flower.
"""

from quant.alignment import add_drift, level_drift
from quant.bounds import squares_at_most
from quant.dequantizer import (
    GlobalReference,
    ProgressiveDequantizer,
    Reference,
    Rungs,
    StartReference,
    ladder_of,
)
from quant.device_packing import pack_tensor
from quant.eager import SGD
from quant.finetuning import FineTuning, Losses, fine_tune
from quant.flat import FlatUpdate, UpdateSum
from quant.grid import (
    ALLOWED_WIDTHS,
    FLOAT_BITS,
    MAX_BITS,
    MIN_BITS,
    absmax_scale,
    check_bits,
    dequantize,
    fake_quantize,
    fit_scale,
    is_width,
    largest_code,
    mse_scale,
    quantize_nearest,
    quantize_stochastic,
)
from quant.layers import (
    QuantConfig,
    QuantConv2d,
    QuantLinear,
    calibrate_activations,
    prepare,
    quantized_layers,
    refit_scales,
    set_scales,
    weight_scales,
)
from quant.model_file import ModelFileError, PackedModel, load_model
from quant.optimizer import StrictSGD
from quant.packing import PackingError, pack, packed_size, unpack
from quant.reading import OpenedUpdate, UpdateError, decode_update, open_update
from quant.relevancy import cosine, relevancy_mask
from quant.rounding import calibrated_rounding
from quant.update import (
    QuantizedTensor,
    Update,
    UpdateSpec,
    fixed_point,
    is_quantized,
    is_statistic,
    is_variance,
    quantize_difference,
    quantize_state,
)
from quant.wire import STYPE, encode_update, payload_size

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
    "fine_tune",
    "fit_scale",
    "fixed_point",
    "is_quantized",
    "is_statistic",
    "is_variance",
    "is_width",
    "ladder_of",
    "largest_code",
    "level_drift",
    "load_model",
    "mse_scale",
    "open_update",
    "pack",
    "pack_tensor",
    "packed_size",
    "payload_size",
    "prepare",
    "quantize_difference",
    "quantize_nearest",
    "quantize_state",
    "quantize_stochastic",
    "quantized_layers",
    "refit_scales",
    "relevancy_mask",
    "set_scales",
    "squares_at_most",
    "unpack",
    "weight_scales",
]
