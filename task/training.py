"""Local training at a bit-width, independent of the federation."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from core.devices import device_of
from core.errors import SettingsError
from core.seeds import Stream, derive_seed, seed_torch
from core.settings import Upload
from quant import (
    FLOAT_BITS,
    SGD,
    AdamW,
    IntegerSGD,
    QuantConfig,
    StrictAdamW,
    StrictSGD,
    Update,
    federated_state,
    is_finite,
    quantize_state,
    refit_scales,
    scale_gradients,
    set_generator,
    tensors_of,
    ternary_scales,
    upload_bits,
    weight_scales,
)
from task.at_width import check_trained_in_integers, prepare_for
from task.calibration import calibrate_activations
from task.evaluation import Score
from task.examples import Examples, MetricSums
from task.hyperparameters import LocalTraining

# AdamW's own default.
_BETA2 = 0.999


class DivergedError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Trained:
    """What local training gives.

    Attributes
    ----------
    update : Update
        What it was asked to send of its weights.
    moved : dict of str to Tensor
        Float32 difference between the weights that training ended and began with, as the client
        holds them: in strict and integer training they lie on the grid, in qat they are the latent
        ones.
    steps : int
        Optimizer steps taken.
    score : Score
        Mean training loss and accuracy.
    """

    update: Update
    moved: dict[str, Tensor]
    steps: int
    score: Score


def train(
    model: nn.Module,
    examples: Examples,
    config: LocalTraining,
    seed: int,
    *,
    scales: Mapping[str, Tensor] | None = None,
    correction: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    upload: Upload = "forward",
    dither: int = 0,
    upload_scales: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Train a model on a client's examples at the client's width.

    Parameters
    ----------
    model : nn.Module
        Ordinary model with the received weights; becomes quantization-aware below 32 bits.
    examples : Examples
        The client's data.
    config : LocalTraining
        Width and hyperparameters.
    seed : int
        Seeds the order of the data, dropout and stochastic rounding.
    scales : mapping of str to Tensor, optional
        Scales of weights that were received on their grid; fitted where not given.
    correction : mapping of str to Tensor, optional
        Subtracted from the gradient of the parameters it names (gradient tracking).
    device : torch.device, optional
        Where the model trains, and is brought back to the CPU from; the CPU by default.
    upload : {"forward", "dithered", "stored"}
        What is sent of a low-bit client's weights (`quant.upload`).
    dither : int
        Seed of the dither, from 1, if they are dithered.
    upload_scales : mapping of str to Tensor, optional
        In qat, scales of the grid on which the weights are sent; by default those that fit them.

    Returns
    -------
    Trained
    """
    seed_torch(seed, device)
    rng = np.random.default_rng(seed)
    names = federated_state(model).keys()
    if config.bits != FLOAT_BITS:
        widths = QuantConfig(config.bits, config.activation_bits, config.gradient_bits)
        prepare_for(model, widths, config.low_bit_training, config.weight_step, scales)
    elif config.low_bit_training == "integer":
        check_trained_in_integers(model, type(model).__name__)
    model.to(device)
    if config.bits != FLOAT_BITS:
        calibrate_activations(model, examples)
    # Not the numbers that dropout draws.
    noise = torch.Generator(device_of(model)).manual_seed(derive_seed(seed, Stream.ROUNDING))
    set_generator(model, noise)
    optimizer = _optimizer(model, config, noise)
    began = {name: tensor.clone().cpu() for name, tensor in tensors_of(model, names).items()}
    added = _Added(model, config, correction or {}, device)
    score, steps = _take_steps(model, examples, config, optimizer, added, rng, device)
    model.cpu()
    trained = tensors_of(model, names)
    _check_weights(trained, began, steps)
    moved = {name: tensor - began[name] for name, tensor in trained.items()}
    if config.low_bit_training == "qat":
        refit_scales(model)
    own = weight_scales(model)
    if config.low_bit_training == "qat" and upload_scales:
        own = dict(upload_scales)
    update = _upload(trained, own, config, upload, dither)
    return Trained(update, moved, steps, score)


class _Added:
    """What is added to the gradients: the proximal term's, and the correction of the client's.

    Both are in the units of SGD's gradient, also where steps have others.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LocalTraining,
        correction: Mapping[str, Tensor],
        device: torch.device | None,
    ) -> None:
        self._unit = config.learning_rate / config.step_size
        self._mu = config.proximal_mu
        self._anchored = []
        if self._mu:
            trained = [p for p in model.parameters() if p.requires_grad]
            self._anchored = [(p, p.detach().clone()) for p in trained]
        offsets = {name: tensor.to(device) for name, tensor in correction.items()}
        self._corrected = [(p, offsets[n]) for n, p in model.named_parameters() if n in offsets]

    def to_gradients(self) -> None:
        """Add it; a parameter without a gradient took no part, and does not move."""
        for parameter, anchor in self._anchored:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._mu * self._unit)
        for parameter, offset in self._corrected:
            if parameter.grad is not None:
                parameter.grad.sub_(offset, alpha=self._unit)


def _take_steps(
    model: nn.Module,
    examples: Examples,
    config: LocalTraining,
    optimizer: torch.optim.Optimizer,
    added: _Added,
    rng: np.random.Generator,
    device: torch.device | None,
) -> tuple[Score, int]:
    """Pass over the examples; return mean loss and metrics, and the number of steps."""
    model.train()
    loss_sum, sums, seen, steps = 0.0, MetricSums(), 0, 0
    for epoch in range(config.epochs):
        if epoch and config.low_bit_training == "qat":
            refit_scales(model)
        for index in _batches(len(examples), config.batch_size, rng):
            inputs, targets = examples.batch(index, device)
            outputs = model(inputs)
            loss = examples.loss(outputs, targets)
            value = float(loss.detach())
            if not isfinite(value):
                raise DivergedError(f"training diverged: the loss of step {steps + 1} is {value}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.low_bit_training == "integer":
                scale_gradients(model)
            added.to_gradients()
            _check_gradients(model, steps + 1)
            optimizer.step()
            steps += 1
            loss_sum += value * len(index)
            with torch.no_grad():
                sums.add(examples.metrics(outputs, targets))
            seen += len(index)
    return Score.of(loss_sum / seen, sums, len(examples)), steps


def _check_weights(trained: Mapping[str, Tensor], began: Mapping[str, Tensor], steps: int) -> None:
    for name, tensor in trained.items():
        if tensor.shape != (shape := began[name].shape):
            raise SettingsError(
                f"model: {name} has shape {list(tensor.shape)} after training; it must stay "
                f"{list(shape)}"
            )
        if not is_finite(tensor):
            raise DivergedError(f"training diverged: {name} is not finite after {steps} steps")


def _upload(
    weights: dict[str, Tensor],
    scales: dict[str, Tensor],
    config: LocalTraining,
    form: Upload,
    dither: int,
) -> Update:
    """Return what a client sends of the weights that it holds, on the scales of its grid."""
    bits = upload_bits(config.bits, config.low_bit_training, form)
    if config.in_integers and form != "stored":
        scales = ternary_scales(weights, scales)
    return quantize_state(weights, bits, None if bits == FLOAT_BITS else scales, dither=dither)


def _check_gradients(model: nn.Module, step: int) -> None:
    """Refuse a gradient that is not finite: on a grid it would become an ordinary step."""
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # One call for all; the norm of finite gradients may overflow.
    if isfinite(get_total_norm(named.values())):
        return
    for name, gradient in named.items():
        if not is_finite(gradient):
            raise DivergedError(
                f"training diverged: the gradient of {name} in step {step} is not finite"
            )


def _optimizer(
    model: nn.Module, config: LocalTraining, noise: torch.Generator
) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    own: dict[str, Any] = {"lr": rate, "weight_decay": decay}
    if config.optimizer == "adamw":
        own["betas"] = (config.momentum, _BETA2)
    else:
        own["momentum"] = config.momentum
    if config.in_integers:
        rate = config.integer_learning_rate
        parameters = dict(model.named_parameters())
        return IntegerSGD(parameters, config.bits, lr=rate, generator=noise)
    if config.bits == FLOAT_BITS or config.low_bit_training == "qat":
        return (AdamW if config.optimizer == "adamw" else SGD)(model.parameters(), **own)
    return (StrictAdamW if config.optimizer == "adamw" else StrictSGD)(
        model.named_parameters(),
        weight_scales(model),
        config.bits,
        gradient_bits=config.gradient_bits,
        generator=noise,
        **own,
    )


def _batches(count: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        # BatchNorm cannot train on a single image; it joins the batch before.
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches
