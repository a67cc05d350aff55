"""What a client does with each message. Everything it learns with comes from `task` and `quant`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from logging import DEBUG, ERROR
from math import inf
from pathlib import Path
from traceback import walk_tb

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from torch import Tensor, nn

from client_app.node import declare, node_of, width_of
from client_app.secure import (
    answer_masked,
    is_secure,
    open_shares,
    reveal_shares,
    share_secrets,
    show_keys,
)
from client_app.state_store import has_model, keep_model, own_model, recall, state_folder, store
from client_app.tracking import TrackedRound, next_correction
from core.devices import pick_device
from core.errors import SettingsError
from core.failures import explain
from core.files import failing_by_name
from core.seeds import Stream, client_seed, derive_seed, difference_noise
from core.settings import Settings
from core.simulation import in_simulation
from exchange.protocol import (
    Instruction,
    Report,
    answer,
    answer_query,
    config_in,
    facts_in,
    in_range,
    instruction_in,
    model_in,
    plain,
)
from exchange.secure import KEYS, OPEN, REVEAL, SHARES, SumPlan, record_in, scales_in, steps_in
from privacy.noisy_grid import NoisyGrid
from privacy.sum_grid import SumGrid
from quant import (
    Update,
    UpdateError,
    UpdateSpec,
    load_state,
    quantize_difference,
    spec_of,
    stored_bits_of,
    tensors_of,
    weight_scales,
)
from task.at_width import ready_to_evaluate
from task.evaluation import Score, evaluate
from task.examples import Examples
from task.hyperparameters import LocalTraining
from task.interface import Node, Task
from task.tasks import make_task
from task.training import Trained, train

app = ClientApp()
_ANY_NUMBER = (-inf, inf)
Handler = Callable[[Message, Context], Message]
_DOING = {
    MessageType.QUERY: "declaring this node",
    MessageType.TRAIN: "training",
    MessageType.EVALUATE: "the evaluation",
}


def _failing_in_one_line(handler: Handler) -> Handler:
    """Answer with an error of one line in place of raising, and log it on the device.

    What is raised would reach the server as a traceback, and what is no `Exception` would end the
    process, or Ray's worker, without an answer: ``sys.exit()`` in a model is the client's failure.
    """

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except BaseException as error:  # Whatever the user's code raises.
            if isinstance(error, KeyboardInterrupt) or _ends_the_process(error):
                raise
            doing = _DOING[message.metadata.message_type.partition(".")[0]]
            line = plain(explain(error, context.run_config, when=f"in {doing}"))
            log(ERROR, "prowd: %s", line)
            log(DEBUG, "where that was raised", exc_info=error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, line), reply_to=message)

    return handle


def _ends_the_process(error: BaseException) -> bool:
    """Whether Flower raised it, to end the process on a signal."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    of_flower = str(frame.f_globals.get("__name__")).startswith("flwr.")
    return isinstance(error, SystemExit) and of_flower


@app.query()
@_failing_in_one_line
def on_query(message: Message, context: Context) -> Message:
    """Declare the node: its partition, bit-width and examples, or why it cannot take part."""
    facts = facts_in(message)
    declaration = declare(context.node_config, context.run_config, in_simulation(), facts)
    if declaration.refused:
        log(ERROR, "prowd: this node cannot take part: %s", declaration.refused)
    return answer_query(message, declaration)


@app.train()
@_failing_in_one_line
def on_train(message: Message, context: Context) -> Message:
    """Train the received model, or the client's own, at the client's width and send the update."""
    started = time.perf_counter()
    job = _read_job(message, context)
    received = {name: tensor.clone() for name, tensor in job.state().items()}
    delta = {}
    if job.instruction.tracking_epoch:
        delta = next_correction(context.state, received, job.instruction, job.settings.momentum)
    trained = train(
        job.model,
        job.examples,
        job.training,
        job.seed,
        scales=job.scales,
        correction=delta,
        device=pick_device("auto"),
        upload=job.instruction.upload,
        dither=job.instruction.dither,
        upload_scales=None if job.grid is None else job.grid.scales,
    )
    report = _report(job, trained.score, started, trained.steps, began_clean=not delta)
    if job.instruction.uplink == "nothing":
        kept = RecordDict()
        keep_model(kept, job.state(), weight_scales(job.model))
        _keep(kept, context, job.instruction)
        return answer(message, report)
    if job.grid is not None:
        update = trained.update if job.grid.scales else _update(job, trained, received)
        return answer_masked(message, context, report, update, job.grid, job.seed)
    update = _update(job, trained, received)
    reply = answer(message, report, update, job.sent)
    if job.instruction.tracking_epoch:
        kept = RecordDict()
        _tracked(job, delta, received, update).keep(kept)
        _keep(kept, context, job.instruction)
    return reply


def _keep(kept: RecordDict, context: Context, instruction: Instruction) -> None:
    # Last of all, so that a client whose training failed keeps what it had.
    folder = state_folder(context.node_config, instruction.keep_in)
    with _naming_folder(context, folder, "written"):
        store(kept, folder, instruction.server_round)
    context.state.update(kept)


def _naming_folder(
    context: Context, folder: Path | None, done: str
) -> AbstractContextManager[None]:
    """Turn an OSError into one line that names the folder, and the setting that it is from."""
    own = "state-dir" in context.node_config
    return failing_by_name("node-config: state-dir" if own else "output-dir", folder, done)


@app.train(KEYS.partition(".")[2])
@_failing_in_one_line
def on_keys(message: Message, context: Context) -> Message:
    """Secure aggregation, step 1: show public keys."""
    return show_keys(message, context)


@app.train(SHARES.partition(".")[2])
@_failing_in_one_line
def on_shares(message: Message, context: Context) -> Message:
    """Step 2: share secrets with the group."""
    return share_secrets(message, context)


@app.train(OPEN.partition(".")[2])
@_failing_in_one_line
def on_open(message: Message, context: Context) -> Message:
    """Step 3: say whose shares do not open. Step 4 is to train and to send a masked update."""
    return open_shares(message, context)


@app.train(REVEAL.partition(".")[2])
@_failing_in_one_line
def on_reveal(message: Message, context: Context) -> Message:
    """Step 5: reveal what unmasks the sum."""
    return reveal_shares(message, context)


@app.evaluate()
@_failing_in_one_line
def on_evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model, or the client's own, at the client's width."""
    started = time.perf_counter()
    job = _read_job(message, context)
    # With the client's own examples: it has no access to the server's.
    model = ready_to_evaluate(
        job.model, job.settings, job.bits, job.scales, job.examples, pick_device("auto")
    )
    seed = derive_seed(job.seed, Stream.EVALUATION)
    score = evaluate(model, job.task.local_test_examples(job.node), seed)
    report = _report(job, score, started)
    metrics = {name: in_range(value, _ANY_NUMBER) for name, value in score.metrics.items()}
    metrics[next(iter(metrics))] = report.accuracy
    return answer(message, report, metrics=metrics if len(metrics) > 1 else None)


@dataclass(frozen=True)
class _Job:
    """One message's work: the node and its width, the instruction, the model and how it came."""

    settings: Settings
    task: Task
    loss_range: tuple[float, float]
    node: Node
    bits: int
    instruction: Instruction
    model: nn.Module
    scales: dict[str, Tensor]
    sent: Update | None
    spec: UpdateSpec
    grid: SumGrid | NoisyGrid | None = None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the model that are sent, as they are now."""
        return tensors_of(self.model, self.spec.shapes)

    @property
    def examples(self) -> Examples:
        return self.task.examples(self.node)

    @property
    def seed(self) -> int:
        asked = self.instruction
        return client_seed(self.settings.seed, asked.server_round, asked.number)

    @property
    def training(self) -> LocalTraining:
        server_round, proximal_mu = self.instruction.server_round, self.instruction.proximal_mu
        return LocalTraining.of(self.settings, self.bits, server_round, proximal_mu)


def _read_job(message: Message, context: Context) -> _Job:
    settings = Settings.of_run(context.run_config)
    # A fixed number of threads: sums, and with them the last bits, depend on it.
    torch.set_num_threads(settings.client_threads)
    node = node_of(context.node_config)
    bits = width_of(context.node_config, node, settings, in_simulation())
    if config := config_in(message):
        # Only the settings and the instruction have an effect here.
        raise SettingsError(
            f"config: this client has no use for {', '.join(sorted(config))}; allowed: none"
        )
    instruction = instruction_in(message)
    folder = state_folder(context.node_config, instruction.keep_in)
    # What a round's training kept is from before its evaluation, but not from before itself.
    trained = message.metadata.message_type == MessageType.EVALUATE
    with _naming_folder(context, folder, "read"):
        recall(context.state, folder, instruction.server_round + trained)
    task = make_task(settings, facts_in(message))
    model = task.model(settings.seed)
    spec = spec_of(model)
    try:
        sent = model_in(message, spec)
    except UpdateError as error:
        raise SettingsError(
            f"model: {settings.model_name!r} on this device is not the server's: {error}"
        ) from None
    # A client that sends nothing continues from its own model while it has one.
    if instruction.uplink == "nothing" and has_model(context.state):
        state, scales = own_model(context.state)
        if message.metadata.message_type == MessageType.TRAIN:
            # Evaluated on the grid that it was trained on; training fits a new one every round.
            scales = {}
    elif sent is not None:
        state = sent.dequantize()
        scales = sent.scales if sent.bits == bits else {}
    else:
        raise RuntimeError("this client no longer has a model of its own, and was sent none")
    grid = None
    if is_secure(message):
        stored_bits = stored_bits_of(bits, settings.low_bit_training)
        grid = _sum_grid(message, spec, state, (instruction.dither, stored_bits))
        # Strict clients train on the group's grid; the others bring what they send to it.
        if grid.scales and settings.low_bit_training == "strict":
            scales = dict(grid.scales)
    load_state(model, state)
    kind = task.loss_range
    return _Job(settings, task, kind, node, bits, instruction, model, scales, sent, spec, grid)


def _sum_grid(
    message: Message, spec: UpdateSpec, received: dict[str, Tensor], rounding: tuple[int, int]
) -> SumGrid | NoisyGrid:
    """Return the grid on which the updates of this client's width are summed."""
    plan, start = SumPlan.from_record(record_in(message)), dict(received)
    if plan.clip:
        noise, devices, of_floats = plan.noise_multiplier, plan.devices, plan.float_bits
        return NoisyGrid(spec, plan.clip, noise, devices, of_floats, start, *rounding)
    scales = scales_in(message, spec.shapes)
    steps = steps_in(message, spec.shapes)
    return SumGrid(spec, plan.bits, scales, start, plan.float_bits, *rounding, steps)


def _update(job: _Job, trained: Trained, received: dict[str, Tensor]) -> Update:
    """What the client was asked to send."""
    asked = job.instruction
    bits = asked.uplink_bits or job.bits
    if asked.uplink == "weights":
        if trained.update.bits != bits:
            raise SettingsError(
                f"uplink-bits: {bits} asked of a client of {job.bits} bits; allowed with "
                f"upload {asked.upload}: {trained.update.bits}"
            )
        return trained.update
    moved = trained.moved
    if asked.upload != "stored":
        sent = trained.update.dequantize()
        moved = {name: tensor - received[name] for name, tensor in sent.items()}
    return quantize_difference(moved, bits, difference_noise(job.seed), job.spec.on_grid)


def _tracked(
    job: _Job, delta: dict[str, Tensor], received: dict[str, Tensor], update: Update
) -> TrackedRound:
    """What the next correction is made from: of parameters, as statistics have no gradient."""
    parameters = {name for name, _ in job.model.named_parameters()}
    return TrackedRound(
        epoch=job.instruction.tracking_epoch,
        server_round=job.instruction.server_round,
        learning_rate=job.training.learning_rate,
        correction=delta,
        received={n: t for n, t in received.items() if n in parameters},
        sent={n: t for n, t in update.dequantize().items() if n in parameters},
    )


def _report(
    job: _Job, score: Score, started: float, steps: int = 0, *, began_clean: bool = False
) -> Report:
    return Report(
        server_round=job.instruction.server_round,
        num_examples=score.num_examples,
        loss=in_range(score.loss, job.loss_range),
        accuracy=in_range(score.accuracy, _ANY_NUMBER),
        seconds=time.perf_counter() - started,
        steps=steps,
        began_clean=int(began_clean),
    )
