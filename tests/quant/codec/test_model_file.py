"""The packed file: what comes out is what went in, to the bit; anything else is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from federation import assert_same_update
from layer_cases import made, tensors_in
from measuring import peak_memory
from safetensors.torch import load_file
from torch import nn

from core.tensor_files import read_tensors, to_bytes
from quant import (
    ModelFileError,
    PackedModel,
    QuantConfig,
    calibrate_activations,
    load_model,
    prepare,
    quantized_layers,
)

ABOUT = {
    "name": "small",
    "channels": 1,
    "size": 6,
    "num_classes": 3,
    "pixel_scale": 4 / 255,
    "pixel_offset": -2.0,
}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6), dtype=np.uint8)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    )


def network_of(bits, activation_bits=None, grids=True):
    """A network as a client of a width has it, BatchNorm with statistics of its own."""
    model = small()
    model(torch.randn(8, 1, 6, 6))
    model.eval()
    if bits != 32:
        prepare(model, QuantConfig(bits, activation_bits or bits))
        if grids:
            calibrate_activations(model, lambda network: network(torch.randn(16, 1, 6, 6)))
    return model


def packed_of(bits, **kwargs):
    return PackedModel.of(network_of(bits, **kwargs), **ABOUT)


def saved(packed, path):
    path.write_bytes(packed.to_bytes())
    return path


def parts(packed, tmp_path):
    """Head and arrays of a file."""
    head, tensors = read_tensors(saved(packed, tmp_path / "whole"))
    return head, {name: tensor.numpy() for name, tensor in tensors.items()}


def load_altered(head, arrays, tmp_path):
    """Load a file whose checksum fits, as an attacker would write it."""
    path = tmp_path / "altered"
    path.write_bytes(to_bytes(head, arrays))
    return load_model(path)


@torch.no_grad()
def logits(network, packed):
    return network(packed.to_input(PIXELS))


@pytest.mark.parametrize("bits", [*range(2, 17), 32])
def test_a_loaded_network_computes_the_same_to_the_bit(tmp_path, bits):
    network = network_of(bits)
    packed = PackedModel.of(network, **ABOUT)
    loaded = load_model(saved(packed, tmp_path / "model"))
    assert_same_update(loaded.update, packed.update)
    assert replace(loaded, update=packed.update) == packed
    assert loaded.bits == bits
    again = loaded.network(small(seed=1))
    x = torch.from_numpy(PIXELS).float() * (4 / 255) - 2
    with torch.no_grad():
        torch.testing.assert_close(logits(again, loaded), network(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(again, loaded), logits(network, packed))
    # Twice the same bytes.
    assert loaded.to_bytes() == packed.to_bytes()


@pytest.mark.parametrize(("activation_bits", "grids"), [(32, True), (6, True), (4, False)])
def test_activations_have_their_own_width(activation_bits, grids, tmp_path):
    network = network_of(4, activation_bits, grids)
    packed = PackedModel.of(network, **ABOUT)
    loaded = load_model(saved(packed, tmp_path / "model")).network(small(seed=1))
    assert torch.equal(logits(loaded, packed), logits(network, packed))
    for name, layer in quantized_layers(loaded):
        assert layer.config == QuantConfig(4, activation_bits)
        assert (layer.input_grid is None) == (activation_bits == 32 or not grids)
        assert layer.input_grid == packed.grids.get(name)


def test_latent_weights_are_packed_as_the_layer_rounds_them():
    network = network_of(3)
    packed = PackedModel.of(network, **ABOUT)
    for name, layer in quantized_layers(network):
        assert not torch.equal(layer.weight, layer.quantized_weight())
        weight = packed.update.quantized[f"{name}.weight"]
        assert torch.equal(weight.dequantize(), layer.quantized_weight())


def test_the_file_is_laid_out_as_documented(tmp_path):
    """Codes and scales as docs/export.md says, read by safetensors alone."""
    packed = packed_of(4)
    tensors = load_file(saved(packed, tmp_path / "model"))
    weights = {"0.weight": (4, 9), "4.weight": (3, 64)}
    floats = packed.update.floats
    assert tensors.keys() == {
        *floats,
        *(f"{name}_{part}" for name in weights for part in ("packed", "scale")),
    }
    for name, (channels, length) in weights.items():
        assert tensors[f"{name}_packed"].dtype == torch.uint8
        assert tensors[f"{name}_packed"].numel() == channels * length / 2
        scale = tensors[f"{name}_scale"]
        assert torch.equal(scale, packed.update.quantized[name].scale)
    assert all(torch.equal(tensors[name], value) for name, value in floats.items())


def test_the_given_model_stays_as_it_was():
    model = small(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed_of(4).network(model)
    assert not list(quantized_layers(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ModelFileError, match=r"^0\.bias has shape \(5,\) in the model and \(4,\)"):
        packed_of(4).network(nn.Sequential(nn.Conv2d(1, 5, 3)))


# --- what is no packed model ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 32])
def test_every_altered_byte_is_noticed(bits, tmp_path):
    data = packed_of(bits).to_bytes()
    path = tmp_path / "altered"
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(ModelFileError):
            load_model(path)


def test_every_other_length_is_refused(tmp_path):
    data = packed_of(4).to_bytes()
    path = tmp_path / "cut"
    for cut in (*(data[:length] for length in range(len(data))), data + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(ModelFileError):
            load_model(path)


def test_the_message_names_the_file_and_what_is_wrong(tmp_path):
    path = tmp_path / "model"
    head, arrays = parts(packed_of(4), tmp_path)
    data = to_bytes(head, arrays)
    for content, message in (
        (b"", "is damaged or no packed model: "),
        (to_bytes({**head, "version": 2}, arrays), "no packed model of version 3"),
        (to_bytes({}, {}), "no packed model of version 3"),
        (data[:100], "is damaged or no packed model: "),
        (data[:-1] + bytes([data[-1] ^ 1]), "its checksum is of something else"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelFileError) as raised:
            load_model(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert message in str(raised.value)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "name is 5, not a str"),
        ({"size": True}, "size is True, not a int"),
        ({"size": 10**9}, "size is 1000000000; allowed are 1 to 1024"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"pixel_scale": float("nan")}, "finite"),
        ({"pixel_offset": -2}, "pixel_offset is -2, not a float"),
        ({"activation_bits": 17}, "bits is 17"),
        ({"activation_bits": 3}, "the grid of 0 is not one of 3 bits"),
        ({"activation_bits": 32}, "the grid of 0 is not one of 32 bits"),
        ({"grids": {"0": [0.0, 0, 15]}}, "the scale of the grid of 0 is 0.0"),
        ({"grids": {"0": [float("inf"), 0, 15]}}, "the scale of the grid of 0 is inf"),
        ({"grids": {"0": [0.5, -8, 7]}}, "the grid of 0 is not one of 4 bits"),
        ({"grids": {"0": [0.5, 0]}}, "no packed model: "),
        ({"grids": []}, "no packed model: "),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"update": {}}, "multiple values"),
        ({"bits": 3}, "0.weight has 18 bytes of codes for 36 weights"),
        ({"bits": 17}, "bits is 17"),
        ({"bits": "4"}, "bits is '4'"),
        ({"shapes": []}, "no packed model: "),
        ({"shapes": {"9.weight": [1]}}, "9.weight_packed"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(change, message, tmp_path):
    head, arrays = parts(packed_of(4), tmp_path)
    with pytest.raises(ModelFileError, match=message.replace("(", r"\(")):
        load_altered({**head, **change}, arrays, tmp_path)


@pytest.mark.parametrize("name", ["tied", "attending", "gru"])
def test_layers_of_every_kind_come_back(name, tmp_path):
    """Of a shared weight too, whose second layer has a grid and no tensor of its own."""
    model, inputs = made(name)
    network = prepare(made(name)[0], QuantConfig(4, 6)).eval()
    calibrate_activations(network, lambda network: network(*inputs))
    about = {**ABOUT, "num_classes": 2}
    loaded = load_model(saved(PackedModel.of(network, **about), tmp_path / "file"))
    nn.init.zeros_(next(model.parameters()))
    again = loaded.network(model)
    for one, other in zip(tensors_in(again(*inputs)), tensors_in(network(*inputs)), strict=True):
        assert torch.equal(one, other)
    grids = {n: layer.input_grid for n, layer in quantized_layers(again)}
    assert grids == {n: layer.input_grid for n, layer in quantized_layers(network)}
    assert any(grids.values())


def test_a_grid_of_no_layer_is_refused(tmp_path):
    head, arrays = parts(packed_of(4), tmp_path)
    odd = load_altered({**head, "grids": {**head["grids"], "9": [0.5, 0, 15]}}, arrays, tmp_path)
    with pytest.raises(ModelFileError, match="there is no layer '9' that a grid could be of"):
        odd.network(small())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight_scale", np.full(4, np.inf, np.float32), "must be finite"),
        ("0.weight_scale", np.zeros(4, np.float32), "a scale is not positive"),
        ("0.weight_packed", np.full(18, 136, np.uint8), ""),
        ("1.running_var", np.full(4, -1, np.float32), "1.running_var is a variance"),
        ("0.bias", np.full(4, np.nan, np.float32), "must be finite"),
        ("0.bias", np.full(4, 1e9, np.float32), "a value exceeds 1e"),
        ("more", np.zeros(1, np.uint8), "more"),
    ],
)
def test_values_that_are_no_models_are_refused(name, value, message, tmp_path):
    head, arrays = parts(packed_of(4), tmp_path)
    if not message:
        # The pattern of a code below the symmetric grid.
        value = np.zeros(18, np.uint8)
        message = "below the symmetric grid"
    with pytest.raises(ModelFileError, match=message):
        load_altered(head, {**arrays, name: value}, tmp_path)


@pytest.mark.parametrize("shape", [[2**20, 2**20], [2**62, 2**62], [-4, -9], [1] * 255, []])
def test_nothing_is_allocated_for_what_the_file_cannot_hold(shape, tmp_path):
    head, arrays = parts(packed_of(4), tmp_path)
    head["shapes"]["0.weight"] = shape

    def refused():
        with pytest.raises(ModelFileError):
            load_altered({**head, "grids": {}}, arrays, tmp_path)

    assert peak_memory(refused) < 1_000_000


def test_random_changes_behind_a_good_checksum_are_refused_or_sane(tmp_path):
    rng = np.random.default_rng(0)
    targets = [parts(packed_of(bits), tmp_path) for bits in (2, 4, 9, 32)]
    accepted = 0
    for number in range(600):
        head, arrays = targets[number % len(targets)]
        text, arrays = bytearray(json.dumps(head).encode()), dict(arrays)
        if rng.random() < 0.3:
            text[rng.integers(len(text))] = rng.integers(32, 127)
        else:
            name = list(arrays)[rng.integers(len(arrays))]
            data = bytearray(arrays[name].tobytes())
            data[rng.integers(len(data))] = rng.integers(256)
            arrays[name] = np.frombuffer(data, arrays[name].dtype).reshape(arrays[name].shape)
        try:
            network = load_altered(json.loads(text), arrays, tmp_path).network(small())
        except (ModelFileError, json.JSONDecodeError):
            continue
        accepted += 1
        assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    # Enough gets through the checksum for the checks behind it to have been tried.
    assert accepted > 30
