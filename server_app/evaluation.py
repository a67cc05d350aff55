"""The global model at each bit-width, on held-out examples; and its logits for distillation."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.devices import pick_device
from core.seeds import Stream, derive_seed, drawn_under
from core.settings import Settings
from quant import Update, load_state, quantize_state, weight_scales
from task.at_width import at_width, ready_to_evaluate
from task.calibration import calibrate_activations, round_weights
from task.evaluation import Score, evaluate
from task.examples import Examples, Inputs

# Examples of the buffer that the distillation term looks at.
_DISTILLATION_EXAMPLES = 64


class Evaluator:
    """Brings a float32 model to a bit-width as a client would, and evaluates it.

    Parameters
    ----------
    settings : Settings
        Activation width, whether BatchNorm statistics are recalibrated, and the server's device.
    model : nn.Module
        Architecture.
    examples : Examples or None
        What models are evaluated on; None where the server has no test set.
    buffer : Inputs
        The server's unlabelled examples.
    """

    def __init__(
        self, settings: Settings, model: nn.Module, examples: Examples | None, buffer: Inputs
    ) -> None:
        self._settings = settings
        self._model = copy.deepcopy(model)
        self._examples = examples
        self._buffer = buffer
        self._device = pick_device(settings.server_device)

    def network(self, model: Update) -> nn.Module:
        """Return a network that computes with a model at its width, as a client of it would."""
        load_state(self._model, model.dequantize())
        return ready_to_evaluate(
            self._model, self._settings, model.bits, model.scales, self._buffer, self._device
        )

    @property
    def has_examples(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self._examples is not None

    def score(self, model: Update, server_round: int = 0) -> Score:
        """Evaluate a model at its width on all those examples; a round draws its own numbers."""
        assert self._examples is not None, "asked only where has_examples"
        seed = derive_seed(self._settings.seed, Stream.EVALUATION, server_round)
        return evaluate(self.network(model), self._examples, seed)


class CalibratedRounding:
    """Rounds a float32 model to a bit-width for the server's buffer (`task.round_weights`).

    The model that a round ends with is evaluated and then sent: the last one of each width is kept.

    Parameters
    ----------
    settings, model, buffer
        As of `Evaluator`.
    """

    def __init__(self, settings: Settings, model: nn.Module, buffer: Inputs) -> None:
        self._settings = settings
        self._model = copy.deepcopy(model)
        self._buffer = buffer
        self._device = pick_device(settings.server_device)
        self._last: dict[int, tuple[Mapping[str, Tensor], Update]] = {}

    def __call__(self, state: Mapping[str, Tensor], bits: int) -> Update:
        """Return the model at a width below 32 bits."""
        known, update = self._last.get(bits, ({}, None))
        if update is None or not all(torch.equal(known[n], t) for n, t in state.items()):
            update = self._round(state, bits)
            self._last[bits] = (state, update)
        return update

    def _round(self, state: Mapping[str, Tensor], bits: int) -> Update:
        load_state(self._model, dict(state))
        # Not of a round: what the last one ended with is what the next begins with.
        with drawn_under(self._settings.seed, Stream.CALIBRATION):
            return self._rounded(state, bits)

    def _rounded(self, state: Mapping[str, Tensor], bits: int) -> Update:
        network = at_width(self._model, self._settings, bits)
        scales = weight_scales(network)
        network.to(self._device)
        calibrate_activations(network, self._buffer)
        rounded = round_weights(network, self._buffer)
        # A layer that the examples do not reach is rounded to nearest.
        nearest = quantize_state(state, bits, scales)
        return replace(nearest, quantized={**nearest.quantized, **rounded})


def _gives_logits(network: nn.Module, inputs: Any) -> bool:
    network.eval()  # A user's own may return nothing.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return isinstance(network(inputs), Tensor)


def make_predict(
    model: nn.Module, buffer: Inputs, device: torch.device | None = None
) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """Return ``f(u; w)``: differentiable logits on some of the buffer; None without a buffer.

    And for a network that gives anything but a tensor: there is nothing to distil.

    BatchNorm uses the statistics of the inputs at hand, as no others fit weights in the making.
    Dropout draws from torch's own generator, which the caller seeds.
    """
    if not len(buffer):
        return None
    network = copy.deepcopy(model).to(device)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    if not _gives_logits(network, buffer.inputs(slice(2), device)):
        return None
    network.train()
    inputs = buffer.inputs(slice(_DISTILLATION_EXAMPLES), device)

    def predict(weights: Mapping[str, Tensor]) -> Tensor:
        parameters = {n: weights[n].to(device) for n, _ in network.named_parameters()}
        # Fresh buffers each time: training mode writes its running statistics into them.
        fresh = {name: b.clone() for name, b in buffers.items()}
        logits: Tensor = functional_call(network, {**parameters, **fresh}, (inputs,))
        return logits.cpu()

    return predict
