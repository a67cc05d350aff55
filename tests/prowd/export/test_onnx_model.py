"""The ONNX file in onnxruntime, against torch and against its own integers taken out by hand."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from core.errors import SettingsError
from prowd.export.onnx_model import named_inputs, to_onnx, to_onnx_of
from quant import QuantConfig, calibrate_activations, prepare, quantized_layers
from task.data.to_input import to_input

PROJECT = Path(__file__).parents[3]
# Weights as INT4 and INT16; grids of all levels of their type, and of fewer.
WIDTHS = [4, 12, 32]


def images(count, channels, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def prepared(model, bits, channels, size, activation_bits=None):
    """The model with grids that other images are partly off."""
    model.eval()
    if bits != 32:
        prepare(model, QuantConfig(bits, activation_bits or bits))
        # Not symmetric about the middle, or sums of two such values lie halfway between levels.
        dim = to_input(images(16, channels, size, seed=1) // 2 + 61)
        calibrate_activations(model, lambda network: network(dim))
    return model


@torch.no_grad()
def in_torch(network, pixels):
    return network(to_input(pixels)).numpy()


def in_onnxruntime(data, pixels):
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels})[0]


class Own(nn.Module):
    """A user's module: a layer used twice, groups and dilation, with bias, a branch without ReLU.

    Its layers are followed by a ReLU and the next layer's grid, which is where onnxruntime would
    compute with integers.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 9 * 9, 20), nn.GELU())
        self.last = nn.Linear(20, 4, bias=False)

    def forward(self, x):
        x = self.twice(self.stem(x).relu()).relu()
        return self.last(self.head(self.twice(x) - x))


def own(bits=4, **kwargs):
    torch.manual_seed(0)
    return prepared(Own(), bits, 3, 9, **kwargs)


@cache
def exported(bits=4):
    return to_onnx(own(bits), 3, 9)


def stored(data):
    return {tensor.name: tensor for tensor in onnx.load_from_string(data).graph.initializer}


def codes_by_hand(tensor):
    """Integers of a tensor from its bytes; INT4: two a byte, the lower half first."""
    kinds = {TensorProto.INT8: "<i1", TensorProto.INT16: "<i2"}
    if tensor.data_type != TensorProto.INT4:
        return np.frombuffer(tensor.raw_data, kinds[tensor.data_type]).reshape(tensor.dims)
    halves = np.frombuffer(tensor.raw_data, np.uint8)[:, None] >> np.array([0, 4]) & 15
    count = int(np.prod(tensor.dims))
    return np.where(halves > 7, halves - 16, halves).ravel()[:count].reshape(tensor.dims)


def test_the_weights_are_integers_with_a_scale_a_channel():
    bits = 4
    network = own(bits)
    tensors = stored(exported(bits))
    kind = TensorProto.INT4 if bits <= 4 else TensorProto.INT16
    for name, layer in quantized_layers(network):
        tensor, scale = tensors[f"network.{name}.codes"], tensors[f"network.{name}.weight_scale"]
        assert tensor.data_type == kind
        codes = codes_by_hand(tensor)
        assert np.abs(codes).max() <= 2 ** (bits - 1) - 1
        scales = np.frombuffer(scale.raw_data, "<f4").reshape(-1, *[1] * (codes.ndim - 1))
        weight = codes.astype(np.float32) * scales
        assert np.array_equal(weight, layer.quantized_weight().detach().numpy())
    # The float32 weights are not there besides.
    floats = sum(np.prod(t.dims) for t in tensors.values() if t.data_type == TensorProto.FLOAT)
    assert floats < 200


@pytest.mark.parametrize("bits", WIDTHS)
def test_onnxruntime_computes_what_torch_computes(bits):
    pixels = images(50, 3, 9)
    want, got = in_torch(own(bits), pixels), in_onnxruntime(exported(bits), pixels)
    # A value halfway between two levels may go either way: one step of the narrow widths.
    assert np.isclose(got, want, rtol=0, atol=1e-5 * np.ptp(want)).mean() > 0.95
    assert np.abs(got - want).max() < 0.1 * np.ptp(want)


def test_the_first_layer_clips_and_rounds_as_its_grid_says():
    """One linear layer, worked with numpy alone; the network stays as it was."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network = prepared(model, 8, 1, 2)
    grid = network[1].input_grid
    pixels = images(200, 1, 2)
    x = pixels.reshape(200, 4).astype(np.float32) * np.float32(4 / 255) - 2
    codes = np.rint(x / np.float32(grid.scale))
    assert (np.abs(codes) > grid.high).any()
    weight, bias = (t.detach().numpy() for t in (network[1].quantized_weight(), network[1].bias))
    want = (np.clip(codes, grid.low, grid.high) * grid.scale) @ weight.T + bias
    state, before = set(network.state_dict()), in_torch(network, pixels)
    data = to_onnx(network, 1, 2)
    assert stored(data)["network.1.codes"].data_type == TensorProto.INT8
    assert np.allclose(in_onnxruntime(data, pixels), want, atol=1e-5)
    assert set(network.state_dict()) == state
    assert np.array_equal(in_torch(network, pixels), before)


def test_input_and_output_are_as_documented():
    data = exported()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    [pixels], [logits] = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type) == ("pixels", "tensor(uint8)")
    assert pixels.shape == ["batch", 3, 9, 9]
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 4])
    together = in_onnxruntime(data, images(7, 3, 9))
    for index, image in enumerate(images(7, 3, 9)):
        assert np.allclose(in_onnxruntime(data, image[None]), together[index], atol=1e-5)


def test_float_activations_pass_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(98, 4))
    network = prepared(model, 4, 3, 9, activation_bits=32)
    data = to_onnx(network, 3, 9)
    kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert "QuantizeLinear" not in kinds
    pixels = images(20, 3, 9)
    assert np.allclose(in_onnxruntime(data, pixels), in_torch(network, pixels), atol=1e-5)


def test_the_file_tells_nothing_of_this_machine():
    data = exported()
    for text in (str(PROJECT), sys.prefix, "stack_trace", "site-packages"):
        assert text.encode() not in data


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_brings_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=rf"^ONNX: {package} is not .*'\.\[export\]'"):
        to_onnx(own(), 3, 9)


def test_without_fitted_grids_there_is_no_file():
    network = prepare(Own().eval(), QuantConfig(4, 4))
    with pytest.raises(SettingsError, match="server-buffer: 0 left no images"):
        to_onnx(network, 3, 9)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_a_model_that_torch_cannot_write_is_refused_in_one_line():
    with pytest.raises(SettingsError, match=r"^ONNX: torch cannot write this model: .+") as raised:
        to_onnx(Branching(), 1, 2)
    assert "\n" not in str(raised.value)


class Sequence(nn.Module):
    """Rows as tokens: an embedding that is the head too, attention, Conv1d, and a GRU."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        y = self.embed((x[:, 0, 0] * 2 + 4).round().long())
        y = self.conv(self.attend(y, y, y, need_weights=False)[0].mT).mT
        return self.head(self.gru(y)[0][:, -1])


def test_layers_of_every_kind_are_written():
    torch.manual_seed(0)
    network, pixels = prepared(Sequence(), 4, 1, 4), images(50, 1, 4)
    data = to_onnx(network, 1, 4)
    want, got = in_torch(network, pixels), in_onnxruntime(data, pixels)
    assert np.isclose(got, want, rtol=0, atol=1e-5 * np.ptp(want)).mean() > 0.95
    assert np.abs(got - want).max() < 0.1 * np.ptp(want)
    tensors = stored(data)
    for name in ("embed", "conv"):
        assert tensors[f"network.{name}.codes"].data_type == TensorProto.INT4
    # The head's weight is that of the embedding.
    assert "network.head.codes" not in tensors
    assert not any(name.endswith("weight") for name in tensors)


class Pair(nn.Module):
    """Takes two tensors by name and gives two."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        mean = self.words(x["words"]).mean(1) * x["weight"]
        return {"logits": self.head(mean), "mean": mean}


def test_inputs_and_outputs_may_have_names():
    torch.manual_seed(0)
    network = Pair().eval()

    def inputs(count):
        return {"words": torch.arange(5 * count).reshape(-1, 5) % 9, "weight": torch.rand(count, 1)}

    data = to_onnx_of(network, inputs(2))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["words", "weight"]
    given = inputs(7)
    got = session.run(None, {k: t.numpy() for k, t in given.items()})
    want = network(given)
    for array, tensor in zip(got, want.values(), strict=True):
        assert np.allclose(array, tensor.detach().numpy(), atol=1e-6)


def test_inputs_that_are_no_tensors_are_refused():
    assert list(named_inputs([torch.ones(2), torch.ones(2)])) == ["inputs_0", "inputs_1"]
    for wrong in ("text", [torch.ones(2), 3], {}):
        kind = type(wrong).__name__
        with pytest.raises(SettingsError, match=f"^ONNX: the network takes a {kind}; allowed: a t"):
            named_inputs(wrong)
