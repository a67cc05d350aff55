"""A model at a bit-width as one safetensors file, with all that it takes to compute with it.

A quantized weight ``w`` is two tensors, ``w_packed``, its codes (`quant.codec.packing`), and
``w_scale``; the others are float32 under their own names. The file's metadata holds the rest.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from core.bits import FLOAT_BITS, check_bits
from core.tensor_files import read_tensors, to_bytes
from quant.codec.decode import decode
from quant.codec.encode import encode
from quant.codec.layout import FlatUpdate
from quant.codec.packing import pack, packed_size, unpack
from quant.grid import largest_code
from quant.qat.activations import ActivationGrid
from quant.qat.config import QuantConfig
from quant.qat.prepare import prepare, quantized_layers, set_scales, weight_scales
from quant.qat.states import federated_state, load_state, spec_of
from quant.update import QuantizedTensor, Update, quantize_state

_VERSION = 3
# A network built by the file's head allocates as much as these allow.
_MOST = {"channels": 3, "size": 1024}


class ModelFileError(ValueError):
    """A file that is no packed model, or of another model than it is to be loaded into."""


@dataclass(frozen=True)
class PackedModel:
    """A model at a bit-width.

    Attributes
    ----------
    update : Update
        Codes and scales of the weights; the other tensors in float32, normalization's statistics
        as the model is evaluated with them.
    name : str
        Architecture, as the file calls it. Do not build it by the name in an untrusted file:
        `task.models.build_model` imports modules by name.
    channels, size : int
        Of the images: ``[channels, size, size]``.
    num_classes : int
        Length of the logits.
    pixel_scale, pixel_offset : float
        A uint8 pixel ``x`` enters the network as ``pixel_scale * x + pixel_offset``.
    activation_bits : int
        Width of each layer's input, 2 to 16, or 32 where it is float32.
    grids : mapping of str to ActivationGrid
        By layer; a layer without one puts its input on the grid that spans it.

    Raises
    ------
    ValueError
        If a value has the wrong type or is out of range, or a grid is not a layer's.

    Examples
    --------
    >>> network = prepare(nn.Sequential(nn.Linear(12, 2)), QuantConfig(weight_bits=4))
    >>> about = {"channels": 3, "size": 2, "num_classes": 2, "pixel_scale": 0.1, "pixel_offset": 0.}
    >>> packed = PackedModel.of(network, name="linear", **about)
    >>> packed.bits, list(packed.update.quantized)
    (4, ['0.weight'])
    """

    update: Update
    name: str
    channels: int
    size: int
    num_classes: int
    pixel_scale: float
    pixel_offset: float
    activation_bits: int
    grids: Mapping[str, ActivationGrid]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (str, int, float) and type(value) is not field.type:
                raise ValueError(f"{field.name} is {value!r}, not a {field.type.__name__}")
        # The logits are rows of some tensor.
        rows = sum(shape[0] for shape in self.update.spec.shapes.values() if shape)
        for key, most in {**_MOST, "num_classes": rows}.items():
            if not 1 <= getattr(self, key) <= most:
                raise ValueError(f"{key} is {getattr(self, key)}; allowed are 1 to {most}")
        if not (isfinite(self.pixel_scale) and isfinite(self.pixel_offset)):
            raise ValueError("pixel_scale and pixel_offset must be finite")
        if self.activation_bits != FLOAT_BITS:
            check_bits(self.activation_bits)
        for layer, grid in self.grids.items():
            self._check_grid(layer, grid)

    def _check_grid(self, layer: str, grid: ActivationGrid) -> None:
        bits = self.activation_bits
        ends = []
        if bits != FLOAT_BITS:
            ends = [(0, 2**bits - 1), (-largest_code(bits), largest_code(bits))]
        if type(grid.scale) is not float or not 0 < grid.scale < float("inf"):
            raise ValueError(f"the scale of the grid of {layer} is {grid.scale!r}")
        if (grid.low, grid.high) not in ends:
            raise ValueError(f"the grid of {layer} is not one of {bits} bits")

    @classmethod
    def of(cls, network: nn.Module, **about: Any) -> Self:
        """Take what a network computes with.

        Parameters
        ----------
        network : nn.Module
            Prepared for one width throughout (`prepare`), or an ordinary model of 32 bits.
        **about
            The attributes from `name` to `pixel_offset`.
        """
        layers = dict(quantized_layers(network))
        config = next((layer.config for layer in layers.values()), None)
        bits, activation_bits = FLOAT_BITS, FLOAT_BITS
        if config is not None:
            bits, activation_bits = config.weight_bits, config.activation_bits
        # On the grid already, or rounded as the layer rounds it.
        update = quantize_state(federated_state(network), bits, weight_scales(network))
        grids = {n: layer.input_grid for n, layer in layers.items() if layer.input_grid}
        return cls(update, **about, activation_bits=activation_bits, grids=grids)

    @property
    def bits(self) -> int:
        """Width of the weights, 2 to 16, or 32."""
        return self.update.bits

    def network(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model that computes with these weights at their width.

        Parameters
        ----------
        model : nn.Module
            Of this architecture, with any weights.

        Raises
        ------
        ModelFileError
            If it has other tensors.
        """
        have, want = spec_of(model).shapes, self.update.spec.shapes
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ModelFileError(
                    f"{name} has shape {have.get(name)} in the model and {want.get(name)} in the "
                    f"file, which holds {self.name!r}"
                )
        network = copy.deepcopy(model)
        load_state(network, self.update.dequantize())
        if self.bits != FLOAT_BITS:
            prepare(network, QuantConfig(self.bits, self.activation_bits))
            set_scales(network, self.update.scales)
            layers = dict(quantized_layers(network))
            if odd := sorted(self.grids.keys() - layers.keys()):
                raise ModelFileError(f"there is no layer {odd[0]!r} that a grid could be of")
            for name, layer in layers.items():
                layer.input_grid = self.grids.get(name)
        return network.eval()

    def to_input(self, pixels: np.ndarray) -> Tensor:
        """Turn uint8 pixels ``[n, channels, size, size]`` into the network's float32 input."""
        x = torch.from_numpy(pixels).to(torch.float32, memory_format=torch.channels_last)
        return x.mul_(self.pixel_scale).add_(self.pixel_offset)

    def to_bytes(self) -> bytes:
        """Return the content of the file.

        Raises
        ------
        ValueError
            If a tensor is not finite.
        """
        update = FlatUpdate.of(self.update)
        arrays = {name: tensor.numpy() for name, tensor in update.floats.items()}
        for name, tensor in update.quantized.items():
            codes = np.frombuffer(pack(tensor.codes.numpy(), update.bits), np.uint8)
            arrays |= {f"{name}_packed": codes, f"{name}_scale": tensor.scale.numpy()}
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "update"}
        about["grids"] = {layer: astuple(grid) for layer, grid in self.grids.items()}
        shapes = {name: list(tensor.codes.shape) for name, tensor in update.quantized.items()}
        return to_bytes({"version": _VERSION, "bits": self.bits, "shapes": shapes, **about}, arrays)


def load_model(path: str | PathLike[str]) -> PackedModel:
    """Read a packed model from its file.

    Parameters
    ----------
    path : path-like
        As ``prowd export`` wrote it.

    Returns
    -------
    PackedModel
        What it takes to compute with the model; `PackedModel.network` does.

    Raises
    ------
    ModelFileError
        If the file is anything but a whole, unaltered packed model of this version.
    OSError
        If there is no such file, or it cannot be read.

    Examples
    --------
    >>> about = {"channels": 3, "size": 2, "num_classes": 2, "pixel_scale": 1.0, "pixel_offset": 0.}
    >>> packed = PackedModel.of(nn.Sequential(nn.Linear(12, 2)), name="linear", **about)
    >>> _ = Path("linear.safetensors").write_bytes(packed.to_bytes())
    >>> load_model("linear.safetensors").name
    'linear'
    """
    try:
        head, tensors = read_tensors(Path(path))
        if head.pop("version", None) != _VERSION:
            raise ModelFileError(f"no packed model of version {_VERSION}")
        update = _read_update(tensors, head.pop("bits"), head.pop("shapes"))
        grids = {layer: ActivationGrid(*grid) for layer, grid in head.pop("grids").items()}
        return PackedModel(update, grids=grids, **head)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: is damaged or no packed model: {error}") from None


def _read_update(
    tensors: Mapping[str, Tensor], bits: int, shapes: Mapping[str, list[int]]
) -> Update:
    """Read what the file holds, as strictly as a payload is read."""
    floats, codes = dict(tensors), {}
    for name, shape in shapes.items():
        packed, scale = floats.pop(f"{name}_packed").numpy(), floats.pop(f"{name}_scale")
        count = math.prod(shape)
        # Before anything is allocated.
        if packed.size != packed_size(count, bits):
            raise ModelFileError(f"{name} has {packed.size} bytes of codes for {count} weights")
        unpacked = torch.from_numpy(unpack(packed, bits, count)).view(shape)
        codes[name] = QuantizedTensor(unpacked, scale)
    for name, tensor in floats.items():
        if tensor.dtype != torch.float32:
            raise ModelFileError(f"{name} is {tensor.dtype}; allowed: torch.float32")
    update = Update(bits, "weights", codes, floats)
    return decode(encode(update), update.spec, bits)
