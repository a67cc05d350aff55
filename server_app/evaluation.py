"""The global model at each bit-width, on held-out images; and its logits for distillation."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant import FLOAT_BITS
from task.data import Images
from task.settings import Settings
from task.training import (
    Score,
    at_width,
    calibrate_normalization,
    evaluate,
    load_state,
    model_state,
    to_input,
)

# Images of the buffer that the distillation term looks at.
_DISTILLATION_IMAGES = 64


class Evaluator:
    """Brings a float32 model to a bit-width as a client would, and evaluates it.

    Parameters
    ----------
    settings : Settings
        Activation width and whether BatchNorm statistics are recalibrated.
    model : nn.Module
        Architecture.
    images : Images
        What models are evaluated on.
    buffer : ndarray
        The server's unlabelled images, uint8.
    """

    def __init__(
        self, settings: Settings, model: nn.Module, images: Images, buffer: np.ndarray
    ) -> None:
        self._settings = settings
        self._model = copy.deepcopy(model)
        self._images = images
        self._buffer = buffer

    def model_at(self, state: Mapping[str, Tensor], bits: int) -> nn.Module:
        """Return the model as a client of a width would use it."""
        load_state(self._model, dict(state))
        model = at_width(self._model, self._settings, bits)
        if self._settings.calibrate_normalization:
            calibrate_normalization(model, self._buffer)
        return model

    def score(self, state: Mapping[str, Tensor], bits: int) -> Score:
        """Evaluate the model at a width on all those images."""
        return evaluate(self.model_at(state, bits), self._images)

    def deployable(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the float32 model as it is evaluated at 32 bits, with its statistics."""
        return model_state(self.model_at(state, FLOAT_BITS))


def make_predict(
    model: nn.Module, buffer: np.ndarray
) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """Return ``f(u; w)``: differentiable logits on some of the buffer; None without a buffer.

    BatchNorm uses the statistics of the images at hand, as no others fit weights in the making.
    """
    if not len(buffer):
        return None
    network = copy.deepcopy(model).train()
    images = to_input(buffer[:_DISTILLATION_IMAGES])
    buffers = {name: b.clone() for name, b in network.named_buffers()}

    def predict(weights: Mapping[str, Tensor]) -> Tensor:
        parameters = {n: weights[n] for n, _ in network.named_parameters()}
        # Fresh buffers each time: training mode writes its running statistics into them.
        fresh = {name: b.clone() for name, b in buffers.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return functional_call(network, {**parameters, **fresh}, (images,))

    return predict
