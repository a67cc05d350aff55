"""A network at a bit-width as an ONNX model with QuantizeLinear and DequantizeLinear nodes.

Weights of convolutions, linear layers and embeddings are integers: INT4 up to 4 bits, INT8 up to 8,
INT16 above, with one scale a channel; those of attention, recurrent layers and others are float32.
Activations pass through QuantizeLinear and DequantizeLinear where the network has grids, behind a
Clip where the grid has fewer levels than its integer type. The rest stays as it was.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from core.errors import SettingsError
from quant import FLOAT_BITS, QuantLayer, quantize_nearest, quantized_layers
from quant.grid import per_channel
from quant.qat.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantEmbeddingBag,
    QuantLinear,
)
from task.data.to_input import normalize

# The first that has INT4 and INT16 for both nodes.
_OPSET = 21
_INT4_BITS = 4


def to_onnx(network: nn.Module, channels: int, size: int) -> bytes:
    """Write a network of images as an ONNX model.

    Parameters
    ----------
    network : nn.Module
        Prepared (`quant.prepare`) with fitted activation grids, or an ordinary float32 model.
    channels, size : int
        Of its images.

    Returns
    -------
    bytes
        The file: one input ``pixels``, uint8 ``[batch, channels, size, size]`` of 0 to 255, and one
        output ``logits``, float32 ``[batch, classes]``; any batch.

    Raises
    ------
    SettingsError
        If a package is missing, activations have no fitted grids, or there is a module that torch
        cannot write as ONNX.
    """
    images = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    return _written(network, _FromPixels(_with_nodes(network)), {"pixels": images}, "logits")


def to_onnx_of(network: nn.Module, inputs: Any, name: str = "inputs", output: str = "") -> bytes:
    """Write a network of any task as an ONNX model.

    Parameters
    ----------
    network : nn.Module
        As of `to_onnx`.
    inputs : Any
        Two examples as the network takes them: a tensor, or a mapping or sequence of such, whose
        first dimension is the example's.
    name, output : str
        Of the input, where it is one tensor, and of the output, if it is one.

    Returns
    -------
    bytes
        The file: its inputs are `named_inputs`; any batch.

    Raises
    ------
    SettingsError
        As `to_onnx` does, or if the inputs are anything else.
    """
    tensors = named_inputs(inputs, name)
    return _written(network, _FromTensors(_with_nodes(network), inputs), tensors, output)


def named_inputs(inputs: Any, name: str = "inputs") -> dict[str, Tensor]:
    """Return what a network takes by the names that the file has for it.

    >>> list(named_inputs({"words": torch.zeros(2, 3), "length": torch.zeros(2)}))
    ['words', 'length']
    """
    if isinstance(inputs, Tensor):
        return {name: inputs}
    found: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        found = {str(key): value for key, value in inputs.items()}
    elif isinstance(inputs, (list, tuple)):
        found = {f"{name}_{place}": value for place, value in enumerate(inputs)}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise SettingsError(
            f"ONNX: the network takes a {type(inputs).__name__}; allowed: a tensor, or a mapping "
            "or list of tensors"
        )
    return found


def _written(
    network: nn.Module, wrapped: nn.Module, tensors: Mapping[str, Tensor], output: str
) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401 torch needs it.
    except ImportError as error:
        raise SettingsError(
            f"ONNX: {error.name} is not installed; pip install -e '.[export]' brings it"
        ) from None
    batch = torch.export.Dim("batch")
    try:
        program = torch.onnx.export(
            wrapped.eval(),
            tuple(tensors.values()),
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(tensors),
            output_names=[output] if output else None,
            dynamic_shapes=(tuple({0: batch} for _ in tensors),),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise SettingsError(f"ONNX: torch cannot write this model: {reason}") from None
    assert program is not None  # It is None only where torch writes the file itself.
    model = program.model_proto
    _strip(model)
    _narrow(model.graph, network)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


class _FromPixels(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *pixels: Tensor) -> Tensor:
        return cast(Tensor, self.network(normalize(pixels[0])))


class _FromTensors(nn.Module):
    """Puts its inputs together as the network takes them."""

    def __init__(self, network: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.network = network
        self._keys = list(inputs) if isinstance(inputs, Mapping) else None
        self._is_one = isinstance(inputs, Tensor)
        self._kind = type(inputs)

    def forward(self, *tensors: Tensor) -> Any:
        if self._is_one:
            return self.network(tensors[0])
        if self._keys is not None:
            return self.network(dict(zip(self._keys, tensors, strict=True)))
        return self.network(list(tensors) if self._kind is list else tensors)


class _Nodes(QuantLayer):
    """Weights and input of a quantization-aware layer as nodes of ONNX."""

    input_scale: Tensor
    input_zero: Tensor

    def attach_nodes(self) -> None:
        bits = self.config.weight_bits
        for name in self.weight_names:
            if self.owner(name) == (self, name):
                codes = quantize_nearest(self.get_parameter(name), self.scale(name), bits)
                self.register_buffer(_codes_name(name), codes)
        if self.input_grid is None:
            return
        low, wide = self.input_grid.low, self.config.activation_bits > 8
        signed, unsigned = (torch.int16, torch.uint16) if wide else (torch.int8, torch.uint8)
        self.register_buffer("input_scale", torch.tensor(self.input_grid.scale))
        self.register_buffer("input_zero", torch.tensor(0, dtype=signed if low else unsigned))

    def quantized_weight(self, name: str = "weight") -> Tensor:
        layer, attribute = self.owner(name)
        codes, scale = layer.get_buffer(_codes_name(attribute)), self.scale(name)
        if isinstance(self, _WITH_INTEGERS):
            return _dequantized(codes, scale, None)
        return codes.float() * per_channel(scale, codes.ndim)

    def quantized_input(self, x: Tensor) -> Tensor:
        grid = self.input_grid
        if grid is None:
            return x
        if not isinstance(self, _WITH_INTEGERS):
            return x.div(grid.scale).round().clamp(grid.low, grid.high) * grid.scale
        limits = torch.iinfo(self.input_zero.dtype)
        if (grid.low, grid.high) != (limits.min, limits.max):
            x = x.clamp(grid.low * grid.scale, grid.high * grid.scale)
        codes = symbolic(
            "QuantizeLinear",
            (x, self.input_scale, self.input_zero),
            dtype=self.input_zero.dtype,
            shape=x.shape,
            version=_OPSET,
        )
        return _dequantized(codes, self.input_scale, self.input_zero)


class _WithBias(_Nodes):
    """A layer whose bias is a node of its own.

    Inside of a quantized layer onnxruntime rounds it to whole steps of input times weight, and
    computes such a layer with sums that overflow on some processors.
    """

    bias: Any
    weight: Tensor
    added_bias: Tensor | None

    def attach_nodes(self) -> None:
        super().attach_nodes()
        self.register_parameter("added_bias", self.bias)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if self.added_bias is None:
            return y
        return y + per_channel(self.added_bias, self.weight.ndim - 1)


_BIASED = (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)
# All others may transpose in their forward pass; onnxruntime then moves a DequantizeLinear behind
# that and writes a node of another type. They round with ordinary nodes and have float32 weights.
_WITH_INTEGERS = (
    *_BIASED,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantEmbeddingBag,
)


def _codes_name(weight: str) -> str:
    return f"{weight}_codes".removeprefix("weight_")


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    inputs = (codes, scale) if zero is None else (codes, scale, zero)
    attributes: dict[str, Any] = {"axis": 0} if scale.ndim else {}
    return symbolic(
        "DequantizeLinear",
        inputs,
        attributes,
        dtype=torch.float32,
        shape=codes.shape,
        version=_OPSET,
    )


def _with_nodes(network: nn.Module) -> nn.Module:
    """Return a copy whose quantization-aware layers are written as nodes."""
    network = copy.deepcopy(network)
    layers = [layer for _, layer in quantized_layers(network)]
    on_grid = [layer for layer in layers if layer.config.activation_bits != FLOAT_BITS]
    # A single layer without one is a layer that no image reaches.
    if on_grid and all(layer.input_grid is None for layer in on_grid):
        raise SettingsError(
            "server-buffer: 0 left no images to fit the activations' grids to, without which there "
            "is no ONNX model; of other tasks Task.server_inputs gives none; allowed: --bits 32"
        )
    for layer in layers:
        kind = type(layer)
        nodes = _WithBias if isinstance(layer, _BIASED) else _Nodes
        layer.__class__ = type(f"_{kind.__name__}", (nodes, kind), {})
        assert isinstance(layer, _Nodes)
        layer.attach_nodes()
    return network


def _strip(model: Any) -> None:
    """Take out what torch notes for debugging: paths of this machine, larger than the weights."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]


def _narrow(graph: Any, network: nn.Module) -> None:
    """Store the weights' codes of up to 4 bits as INT4."""
    from onnx import TensorProto, helper, numpy_helper

    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    narrow = {
        ".".join(["network", *([name] if name else []), _codes_name(weight)])
        for name, layer in quantized_layers(network)
        for weight in layer.weight_names
        if layer.config.weight_bits <= _INT4_BITS
    }
    for tensor in graph.initializer:
        if tensor.name in narrow:
            codes = numpy_helper.to_array(tensor).astype(int4)
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
