"""What is of the wrong kind is refused in one line that names the argument."""

import numpy as np
import pytest
import torch
from torch import nn

import quant
from quant import QuantConfig, StrictSGD, UpdateSpec, prepare

STATE = {"w": torch.ones(2, 2)}
SPEC = UpdateSpec({"w": (2, 2)}, {"w"})
NET = prepare(nn.Sequential(nn.Linear(2, 2)), QuantConfig(4))
NOISE = torch.Generator()
STRICT = {"bits": 4, "generator": NOISE, "lr": 0.1}
NO_MODEL = "model: a NoneType is not allowed: it should be a Module"


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: quant.quantize_state(None, 4, {}), "state: a NoneType is not allowed"),
        (lambda: quant.quantize_state([1], 32), "state: a list is not allowed"),
        (lambda: quant.quantize_state(STATE, 4, [1]), "scales: a list is not allowed"),
        (lambda: quant.quantize_state(STATE, 4, {"w": 1}), "scales: w: a int is not allowed"),
        (lambda: quant.quantize_fitted(None, 4, ["w"]), "state: a NoneType"),
        (lambda: quant.quantize_fitted(STATE, 4, "w"), "names: 'w' is not allowed"),
        (lambda: quant.fit_scales(STATE, ["v"], 4), "names: there is no tensor 'v'"),
        (lambda: quant.fit_scales({"w": 1}, ["w"], 4), "state: w: a int is not allowed"),
        (lambda: quant.fit_scales({"w": torch.tensor(1.0)}, ["w"], 4), "names: w is one number"),
        (lambda: quant.fixed_point(STATE, ["v"], 1.0), "names: there is no tensor 'v'"),
        (lambda: quant.quantize_difference(None, 4, NOISE, []), "difference: a NoneType"),
        (lambda: quant.quantize_difference(STATE, 4, NOISE, "w"), "names: 'w' is not allowed"),
        (lambda: UpdateSpec.of(STATE, "w"), "on_grid: 'w' is not allowed"),
        (lambda: quant.set_scales(NET, {"0.weight": 1}), "scales: 0.weight: a int is not allowed"),
        (lambda: quant.set_scales(NET, None), "scales: a NoneType"),
        (lambda: quant.load_state(NET, None), "state: a NoneType"),
        (lambda: quant.set_generator(NET, 0), "generator: a int is not allowed"),
        (lambda: StrictSGD(NET.parameters(), {}, **STRICT), "named_parameters: they are no pairs"),
        (lambda: StrictSGD(NET.named_parameters(), [1], **STRICT), "scales: a list"),
        (lambda: StrictSGD([], {}, **STRICT | {"generator": None}), "generator: a NoneType"),
        (lambda: quant.encode(STATE), "update: a dict is not allowed: it should be a Upd"),
        (lambda: quant.payload_size(STATE, 4), "spec: a dict is not allowed"),
        (lambda: quant.decode(None, SPEC, 4), "data: a NoneType"),
        (lambda: quant.decode(b"", STATE, 4), "spec: a dict is not allowed"),
        (lambda: quant.fit_scale([1.0], 4), "weight: a list is not allowed"),
        (lambda: quant.absmax_scale(torch.tensor(1.0), 8), "weight: it is one number"),
        (lambda: quant.quantize_nearest(np.ones(2), torch.ones(2), 4), "weight: a ndarray"),
        (lambda: quant.quantize_nearest(torch.ones(2), 1.0, 4), "scale: a float is not allowed"),
        (lambda: quant.quantize_stochastic([1.0], 1.0, 4, NOISE), "weight: a list"),
        (lambda: quant.dequantize([1], torch.ones(1)), "codes: a list"),
        (lambda: quant.fake_quantize(torch.ones(1), 1.0, 4), "scale: a float"),
        (lambda: quant.relevancy_mask([1.0], torch.ones(1)), "low: a list"),
        (lambda: quant.Rungs.of(None, (4, 32)), "weights: a NoneType"),
        (lambda: quant.pack(None, 4), "codes have dtype object; allowed are integers"),
        *[
            (call, NO_MODEL)
            for call in (
                lambda: prepare(None, QuantConfig(4)),
                lambda: quant.quantize_model(None, 4),
                lambda: quant.quantizable_weights(None),
                lambda: quant.unsupported_layers(None),
                lambda: quant.federated_state(None),
                lambda: quant.spec_of(None),
                lambda: quant.load_state(None, {}),
                lambda: quant.tensors_of(None, ["w"]),
                lambda: quant.set_scales(None, {}),
                lambda: quant.weight_scales(None),
                lambda: quant.refit_scales(None),
                lambda: quant.set_generator(None, NOISE),
                lambda: quant.calibrate_activations(None, print),
                lambda: quant.calibrated_rounding(None, print),
            )
        ],
    ],
)
def test_what_is_of_the_wrong_kind_is_named(call, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011 What it says is looked at below.
        call()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
