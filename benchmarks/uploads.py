"""What an upload does to the mean that is taken of it, in integer training.

    python -m benchmarks.uploads [--rounds 12] [--picture collapse.svg]

Ten clients on scikit-learn's digits, half of them in WAGE's integer training with 8-bit weights
that compute as ternary ones, half in Float32. The low-bit clients send their ternary weights,
rounded to nearest or with a dither, or the 8-bit weights that they store; the server takes each for
the weights themselves (as FedAvg does), or for a movement from the same rounding of the client's
start (as ProWD does). As the trained clients are at hand, the movement that they really made is
known.

Printed for each: the share of the server's weights close to a ternary level after the first and the
last round; of the low-bit group's mean movement in the last rounds, as shares of its norm, the pull
of the levels, the bias that remains beside it and the deviation from draw to draw; and the accuracy
of the float32 model.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.drift import flat
from core.seeds import Stream, derive_seed
from core.settings import Settings
from prowd.publish.figures import save
from quant import (
    FLOAT_BITS,
    WeightedMean,
    federated_state,
    load_state,
    quantizable_weights,
    quantize_state,
)
from quant.lowbit.integer import stored
from quant.upload import ternary_scales
from task.at_width import ready_to_evaluate
from task.evaluation import evaluate
from task.hyperparameters import LocalTraining
from task.interface import Node
from task.tasks import make_task
from task.training import train

State = dict[str, Tensor]

_CLIENTS, _LOW, _BITS, _TERNARY = 10, 5, 8, 2
_LEVELS, _CLOSE = (-0.5, 0.0, 0.5), 0.06
# Of the last rounds, the movement's error is measured over so many draws of the dither.
_MEASURED, _DRAWS = 3, 8


@dataclass(frozen=True)
class Upload:
    """What low-bit clients send, and what the server takes it for.

    Attributes
    ----------
    name : str
        For the table.
    bits : int
        Width of what is sent.
    dithered : bool
        Whether it is rounded with a dither, or to nearest.
    from_start : bool
        Whether the same rounding of the client's start is subtracted.
    """

    name: str
    bits: int
    dithered: bool
    from_start: bool

    def movement(self, end: State, held: State, start: State, seed: int) -> State:
        """Return what the server takes a client's quantized weights to have moved by.

        Parameters
        ----------
        end, held : dict of str to Tensor
            8-bit weights that a client stores after and before its training.
        start : dict of str to Tensor
            Float32 weights that it was sent.
        seed : int
            Of the dither.
        """
        reference = self._sent(held, seed) if self.from_start else start
        return {name: value - reference[name] for name, value in self._sent(end, seed).items()}

    def _sent(self, weights: State, seed: int) -> State:
        if self.bits != _TERNARY:
            return weights
        return ternary_form(weights, seed if self.dithered else 0)


UPLOADS = (
    Upload("rounded to nearest, FedAvg", _TERNARY, dithered=False, from_start=False),
    Upload("rounded to nearest, from the start", _TERNARY, dithered=False, from_start=True),
    Upload("dithered, FedAvg", _TERNARY, dithered=True, from_start=False),
    Upload("dithered, from the start", _TERNARY, dithered=True, from_start=True),
    Upload("stored, FedAvg", _BITS, dithered=False, from_start=False),
)


@dataclass
class Figures:
    """What was measured of one upload.

    Attributes
    ----------
    close : list of float
        Share of the server's quantized weights close to a level, by round.
    pull, bias, deviation : list of float
        Of each measured round.
    accuracy : float
        Of the float32 model after the last round.
    """

    close: list[float] = field(default_factory=list)
    pull: list[float] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def ternary_form(weights: State, dither: int = 0) -> State:
    """Return the ternary weights, rounded with a dither or, of seed 0, to nearest."""
    scales = ternary_scales(weights, weights)
    return quantize_state(weights, _TERNARY, scales, dither=dither).dequantize()


def mean_of(states: list[State]) -> State:
    """Return the mean of state dicts, all of one weight."""
    added = WeightedMean()
    for state in states:
        added.add(state, 1.0)
    return added.mean()


def share_close(weights: Tensor) -> float:
    """Return the share of weights within 0.06 of -0.5, 0 or 0.5.

    >>> share_close(torch.tensor([0.05, 0.3, -0.52, 0.9]))
    0.5
    """
    gaps = [(weights - level).abs() for level in _LEVELS]
    return float((torch.stack(gaps).amin(0) < _CLOSE).double().mean())


def split_error(error: Tensor, toward: Tensor) -> tuple[float, Tensor]:
    """Split an error into a multiple of a direction, and what is left of it.

    >>> split_error(torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0]))
    (0.5, tensor([0., 1.]))
    """
    multiple = float(error @ toward / (toward @ toward))
    return multiple, error - multiple * toward


def measure(
    upload: Upload, pairs: list[tuple[State, State]], start: State, figures: Figures
) -> None:
    """Compare the low-bit group's mean movement as it was and as the server sees it.

    Parameters
    ----------
    upload : Upload
        How it is sent.
    pairs : list of tuple
        Of each low-bit client the 8-bit weights before and after its training.
    start : dict of str to Tensor
        Float32 weights that they were sent.
    figures : Figures
        Where to note it.
    """
    true = flat(mean_of([{n: end[n] - held[n] for n in end} for held, end in pairs]))
    ternary = ternary_form(start)
    toward = flat({name: ternary[name] - start[name] for name in start})
    errors = []
    for draw in range(_DRAWS):
        seen = [
            upload.movement(end, held, start, derive_seed(draw, Stream.DITHER, client))
            for client, (held, end) in enumerate(pairs)
        ]
        errors.append(flat(mean_of(seen)) - true)
    drawn = torch.stack(errors)
    variance = float(drawn.var(0).sum())
    pull, left = split_error(drawn.mean(0), toward)
    # |mean|^2 is |bias|^2 + variance / draws.
    bias = max(float(left @ left) - variance / _DRAWS, 0.0)
    size = float(true @ true)
    figures.pull.append(pull)
    figures.bias.append((bias / size) ** 0.5)
    figures.deviation.append((variance / size) ** 0.5)


def run(upload: Upload, rounds: int) -> Figures:
    """Train a federation whose low-bit clients send one kind of upload."""
    settings = Settings(
        model="vgg7-x0.5",
        low_bit_training="integer",
        learning_rate=0.2,
        batch_size=20,
        samples_per_client=100,
    )
    task = make_task(settings)
    model = task.model(settings.seed)
    names = quantizable_weights(model)
    figures = Figures()
    state = {name: tensor.clone() for name, tensor in federated_state(model).items()}
    for number in range(1, rounds + 1):
        start = {name: state[name] for name in names}
        moved, pairs = [], []
        for client in range(_CLIENTS):
            bits = _BITS if client < _LOW else FLOAT_BITS
            network = task.model(settings.seed)
            load_state(network, state)
            config = LocalTraining.of(settings, bits, number, 0.0)
            seed = derive_seed(settings.seed, Stream.CLIENT, number, client)
            trained = train(
                network, task.examples(Node(client, _CLIENTS)), config, seed, upload="stored"
            )
            movement = dict(trained.moved)
            if bits == _BITS:
                held = {name: stored(start[name], _BITS) for name in names}
                end = {name: held[name] + movement[name] for name in names}
                movement |= upload.movement(end, held, start, seed)
                pairs.append((held, end))
            moved.append(movement)
        if number > rounds - _MEASURED:
            measure(upload, pairs, start, figures)
        step = mean_of(moved)
        state = {name: tensor + step[name] for name, tensor in state.items()}
        figures.close.append(share_close(flat({name: state[name] for name in names})))
    network = task.model(settings.seed)
    load_state(network, state)
    inputs, test = task.unlabelled(), task.test_data()
    assert test is not None
    ready = ready_to_evaluate(network, settings, FLOAT_BITS, {}, inputs)
    figures.accuracy = evaluate(ready, task.as_examples(test)).accuracy
    return figures


def table(found: Mapping[str, Figures]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| low-bit clients send | close to a level, first and last round | pull of the levels | "
        "bias beside it | deviation | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, f in found.items():
        lines.append(
            f"| {name} | {f.close[0]:.0%}, {f.close[-1]:.0%} | {mean(f.pull):.2f} | "
            f"{mean(f.bias):.2f} | {mean(f.deviation):.2f} | {f.accuracy:.1%} |"
        )
    return "\n".join(lines)


def draw(found: Mapping[str, Figures], path: Path) -> None:
    """Draw the share of weights close to a level by round."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, f in found.items():
        axes.plot(range(1, len(f.close) + 1), [100 * share for share in f.close], label=name)
    axes.set(xlabel="round", ylabel="% of weights close to a level", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    """Run all uploads, print the table, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {upload.name: run(upload, arguments.rounds) for upload in UPLOADS}
    print(table(found))
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
