"""Local training and evaluation at a bit-width, independent of the federation."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from sys import float_info
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from core.arguments import check_number
from core.bits import check_width
from core.devices import device_of
from core.errors import SettingsError
from core.mix import check_client_bits
from core.reference import in_one_line
from core.seeds import Stream, derive_seed, drawn_under, seed_torch
from core.settings import LocalOptimizer, LowBitTraining, Settings, Upload
from quant import (
    FLOAT_BITS,
    SGD,
    AdamW,
    IntegerSGD,
    LayerWeight,
    QuantConfig,
    StrictAdamW,
    StrictSGD,
    Update,
    check_integer,
    federated_state,
    fixed_point,
    is_finite,
    layers_by_weight,
    load_state,
    prepare,
    prepare_integer,
    quantizable_weights,
    quantize_state,
    refit_scales,
    scale_gradients,
    set_generator,
    set_scales,
    tensors_of,
    ternary_scales,
    unsupported_layers,
    upload_bits,
    weight_scales,
)
from quant.lowbit.integer import sigma
from task.calibration import calibrate_activations, calibrate_normalization
from task.examples import Examples, Inputs, MetricSums, values_of

# AdamW's own default.
_BETA2 = 0.999
# Small enough for the cache: twice as fast as 500 on a CPU.
_EVALUATION_BATCH = 100
# What a model is tried with.
_FIRST_TWO = slice(2)
# A GPU is busy with more only; of larger examples, with fewer.
_EVALUATION_BATCH_ON_GPU, _MOST_VALUES_ON_GPU = 1000, 2**22


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round.

    Attributes
    ----------
    bits : int
        The client's width, 2 to 16, or 32 for plain float32 training.
    low_bit_training : {"qat", "strict", "integer"}
        Float latent weights with a straight-through gradient, weights on the grid, or weights on
        the grid that compute as ternary ones (`quant.lowbit.integer`).
    activation_bits, gradient_bits : int
        Widths of activations and of gradients below 32 bits.
    epochs, batch_size : int
        Passes over the data, and images a step.
    learning_rate, momentum, weight_decay : float
        Of the optimizer; AdamW's first beta is the momentum, and its second 0.999.
    proximal_mu : float
        Factor of ``mu / 2 |w - w_received|^2`` in the loss (Li et al., arXiv:1812.06127).
    weight_step : float
        One step for all weights (fixed point); 0 fits each channel's.
    integer_learning_rate : float
        Of `quant.IntegerSGD`.
    optimizer : {"sgd", "adamw"}
        What takes the steps; of weights on a grid, its strict form (`quant.lowbit.strict`).
    """

    bits: int
    low_bit_training: LowBitTraining = "qat"
    activation_bits: int = FLOAT_BITS
    gradient_bits: int = FLOAT_BITS
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    weight_step: float = 0.0
    integer_learning_rate: float = 8.0
    optimizer: LocalOptimizer = "sgd"

    def __post_init__(self) -> None:
        check_client_bits(self.bits, "bits")
        check_width("activation-bits", self.activation_bits)
        check_width("gradient-bits", self.gradient_bits)
        check_number("proximal-mu", self.proximal_mu, least=0)
        # The others have the bounds of the settings that they come from.
        Settings(
            low_bit_training=self.low_bit_training,
            local_epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            weight_step=self.weight_step,
            integer_learning_rate=self.integer_learning_rate,
        )

    @classmethod
    def of(cls, settings: Settings, bits: int, server_round: int, mu: float) -> "LocalTraining":
        """Take from the settings what a client of this width does in this round."""
        return cls(
            bits=bits,
            low_bit_training=settings.low_bit_training,
            activation_bits=settings.activation_bits_of(bits),
            gradient_bits=settings.gradient_bits_of(bits),
            epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            optimizer=settings.optimizer,
            learning_rate=_decayed(settings.learning_rate, settings, server_round),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            proximal_mu=mu,
            weight_step=settings.weight_step,
            integer_learning_rate=_decayed(settings.integer_learning_rate, settings, server_round),
        )

    @property
    def in_integers(self) -> bool:
        """Whether the weights move in whole steps of integer training."""
        return self.low_bit_training == "integer" and self.bits != FLOAT_BITS

    @property
    def step_size(self) -> float:
        """How far a gradient of 1 moves a weight."""
        return self.integer_learning_rate * sigma(8) if self.in_integers else self.learning_rate


def _decayed(rate: float, settings: Settings, server_round: int) -> float:
    # Above zero, however many rounds it decays.
    return max(rate * settings.learning_rate_decay ** (server_round - 1), float_info.min)


class DivergedError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Score:
    """Means over `num_examples` examples.

    Attributes
    ----------
    loss : float
        Mean loss.
    accuracy : float
        The first of the task's metrics: by default the share of right answers, 0 to 1.
    num_examples : int
        Examples.
    metrics : mapping of str to float
        All of its metrics.
    """

    loss: float
    accuracy: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, loss: float, sums: MetricSums, num_examples: int) -> "Score":
        """Make it of a loss and of metrics that were added up."""
        means = sums.means()
        return cls(loss, next(iter(means.values())), num_examples, means)


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

    Returns
    -------
    Trained
    """
    seed_torch(seed, device)
    rng = np.random.default_rng(seed)
    names = federated_state(model).keys()
    if config.bits != FLOAT_BITS:
        widths = QuantConfig(config.bits, config.activation_bits, config.gradient_bits)
        _prepare(model, widths, config.low_bit_training, config.weight_step, scales)
    elif config.low_bit_training == "integer":
        check_trained_in_integers(model, type(model).__name__)
    model.to(device)
    if config.bits != FLOAT_BITS:
        calibrate_activations(model, examples)
    anchored = []
    if config.proximal_mu:
        anchored = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    # Not the numbers that dropout draws.
    noise = torch.Generator(device_of(model)).manual_seed(derive_seed(seed, Stream.ROUNDING))
    set_generator(model, noise)
    optimizer = _optimizer(model, config, noise)
    began = {name: tensor.clone().cpu() for name, tensor in tensors_of(model, names).items()}
    correction = {n: tensor.to(device) for n, tensor in (correction or {}).items()}
    corrected = [(p, correction[n]) for n, p in model.named_parameters() if n in correction]
    # What is added to a gradient is in the units of SGD's, also where steps have others.
    unit = config.learning_rate / config.step_size
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
            for parameter, anchor in anchored:
                if parameter.grad is not None:  # It took no part, and does not move.
                    pull = config.proximal_mu * unit
                    parameter.grad.add_(parameter.detach() - anchor, alpha=pull)
            for parameter, offset in corrected:
                if parameter.grad is not None:
                    parameter.grad.sub_(offset, alpha=unit)
            _check_gradients(model, steps + 1)
            optimizer.step()
            steps += 1
            loss_sum += value * len(index)
            with torch.no_grad():
                sums.add(examples.metrics(outputs, targets))
            seen += len(index)
    model.cpu()
    trained = tensors_of(model, names)
    for name, tensor in trained.items():
        if tensor.shape != (shape := began[name].shape):
            raise SettingsError(
                f"model: {name} has shape {list(tensor.shape)} after training; it must stay "
                f"{list(shape)}"
            )
        if not is_finite(tensor):
            raise DivergedError(f"training diverged: {name} is not finite after {steps} steps")
    moved = {name: tensor - began[name] for name, tensor in trained.items()}
    if config.low_bit_training == "qat":
        refit_scales(model)
    score = Score.of(loss_sum / seen, sums, len(examples))
    update = _upload(trained, weight_scales(model), config, upload, dither)
    return Trained(update, moved, steps, score)


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


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, seed: int = 0) -> Score:
    """Return loss and metrics of a model on examples, where the model is.

    The seed is of what a model draws that draws random numbers in evaluation too.
    """
    with drawn_under(seed):
        return _evaluate(model, examples)


def _evaluate(model: nn.Module, examples: Examples) -> Score:
    model.eval()
    device = device_of(model)
    size, count = _EVALUATION_BATCH, len(examples)
    if not count:
        raise SettingsError(
            "local-test-share: there are no examples to evaluate on; allowed: a larger share, more "
            "examples, or test data of the task's own"
        )
    if device.type != "cpu":
        fitting = _MOST_VALUES_ON_GPU // max(values_of(examples.inputs(slice(1))), 1)
        size = max(size, min(fitting, _EVALUATION_BATCH_ON_GPU))
    loss, sums = 0.0, MetricSums()
    for start in range(0, count, size):
        end = min(start + size, count)
        # A slice, which copies nothing.
        inputs, targets = examples.batch(slice(start, end), device)
        outputs = model(inputs)
        loss += float(examples.loss(outputs, targets)) * (end - start)
        sums.add(examples.metrics(outputs, targets))
    return Score.of(loss / count, sums, count)


def at_width(
    model: nn.Module,
    settings: Settings,
    bits: int,
    scales: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a float32 model that computes at a bit-width, as a client of it would.

    `scales` are those of weights that came on their grid.
    """
    model = copy.deepcopy(model)
    if bits == FLOAT_BITS:
        return model
    widths = QuantConfig(bits, settings.activation_bits_of(bits))
    return _prepare(model, widths, settings.low_bit_training, settings.weight_step, scales)


def ready_to_evaluate(
    model: nn.Module,
    settings: Settings,
    bits: int,
    scales: Mapping[str, Tensor],
    examples: Inputs,
    device: torch.device | None = None,
) -> nn.Module:
    """Return a copy of a model at a bit-width with all that it takes from unlabelled examples.

    Parameters
    ----------
    model : nn.Module
        Float32 weights.
    settings : Settings
        Activation width and whether BatchNorm statistics are recalibrated.
    bits : int
        Width, 2 to 16, or 32.
    scales : mapping of str to Tensor
        Of weights that came on their grid.
    examples : Inputs
        The server's buffer, or a client's own.
    device : torch.device, optional
        Where the copy computes; the CPU by default.
    """
    network = at_width(model, settings, bits, scales)
    network.to(device)
    with drawn_under(settings.seed, Stream.CALIBRATION):
        calibrate_activations(network, examples)
        if settings.calibrate_normalization and len(examples) > 1:
            calibrate_normalization(network, examples, settings.server_buffer)
    return network


def check_quantizable(model: nn.Module, name: str) -> None:
    """Refuse a model of which nothing computes at a low bit-width.

    Raises
    ------
    SettingsError
        If it has no layer that is quantized (`quant.quantizable_weights`).
    """
    if quantizable_weights(model):
        return
    kinds = {type(m).__name__ for m in model.modules() if not list(m.children())}
    left = unsupported_layers(model)
    raise SettingsError(
        f"model: {name!r} has no layer to quantize, only {', '.join(sorted(kinds)) or 'none'}; "
        f"{left[0] if left else 'none of them has weights of two or more dimensions'}"
    )


def check_trained_in_integers(model: nn.Module, name: str) -> None:
    """Refuse a model that integer training cannot train.

    Raises
    ------
    SettingsError
        If it is not built of the layers that have an integer form (`quant.check_integer`).
    """
    try:
        check_integer(model)
    except ValueError as error:
        raise SettingsError(
            f"model: {name!r} with low-bit-training integer: {error}; allowed: vgg7, or a model of "
            "your own from quant.Scaled, IntegerInput, IntegerActivation and IntegerOutput"
        ) from None


def check_at_width(model: nn.Module, settings: Settings, bits: int, examples: Inputs) -> None:
    """Try what is done with a model at a bit-width: load, calibrate, and take a step.

    Parameters
    ----------
    examples : Inputs
        Two of them or more. As they have no labels, the step is that of the largest output.

    Raises
    ------
    SettingsError
        If the model does not allow it; the message says at what.
    """
    what = "be loaded"
    try:
        network = at_width(model, settings, bits)
        load_state(network, federated_state(model))
        what = "be calibrated"
        calibrate_activations(network, examples)
        what = "be trained"
        _try_step(network, examples, settings.model_name)
        around = _computed_around(network, examples)
    except SettingsError:
        raise
    except Exception as error:  # Whatever the user's code raises.
        raise SettingsError(
            f"model: {settings.model_name!r} cannot {what} at {bits} bits: {in_one_line(error)}"
        ) from None
    if around:
        raise SettingsError(
            f"model: {settings.model_name!r} computes with {around} outside of its layer's forward "
            "pass, where the weight is not quantized"
        )


def _try_step(network: nn.Module, examples: Inputs, name: str) -> None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        network.train()  # A user's own may return nothing.
        outputs = network(examples.inputs(_FIRST_TWO, device_of(network)))
        if not isinstance(outputs, Tensor):
            raise SettingsError(
                f"model: {name!r} gives a {type(outputs).__name__} in training, not logits"
            )
        outputs.float().amax().backward()


@torch.no_grad()
def _computed_around(network: nn.Module, examples: Inputs) -> str:
    """Return a weight that is computed with as it is, not on its grid; empty if there is none.

    Then what a network gives changes with where in its cell of the grid a weight lies.
    """
    layers = dict(layers_by_weight(network))
    for training in (True, False):
        before = _logits(network, examples, training)
        with _on_grid(layers.values()):
            if torch.equal(_logits(network, examples, training), before):
                continue
        if not torch.equal(_logits(network, examples, training), before):
            continue  # It gives other logits each time, whatever the weights are.
        for name, layer in layers.items():
            with _on_grid([layer]):
                if not torch.equal(_logits(network, examples, training), before):
                    return name
    return ""


def _logits(network: nn.Module, examples: Inputs, training: bool) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        network.train(training)
        return cast(Tensor, network(examples.inputs(_FIRST_TWO, device_of(network))))


@contextmanager
def _on_grid(weights: Collection[LayerWeight]) -> Iterator[None]:
    """Put some weights on their grids, on which their layers see them anyway."""
    before = [weight.parameter.clone() for weight in weights]
    for weight in weights:
        weight.parameter.copy_(weight.quantized())
    try:
        yield
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight.parameter.copy_(values)


def _prepare(
    model: nn.Module,
    config: QuantConfig,
    low_bit_training: LowBitTraining,
    weight_step: float,
    scales: Mapping[str, Tensor] | None,
) -> nn.Module:
    if low_bit_training == "integer":
        check_trained_in_integers(model, type(model).__name__)
        # Its grid is that of the width, whatever the weights came on.
        return prepare_integer(model, config)
    check_quantizable(model, type(model).__name__)
    prepare(model, config)
    if weight_step:
        names = quantizable_weights(model)
        set_scales(model, fixed_point(model.state_dict(), names, weight_step))
    set_scales(model, scales or {})
    return model


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
