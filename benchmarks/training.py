"""Local training at low bit-widths against float32 training of the same network."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import Figure, ratio, report, side_by_side
from task.data.dataset import Images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

_IMAGES, _REPEATS = 640, 9
_FORMS = {
    "weights": (LocalTraining(4), 1.10),
    "weights and activations": (LocalTraining(4, activation_bits=4), 1.45),
    "strict": (LocalTraining(4, "strict", activation_bits=4, gradient_bits=8), 1.9),
}


def main() -> None:
    """Train each form in turns with float32, twenty steps at a time."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for name in ("resnet8", "resnet20"):
        calls = {"float32": _training(name, LocalTraining(32))}
        calls |= {form: _training(name, config) for form, (config, _) in _FORMS.items()}
        seconds = side_by_side(calls, _REPEATS)
        for form, (_, goal) in _FORMS.items():
            label = f"{name}, {form}, against float32"
            figures.append(ratio(label, seconds[form], seconds["float32"], goal))
    report("training", figures)


def _training(name: str, config: LocalTraining) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (_IMAGES, 3, 32, 32)).astype(np.uint8)
    images = Images(pixels, rng.integers(0, 10, _IMAGES))
    return lambda: train(build_model(name, 3, 32, 10, seed=0), images, config, seed=0)
