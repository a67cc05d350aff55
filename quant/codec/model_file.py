"""A model at a bit-width as one file, with all that it takes to compute with it.

Layout (little-endian)::

    magic "PRWM" | version u8 | head bytes u32
    head      JSON (UTF-8), an object: the fields of `PackedModel` but `update`, an activation grid
              as [scale, low, high]
    update    the tensors, as they travel packed (`quant.codec.wire`)

The seed of the update's checksum is the XXH3 of everything before it, which so covers the whole
file. Nothing is pickled. All sizes are compared with the length of the file before anything is
allocated.
"""

import copy
import json
import struct
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from core.bits import FLOAT_BITS, check_bits
from quant.codec.reading import UpdateError, decode_update, read_spec
from quant.codec.wire import encode_update
from quant.grid import largest_code
from quant.qat.activations import ActivationGrid
from quant.qat.layers import (
    QuantConfig,
    federated_state,
    load_state,
    prepare,
    quantized_layers,
    set_scales,
    spec_of,
    weight_scales,
)
from quant.update import Update, quantize_state

_MAGIC = b"PRWM"
_VERSION = 2
_HEADER = struct.Struct("<4sBI")
# Who makes a network as the file says allocates what these say.
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
        Architecture, as whoever wrote the file calls it. To build what a stranger's file names is
        to let it choose: `task.models.build_model` imports modules by name.
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
        If a value has the wrong type or is out of range, or a grid is none of a layer's.
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
        if f"{layer}.weight".removeprefix(".") not in self.update.quantized:
            raise ValueError(f"there is no layer {layer!r} that a grid could be of")
        bits = self.activation_bits
        ends = []
        if bits != FLOAT_BITS:
            ends = [(0, 2**bits - 1), (-largest_code(bits), largest_code(bits))]
        if type(grid.scale) is not float or not 0 < grid.scale < float("inf"):
            raise ValueError(f"the scale of the grid of {layer} is {grid.scale!r}")
        if (grid.low, grid.high) not in ends:
            raise ValueError(f"the grid of {layer} is none of {bits} bits")

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
            for name, layer in quantized_layers(network):
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
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "update"}
        about["grids"] = {layer: astuple(grid) for layer, grid in self.grids.items()}
        head = json.dumps(about, allow_nan=False).encode()
        head = _HEADER.pack(_MAGIC, _VERSION, len(head)) + head
        return head + encode_update(self.update, stamp=xxhash.xxh3_64_intdigest(head))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the content of a file.

        Raises
        ------
        ModelFileError
            If it is anything but a whole, unaltered packed model of this version.
        """
        if len(data) < _HEADER.size:
            raise ModelFileError(f"{len(data)} bytes are no packed model")
        magic, version, length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ModelFileError(f"begins with {magic!r}, not {_MAGIC!r}: no packed model")
        if version != _VERSION:
            raise ModelFileError(f"has version {version}; understood is {_VERSION}")
        end = _HEADER.size + length
        if end > len(data):
            raise ModelFileError(f"is cut short: {len(data)} bytes of {end} and more")
        try:
            # First the update, whose checksum says whether the head is whole.
            payload = data[end:]
            bits, spec = read_spec(payload)
            update = decode_update(payload, spec, bits, stamp=xxhash.xxh3_64_intdigest(data[:end]))
            about = json.loads(data[_HEADER.size : end])
            grids = {layer: ActivationGrid(*grid) for layer, grid in about.pop("grids").items()}
            return cls(update, grids=grids, **about)
        except UpdateError as error:
            raise ModelFileError(f"is damaged or no packed model: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ModelFileError(f"has a head that cannot be used: {error}") from None


def load_model(path: str | PathLike) -> PackedModel:
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
    """
    try:
        return PackedModel.from_bytes(Path(path).read_bytes())
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
