"""What task and model must do, tried before the first round; and what a server must do without."""

from dataclasses import replace
from logging import INFO

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.common.logger import log
from torch import Tensor, nn

from core.errors import SettingsError
from core.reference import in_one_line, is_reference, users_code
from core.settings import Settings
from quant import FLOAT_BITS, federated_state, quantizable_weights
from strategies import StrategyContext
from task.at_width import check_quantizable, check_trained_in_integers
from task.examples import Examples, Inputs
from task.interface import Facts, Task
from task.model_checks import check_model, check_repeatable
from task.trial import check_at_width


def check_task(task: Task, facts: Facts, evaluation: Examples | None) -> None:
    """Refuse what could not be sent, or evaluated, in any round."""
    name = task.settings.task
    try:
        ConfigRecord(dict(facts))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"task: facts of {name!r} cannot be sent ({in_one_line(error)}); allowed: numbers, "
            "texts, and lists of one of these, under texts"
        ) from None
    for which in ("metric_range", "loss_range"):
        least, most = getattr(task, which)
        if not least < most:
            raise SettingsError(f"task: {which} of {name!r} is {least}, {most}; allowed: rising")
    if evaluation is not None and not len(evaluation):
        raise SettingsError(f"task: test_data of {name!r} has no examples; allowed: some, or None")
    on_devices = type(task).local_test_data is Task.local_test_data
    if evaluation is None and on_devices and not task.settings.local_test_share:
        raise SettingsError(
            f"local-test-share: 0, and the server has no test set of {name!r}; allowed: above 0"
        )


def check_measures(task: Task, model: nn.Module, evaluation: Examples | None) -> None:
    """Ask for loss and metrics of two examples, before they are asked for in every round."""
    if evaluation is None or len(evaluation) < 2 or not is_reference(task.settings.task):
        return
    name = task.settings.task
    with users_code(f"task: loss and metrics of {name!r} fail on two examples"), torch.no_grad():
        inputs, targets = evaluation.batch(np.arange(2))
        outputs = model.eval()(inputs)
        loss, metrics = evaluation.loss(outputs, targets), evaluation.metrics(outputs, targets)
        pairs = [(float(value), int(count)) for value, count in metrics.values()]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise SettingsError(f"task: loss of {name!r} gives {kind}; allowed: a tensor of one number")
    if not pairs:
        raise SettingsError(f"task: metrics of {name!r} gives none; allowed: one or more")


def checked_model_of(task: Task) -> nn.Module:
    """Make the task's model; of the user's own code twice, which must give the same."""
    settings = task.settings
    model = task.model(settings.seed)
    if is_reference(settings.task):
        check_model(model, settings.model_name)
    if is_reference(settings.task) or is_reference(settings.model):
        check_repeatable(model, task.model(settings.seed), settings.model_name)
    return model


def check_widths(
    model: nn.Module, settings: Settings, buffer: Inputs, evaluation: Examples | None
) -> None:
    """Refuse a model that does not compute or train at the widths of the run's clients."""
    if settings.low_bit_training == "integer":
        check_trained_in_integers(model, settings.model_name)
    if min(settings.mix) < FLOAT_BITS:
        check_quantizable(model, settings.model_name)
        _log_what_stays_float32(model)
    for trial in (buffer, evaluation):
        if trial is not None and len(trial) > 1:
            check_at_width(model, settings, min(settings.mix), trial)
            break


def _log_what_stays_float32(model: nn.Module) -> None:
    """Say which weights low-bit clients compute and send in float32; biases always are."""
    on_grid, state = quantizable_weights(model), federated_state(model)
    weights = {n: t.numel() for n, t in state.items() if t.ndim > 1 and n not in on_grid}
    if weights:
        share = sum(weights.values()) / sum(tensor.numel() for tensor in state.values())
        named = ", ".join([*list(weights)[:3], *(["..."] if len(weights) > 3 else [])])
        log(
            INFO,
            "prowd: low-bit clients keep %s in float32, %.1f %% of the model",
            named,
            100 * share,
        )


def without_server_data(
    context: StrategyContext, settings: Settings, buffer: Inputs, evaluation: Examples | None
) -> StrategyContext:
    """Do without what a server without inputs, or without a test set, cannot do; say what it is."""
    if len(buffer) < 2 and context.broadcast == "calibrated":
        if settings.broadcast == "calibrated":
            raise SettingsError(
                f"broadcast: calibrated, and the server has {len(buffer)} unlabelled inputs "
                "(Task.server_inputs); allowed: auto, float32 and nearest"
            )
        context = replace(context, broadcast="float32")
    if evaluation is None and not context.fraction_evaluate:
        context = replace(context, fraction_evaluate=1.0)
    if len(buffer) < 2 and settings.calibrate_normalization:
        log(INFO, "prowd: the server has no unlabelled inputs: statistics are not recalibrated")
    if evaluation is None:
        log(INFO, "prowd: the server has no test set; devices evaluate, each on its own examples")
    return context
