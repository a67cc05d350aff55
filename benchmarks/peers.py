"""Beside the peers, where they are installed: torchao, Brevitas, NVFlare, and Flower's FedAvg."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Figure, ratio, report, side_by_side
from exchange.states import to_arrays
from quant import (
    QuantConfig,
    absmax_scale,
    encode,
    federated_state,
    fit_scale,
    pack,
    prepare,
    quantize_fitted,
    quantize_model,
    quantize_nearest,
    unpack,
)
from task.models import build_model

_ROWS, _COLUMNS, _REPEATS, _AHEAD = 1000, 10_000, 9, 1.0
_BATCH = 64
# NVFlare's forms, their widths, and the widest of ours that, coded, takes no more bytes.
_NVFLARE_FORMS = (("blockwise8", 8, 8), ("float4", 4, 5), ("normfloat4", 4, 5))
# Weights that share a scale in its 8-bit form, which does not store the number.
_BLOCKSIZE = 4096


def main() -> None:
    """Compare with every peer that can be imported, and print which cannot."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for compare in (_torchao, _brevitas, _nvflare_float16, _nvflare_low_bits, _flower):
        try:
            figures += compare()
        except ImportError as error:
            print(f"{compare.__name__.strip('_')} is left out: {error.name} is not installed")
    report("peers", figures)


def _torchao() -> list[Figure]:
    """Packing of ten million codes that are there already."""
    from torchao.prototype.dtypes.uintx import bitpacking

    generator = torch.Generator().manual_seed(0)
    figures = []
    for bits in (2, 3, 4, 5, 6, 7):
        limit = 2 ** (bits - 1) - 1
        shape = (_ROWS, _COLUMNS)
        codes = torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int8)
        ours, shifted = codes.numpy(), (codes + limit).to(torch.uint8)
        packed, shards = pack(ours, bits), bitpacking.pack_cpu(shifted, bits)
        assert torch.equal(bitpacking.unpack_cpu(shards, bits, dim=-1), shifted)
        seconds = side_by_side(
            {
                "pack": partial(pack, ours, bits),
                "unpack": partial(unpack, packed, bits, _ROWS * _COLUMNS),
                "their pack": partial(bitpacking.pack_cpu, shifted, bits),
                "their unpack": partial(bitpacking.unpack_cpu, shards, bits, dim=-1),
            },
            _REPEATS,
        )
        for way in ("pack", "unpack"):
            label = f"{bits}-bit, {way}, against torchao"
            figures.append(ratio(label, seconds[way], seconds[f"their {way}"], _AHEAD))
    return figures


def _brevitas() -> list[Figure]:
    """A training step of resnet8 with weights, and with activations too, on 4 bits."""
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    def convert(module: nn.Module, activations: bool) -> nn.Module:
        own = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4}
        if activations:
            own |= {"input_quant": Int8ActPerTensorFloat, "input_bit_width": 4}
        for name, child in module.named_children():
            bias = getattr(child, "bias", None) is not None
            if isinstance(child, nn.Conv2d):
                channels = child.in_channels, child.out_channels
                window = child.kernel_size, child.stride, child.padding
                new = qnn.QuantConv2d(*channels, *window, bias=bias, **own)
            elif isinstance(child, nn.Linear):
                new = qnn.QuantLinear(child.in_features, child.out_features, bias, **own)
            else:
                new = convert(child, activations)
            setattr(module, name, new)
        return module

    figures = []
    for what, activation_bits in (("weights", 32), ("weights and activations", 4)):
        theirs = convert(build_model("resnet8", 3, 32, 10, seed=0), activation_bits < 32)
        ours = build_model("resnet8", 3, 32, 10, seed=0)
        prepare(ours, QuantConfig(4, activation_bits))
        seconds = side_by_side({"ours": _step(ours), "theirs": _step(theirs)}, _REPEATS)
        label = f"training step, {what}, against Brevitas"
        figures.append(ratio(label, seconds["ours"], seconds["theirs"], _AHEAD))
    return figures


def _step(model: nn.Module) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (_BATCH,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _nvflare_float16() -> list[Figure]:
    """Ten million weights as 16-bit numbers."""
    weights, theirs = _normal_weights(), _nvflare_quantizer("float16")
    seconds = side_by_side(
        {
            "ours": lambda: pack(
                quantize_nearest(weights, absmax_scale(weights, 16), 16).numpy(), 16
            ),
            "theirs": partial(theirs, weights),
        },
        _REPEATS,
    )
    scale = absmax_scale(weights, 16)
    back = quantize_nearest(weights, scale, 16) * scale[:, None]
    half = torch.from_numpy(weights.numpy().astype(np.float16).astype(np.float32))
    error = float((back - weights).norm() / (half - weights).norm())
    return [
        ratio("16-bit, time, against NVFlare's float16", seconds["ours"], seconds["theirs"], 1.0),
        Figure("16-bit, error, against NVFlare's float16", error, _AHEAD),
    ]


def _nvflare_low_bits() -> list[Figure]:
    """Ten million weights by NVFlare's 8- and 4-bit forms: time here and on a GPU, bytes, error."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    figures = []
    for form, bits, widest in _NVFLARE_FORMS:
        figures += [_time_beside_nvflare(form, bits, device) for device in devices]
        figures += _size_and_error_beside_nvflare(form, widest)
    return figures


def _time_beside_nvflare(form: str, bits: int, device: str) -> Figure:
    """From float32 on the CPU to codes there, computed on a device."""
    weights, quantize = _normal_weights(), _nvflare_quantizer(form)

    def ours() -> memoryview:
        there = weights.to(device)
        return pack(quantize_nearest(there, fit_scale(there, bits), bits).cpu().numpy(), bits)

    with _nvflare_computes_on(device):
        seconds = side_by_side({"ours": ours, "theirs": partial(quantize, weights)}, _REPEATS)
    label = f"{bits}-bit, packed, time on {device}, against NVFlare's {form}"
    return ratio(label, seconds["ours"], seconds["theirs"], _AHEAD)


def _size_and_error_beside_nvflare(form: str, widest: int) -> list[Figure]:
    weights = _normal_weights()
    with _nvflare_computes_on("cpu"):
        values, states = _nvflare_quantizer(form)(weights)
    codes, state = values["w"], states["w"]
    arrays = [codes, *(part for part in state.values() if isinstance(part, np.ndarray))]
    # Read here, as bitsandbytes 0.50 on the CPU reads some rows wrongly, of no multiple of 64.
    if form != "blockwise8":
        codes = np.stack([codes.ravel() >> 4, codes.ravel() & 15], axis=1)
    levels = state["code" if form == "blockwise8" else "quant_map"][codes.ravel()]
    scales = state["absmax"].repeat(state.get("blocksize", _BLOCKSIZE))[: levels.size]
    back = torch.from_numpy(levels * scales).view_as(weights)
    nearer = quantize_fitted({"w": weights}, widest, ["w"])
    size = len(encode(nearer, coded=True)) / sum(array.nbytes for array in arrays)
    error = float((nearer.dequantize()["w"] - weights).norm() / (back - weights).norm())
    return [
        Figure(f"{widest}-bit, coded, bytes, against NVFlare's {form}", size, _AHEAD),
        Figure(f"{widest}-bit, coded, error, against NVFlare's {form}", error, _AHEAD),
    ]


def _nvflare_computes_on(device: str) -> AbstractContextManager[object]:
    """Let NVFlare, which takes everything to a GPU first, compute where things are."""
    return patch.object(Tensor, "cuda", lambda self: self) if device == "cpu" else nullcontext()


def _normal_weights() -> Tensor:
    return torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))


def _nvflare_quantizer(form: str) -> Callable[[Tensor], tuple[dict[str, Any], dict[str, Any]]]:
    """Return what makes NVFlare's values, and what is needed to read them, of weights."""
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    quantizer = ModelQuantizer(quantization_type=form)
    quantizer.log_info = lambda *_: None

    def quantize(weights: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        values, states, _ = quantizer.quantization({"w": weights.numpy()}, FLContext())
        return values, states

    return quantize


def _flower() -> list[Figure]:
    """Bytes of ten clients' resnet8, half of them on k bits, against Flower's float32 arrays."""
    model = build_model("resnet8", 3, 32, 10, seed=0)
    theirs = 10 * sum(len(array.data) for array in to_arrays(federated_state(model)).values())
    figures = []
    for bits in (2, 3, 4, 8):
        low, high = (encode(quantize_model(model, b), coded=True) for b in (bits, 32))
        ours = 5 * (len(low) + len(high))
        label = f"bytes up, half {bits}-bit and half float32, against Flower's FedAvg"
        figures.append(Figure(label, ours / theirs, _AHEAD))
    return figures
