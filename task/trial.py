"""A trial of a model at a bit-width, before the first round: what a client of it would do."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from core.devices import device_of
from core.errors import SettingsError
from core.reference import users_code
from core.seeds import seed_torch
from core.settings import Settings
from quant import LayerWeight, federated_state, layers_by_weight, load_state
from task.at_width import at_width
from task.calibration import calibrate_activations
from task.examples import Inputs, Measures, tensors_in

# What a model is tried with.
_FIRST_TWO = slice(2)


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
    name = settings.model_name

    def trying(what: str) -> AbstractContextManager[None]:
        return users_code(f"model: {name!r} cannot be {what} at {bits} bits")

    with trying("loaded"):
        network = at_width(model, settings, bits)
        load_state(network, federated_state(model))
    with trying("calibrated"):
        calibrate_activations(network, examples)
    with trying("trained"):
        _try_step(network, examples, name)
        around = _computed_around(network, examples)
    if around:
        raise SettingsError(
            f"model: {name!r} computes with {around} outside of its layer's forward pass, where "
            "the weight is not quantized"
        )


def _try_step(network: nn.Module, examples: Inputs, name: str) -> None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        network.train()  # A user's own may return nothing.
        outputs = network(examples.inputs(_FIRST_TWO, device_of(network)))
        tensors = [tensor.float() for tensor in tensors_in(outputs)]
        if not (isinstance(outputs, Tensor) or (tensors and _has_own_loss(examples))):
            raise SettingsError(
                f"model: {name!r} gives a {type(outputs).__name__} in training, not logits; "
                "allowed: tensors in a mapping or sequence too, where the task has its own loss"
            )
        largest = [tensor.amax() for tensor in tensors if tensor.requires_grad]
        torch.stack(largest).sum().backward()


def _has_own_loss(examples: Inputs) -> bool:
    """Whether the task's loss may make something of any output."""
    measures: Measures = getattr(examples, "measures", Measures())
    return type(measures).loss is not Measures.loss


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
        outputs = network(examples.inputs(_FIRST_TWO, device_of(network)))
        return torch.cat([tensor.float().flatten() for tensor in tensors_in(outputs)])


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
