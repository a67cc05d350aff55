"""Quantization for mixed-precision federations: grids, packing, layers, dequantizer, masks.

Tensors and bytes in, tensors and bytes out; independent of Flower.
"""

from core.bits import ALLOWED_WIDTHS, FLOAT_BITS, MAX_BITS, MIN_BITS, check_bits, is_width
from quant.alignment import add_drift, align_levels, level_drift, trained_channels
from quant.codec.decode import (
    LARGEST_VALUE,
    Expected,
    UpdateError,
    decode,
    decode_all,
    squares_at_most,
)
from quant.codec.encode import STYPE, encode, payload_size
from quant.codec.layout import FlatUpdate, WeightedMean
from quant.codec.model_file import ModelFileError, PackedModel, load_model
from quant.codec.packing import PackingError, pack, packed_size, unpack
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
    dequantize,
    fake_quantize,
    is_finite,
    largest_code,
    quantize_nearest,
    quantize_stochastic,
)
from quant.lowbit.eager import SGD, AdamW
from quant.lowbit.integer import IntegerSGD, stored_codes, stored_state, ternary
from quant.lowbit.integer_layers import (
    INITIAL_RANGE,
    IntegerActivation,
    IntegerInput,
    IntegerOutput,
    Scaled,
    check_integer,
    prepare_integer,
    scale_gradients,
    shared_scale,
)
from quant.lowbit.strict import StrictAdamW, StrictSGD
from quant.qat.base import LayerWeight, QuantLayer
from quant.qat.config import QuantConfig
from quant.qat.inputs import calibrate_activations, watched_inputs
from quant.qat.layers import QuantConv2d, QuantLinear
from quant.qat.prepare import (
    layers_by_weight,
    prepare,
    quantized_layers,
    refit_scales,
    set_generator,
    set_scales,
    weight_scales,
)
from quant.qat.rounding import calibrated_rounding
from quant.qat.rules import LayerRule, register_layer
from quant.qat.states import (
    federated_state,
    load_state,
    quantize_model,
    spec_of,
    tensors_of,
)
from quant.qat.survey import quantizable_weights, unsupported_layers
from quant.relevancy import cosine, relevancy_mask
from quant.scales import absmax_scale, fit_scale, mse_scale
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
    without_noise,
)
from quant.upload import moved_by, start_of, stored_bits_of, ternary_scales, upload_bits

__all__ = [
    "ALLOWED_WIDTHS",
    "FLOAT_BITS",
    "INITIAL_RANGE",
    "LARGEST_VALUE",
    "MAX_BITS",
    "MIN_BITS",
    "SGD",
    "STYPE",
    "AdamW",
    "Expected",
    "FineTuning",
    "FlatUpdate",
    "GlobalReference",
    "IntegerActivation",
    "IntegerInput",
    "IntegerOutput",
    "IntegerSGD",
    "LayerRule",
    "LayerWeight",
    "Losses",
    "ModelFileError",
    "NonFiniteError",
    "PackedModel",
    "PackingError",
    "ProgressiveDequantizer",
    "QuantConfig",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantizedTensor",
    "Reference",
    "Rungs",
    "ScaleError",
    "Scaled",
    "StartReference",
    "StrictAdamW",
    "StrictSGD",
    "Update",
    "UpdateError",
    "UpdateSpec",
    "WeightedMean",
    "absmax_scale",
    "add_drift",
    "align_levels",
    "calibrate_activations",
    "calibrated_rounding",
    "check_bits",
    "check_integer",
    "cosine",
    "decode",
    "decode_all",
    "dequantize",
    "encode",
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
    "moved_by",
    "mse_scale",
    "pack",
    "packed_size",
    "payload_size",
    "prepare",
    "prepare_integer",
    "quantizable_weights",
    "quantize_difference",
    "quantize_fitted",
    "quantize_model",
    "quantize_nearest",
    "quantize_state",
    "quantize_stochastic",
    "quantized_layers",
    "refit_scales",
    "register_layer",
    "relevancy_mask",
    "scale_gradients",
    "set_generator",
    "set_scales",
    "shared_scale",
    "spec_of",
    "squares_at_most",
    "start_of",
    "stored_bits_of",
    "stored_codes",
    "stored_state",
    "tensors_of",
    "ternary",
    "ternary_scales",
    "trained_channels",
    "unpack",
    "unsupported_layers",
    "upload_bits",
    "watched_inputs",
    "weight_scales",
    "without_noise",
]
