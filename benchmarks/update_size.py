"""Bytes of a client's update: packed against ``k / 32`` of its float32, coded against packed."""

import torch

from benchmarks.measure import Figure, report
from core.settings import Settings
from quant import (
    Update,
    encode,
    federated_state,
    load_state,
    payload_size,
    quantize_model,
    spec_of,
)
from task.data.partition import client_images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

_MODELS = (("resnet18", 3, 32), ("resnet20", 3, 32), ("resnet8", 1, 28), ("cnn", 1, 28))
_WIDTHS = (2, 3, 4, 8, 16)
_LARGE, _GOAL = 1_000_000, 1.05
_CODED_GOALS = {4: 0.90, 8: 0.97}
_TRAINED_ROUNDS, _CLIENTS = 5, 4


def main() -> None:
    """Print two tables, the figures and, as the last line, JSON."""
    figures = _packed()
    print()
    figures += _coded()
    print()
    report("bytes", figures)


def _packed() -> list[Figure]:
    figures = []
    print("| model | values | " + " | ".join(f"{k}-bit" for k in _WIDTHS) + " |")
    print("| --- " * (2 + len(_WIDTHS)) + "|")
    for name, channels, size in _MODELS:
        model = build_model(name, channels, size, 10, seed=0)
        count = sum(t.numel() for t in federated_state(model).values())
        full = payload_size(spec_of(model), 32)
        cells = []
        for bits in _WIDTHS:
            update = quantize_model(model, bits)
            packed = len(encode(update))
            ratio = packed / (full * bits / 32)
            cells.append(f"{ratio:.3f}")
            if count > _LARGE:
                figures.append(Figure(f"{name}, {bits}-bit, of {bits}/32", ratio, _GOAL))
            if count > _LARGE and bits in _CODED_GOALS:
                coded = len(encode(update, coded=True)) / packed
                label = f"{name}, {bits}-bit, coded by itself, of packed"
                figures.append(Figure(label, coded, _CODED_GOALS[bits]))
        print(f"| {name} | {count:,} | " + " | ".join(cells) + " |")
    return figures


def _coded() -> list[Figure]:
    """Of an update that was trained, by itself and from the codes that the client was sent."""
    figures = []
    print("| resnet8, strict, on digits | packed | coded | coded from the start |  |")
    print("| --- " * 5 + "|")
    for bits in (2, 3, 4, 8):
        update, start = _trained(bits)
        codes = sum(tensor.codes.numel() for tensor in update.quantized.values())
        packed = len(encode(update))
        other = packed - codes * bits / 8
        sizes = [packed]
        sizes += [len(encode(update, coded=True, start=s)) for s in (None, start)]
        cells = [f"{8 * (size - other) / codes:.2f}" for size in sizes]
        print(f"| {bits}-bit | {' | '.join(cells)} | bits a weight |")
        if bits in _CODED_GOALS:
            label = f"resnet8, {bits}-bit, trained, coded from its start, of packed"
            figures.append(Figure(label, sizes[2] / packed, _CODED_GOALS[bits]))
    return figures


def _trained(bits: int) -> tuple[Update, Update]:
    """Return a strict client's update after a few rounds, and the model that it was sent."""
    torch.set_num_threads(1)
    settings = Settings(low_bit_training="strict")
    images = client_images(settings, 0, _CLIENTS)
    model = build_model("resnet8", 1, images.pixels.shape[2], 10, seed=0)
    for server_round in range(1, _TRAINED_ROUNDS + 1):
        start = quantize_model(model, bits)
        load_state(model, start.dequantize())
        config = LocalTraining.of(settings, bits, server_round, 0.0)
        trained = train(model, images, config, server_round, scales=start.scales)
    return trained.update, start
