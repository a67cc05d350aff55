"""What rounding does to the output gradients of low-bit training, measured on a finished run.

    python -m benchmarks.gradients RUN_DIR --bits 4 --gradient-bits 8

A client of the run's last model passes some batches back through it: in float32, with every
layer's output gradient and weight gradient rounded to nearest, and rounded stochastically as
training does it. Printed are, for each layer, the share of output gradients that become zero, and
the error and the bias of the weight gradient, as shares of its norm.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from core.settings import Settings
from quant import (
    QuantConfig,
    largest_code,
    layers_by_weight,
    load_state,
    prepare,
    quantize_model,
    set_scales,
)
from quant.qat.activations import fake_quantize_gradient
from task.calibration import calibrate_activations
from task.data.dataset import Images, load_dataset
from task.data.partition import client_images
from task.data.to_input import to_input
from task.models import build_model

Rounding = Callable[[Tensor], Tensor]
Gradients = dict[str, Tensor]


@dataclass
class Squares:
    """Sums over batches of one layer's squared norms, and counts of output gradients that are zero.

    Attributes
    ----------
    exact : float
        Of the weight gradient in float32.
    nearest, draw, bias : float
        Of the difference from it: to nearest, of one stochastic draw, and of the mean of all draws
        after their noise is taken off.
    output, output_nearest, output_draw : float
        The same of the output gradient, each layer by itself: what reaches it is in float32.
    values, zeros, zeros_nearest, zeros_draw : float
        Output gradients, and how many of them are zero: before rounding and after either.
    """

    exact: float = 0.0
    nearest: float = 0.0
    draw: float = 0.0
    bias: float = 0.0
    output: float = 0.0
    output_nearest: float = 0.0
    output_draw: float = 0.0
    values: float = 0.0
    zeros: float = 0.0
    zeros_nearest: float = 0.0
    zeros_draw: float = 0.0


def to_nearest(gradient: Tensor, bits: int) -> Tensor:
    """Round to the nearest level of the grid that spans the largest magnitude."""
    step = gradient.abs().max() / largest_code(bits)
    return gradient.div(step).round_().mul_(step) if step > 0 else gradient


class Backward:
    """One batch through a prepared model, and back as often as asked, each time rounded again."""

    def __init__(self, model: nn.Module, images: Images, index: np.ndarray) -> None:
        self._weights = dict(layers_by_weight(model))
        self._rounding: Rounding = lambda gradient: gradient
        self.outputs: Gradients = {}
        with self._hooked():
            logits = model(to_input(images.pixels[index]))
            self._loss = F.cross_entropy(logits, torch.from_numpy(images.labels[index]))

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            def back(gradient: Tensor) -> Tensor:
                self.outputs[name] = gradient
                return self._rounding(gradient)

            def forward(layer: nn.Module, args: object, y: Tensor) -> None:
                y.register_hook(back)

            return forward

        handles = [w.layer.register_forward_hook(hook(n)) for n, w in self._weights.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weight_gradients(self, rounding: Rounding = lambda gradient: gradient) -> Gradients:
        """Return the rounded weight gradients, after output gradients that were rounded too."""
        self._rounding = rounding
        weights = [weight.parameter for weight in self._weights.values()]
        gradients = torch.autograd.grad(self._loss, weights, retain_graph=True)
        return {n: rounding(g) for n, g in zip(self._weights, gradients, strict=True)}


def measure(backward: Backward, bits: int, draws: int, sums: dict[str, Squares]) -> None:
    """Add what one batch shows to the sums."""
    generator = torch.Generator().manual_seed(0)

    def stochastic(gradient: Tensor) -> Tensor:
        return fake_quantize_gradient(gradient, bits, generator)

    exact = backward.weight_gradients()
    outputs = dict(backward.outputs)
    nearest = backward.weight_gradients(lambda gradient: to_nearest(gradient, bits))
    mean = {name: torch.zeros_like(g) for name, g in exact.items()}
    squares = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        for name, drawn in backward.weight_gradients(stochastic).items():
            difference = drawn - exact[name]
            mean[name] += difference / draws
            squares[name] += squared_norm(difference) / draws
    for name, gradient in exact.items():
        found = sums.setdefault(name, Squares())
        found.exact += squared_norm(gradient)
        found.nearest += squared_norm(nearest[name] - gradient)
        found.draw += squares[name]
        # |mean|^2 = |bias|^2 + variance / draws, and one draw's square is |bias|^2 + variance.
        found.bias += (draws * squared_norm(mean[name]) - squares[name]) / (draws - 1)
        output = outputs[name]
        rounded, drawn = to_nearest(output, bits), stochastic(output)
        found.output += squared_norm(output)
        found.output_nearest += squared_norm(rounded - output)
        found.output_draw += squared_norm(drawn - output)
        found.values += output.numel()
        found.zeros += zeros(output)
        found.zeros_nearest += zeros(rounded)
        found.zeros_draw += zeros(drawn)


def squared_norm(tensor: Tensor) -> float:
    """Return the squared norm."""
    return float(tensor.double().square().sum())


def zeros(tensor: Tensor) -> float:
    """Return how many values are zero."""
    return float((tensor == 0).sum())


def model_of(run: Path, bits: int) -> tuple[nn.Module, Images, Settings]:
    """Return a run's last model as a strict client trains it, with the client's images."""
    known = json.loads((run / "config.json").read_text())["settings"]
    settings = Settings.of_run(known)
    data = load_dataset(settings)
    model = build_model(settings.model, data.channels, data.size, data.num_classes, settings.seed)
    load_state(model, load_file(run / "model.safetensors"))
    rounded = quantize_model(model, bits)
    load_state(model, rounded.dequantize())
    prepare(model, QuantConfig(bits, settings.activation_bits_of(bits)))
    set_scales(model, rounded.scales)
    images = client_images(settings, 0, 10)
    calibrate_activations(model, images)
    return model.train(), images, settings


def table(sums: dict[str, Squares]) -> str:
    """Return a Markdown table; all figures in percent."""
    heads = ["layer", "zero before", "zero, nearest", "zero, stochastic"]
    heads += ["output gradient: error, nearest", "error, stochastic"]
    heads += ["weight gradient: error = bias, nearest", "error, stochastic", "bias, stochastic"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, s in [*sums.items(), ("all", total(list(sums.values())))]:
        shares = [count / s.values for count in (s.zeros, s.zeros_nearest, s.zeros_draw)]
        ratios = [s.output_nearest / s.output, s.output_draw / s.output]
        ratios += [s.nearest / s.exact, s.draw / s.exact, max(s.bias, 0.0) / s.exact]
        figures = [*shares, *np.sqrt(ratios)]
        lines.append(f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in figures)} |")
    return "\n".join(lines)


def total(layers: list[Squares]) -> Squares:
    """Return the sums over all layers."""
    return Squares(*(sum(column) for column in zip(*map(astuple, layers), strict=True)))


def main() -> None:
    """Read a run, pass batches back, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="record of a finished run")
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--gradient-bits", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--draws", type=int, default=64, help="of the stochastic rounding, a batch")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, images, settings = model_of(given.run, given.bits)
    order = np.random.default_rng(0).permutation(len(images))
    sums: dict[str, Squares] = {}
    for batch in range(given.batches):
        index = order[batch * settings.batch_size :][: settings.batch_size]
        measure(Backward(model, images, index), given.gradient_bits, given.draws, sums)
    print(table(sums))


if __name__ == "__main__":
    main()
