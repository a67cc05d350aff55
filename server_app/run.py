"""One run from its settings to its last model: begun anew, or resumed from a checkpoint."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path

import torch
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import nn

from core.devices import pick_device
from core.errors import SettingsError
from core.files import printable
from core.run_record import SUMMARY
from core.settings import Settings
from exchange.states import State, what_is_kept
from exchange.undocumented import is_simulated
from quant import (
    FLOAT_BITS,
    federated_state,
    quantizable_weights,
    quantize_state,
    tensors_of,
)
from server_app.build import choose_strategy, read_settings
from server_app.checkpoint import (
    Checkpoint,
    Checkpoints,
    Identity,
    deciding_versions,
    folder_of_clients,
    read_checkpoint,
)
from server_app.checks import (
    check_measures,
    check_task,
    check_widths,
    checked_model_of,
    without_server_data,
)
from server_app.evaluation import CalibratedRounding, Evaluator, make_predict
from server_app.folder import read_json
from server_app.idle import idle_with_model
from server_app.record import RunRecord
from server_app.rounds import is_evaluated, run_rounds
from strategies import MixedPrecisionStrategy
from task.interface import Task
from task.tasks import make_task


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes
    ----------
    folder : Path
        Its record.
    settings, options : Settings, mapping
        The common settings, and the strategy's own by their full keys.
    task : Task
        What is learned.
    strategy : MixedPrecisionStrategy
        Aggregation.
    model : nn.Module
        The initial model.
    evaluator : Evaluator
        Evaluates models at each width.
    client_key : str
        Names the run to the clients that keep something for it.
    """

    folder: Path
    settings: Settings
    options: Mapping[str, object]
    task: Task
    strategy: MixedPrecisionStrategy
    model: nn.Module
    evaluator: Evaluator
    client_key: str

    @property
    def all_settings(self) -> dict[str, object]:
        """Every setting by its full key."""
        return {**self.settings.to_settings(), **self.options}

    def identity(self, num_partitions: int) -> Identity:
        """What the run is in a federation of so many partitions."""
        shapes = {name: list(tensor.shape) for name, tensor in federated_state(self.model).items()}
        data = self.task.fingerprint()
        about = self.all_settings, deciding_versions(), data, shapes
        return Identity(*about, num_partitions, self.client_key)


def prepare(
    folder: Path,
    settings: Settings,
    options: Mapping[str, object],
    grid: Grid | None = None,
    client_key: str = "",
) -> Run:
    """Make data, model and strategy by the settings.

    Parameters
    ----------
    folder : Path
        Record of the run.
    settings, options : Settings, mapping
        The common settings, and the strategy's own by their full keys.
    grid : Grid, optional
        What its nodes are reached by; None where no node is to be asked.
    client_key : str
        Of a resumed run; empty: it begins.

    Raises
    ------
    SettingsError
        If they do not go together, or the data cannot be had.
    """
    torch.set_num_threads(settings.server_threads)
    device = pick_device(settings.server_device)
    # Before the data, which may have to be downloaded.
    choice = choose_strategy(settings, options)
    task = make_task(settings)
    facts, test = task.facts(), task.test_data()
    evaluation = None if test is None else task.as_examples(test)
    check_task(task, facts, evaluation)
    for level, line in task.describe():
        log(level, "prowd: %s", line)
    model = checked_model_of(task)
    check_measures(task, model, evaluation)
    for line in idle_with_model(settings, model):
        log(WARNING, "prowd: %s", line)
    buffer = task.unlabelled()
    check_widths(model, settings, buffer, evaluation)
    client_key = client_key or uuid.uuid4().hex
    shared = grid is None or is_simulated(grid)
    context = replace(
        without_server_data(choice.context, settings, buffer, evaluation),
        facts=facts,
        metric_range=task.metric_range,
        loss_range=task.loss_range,
        higher_is_better=task.higher_is_better,
        most_examples=task.most_examples() or choice.context.most_examples,
        # Simulated clients run this code as well; making the partition for them would cost seconds.
        examples_of=None if shared else task.partition_size,
        quantized=quantizable_weights(model),
        predict=make_predict(model, buffer, device),
        round_calibrated=CalibratedRounding(settings, model, buffer),
        # A networked node gets the key alone: it keeps nothing in the server's folders.
        clients_keep_in=folder_of_clients(folder, client_key) if shared else client_key,
        detailed=partial(is_evaluated, settings),
    )
    strategy = choice.make(context)
    evaluator = Evaluator(settings, model, evaluation, buffer)
    return Run(folder, settings, options, task, strategy, model, evaluator, client_key)


def restore(
    grid: Grid, folder: Path, settings: Settings, options: Mapping[str, object]
) -> tuple[Run, Checkpoint]:
    """Make a run again as it was after its last checkpoint; its nodes are gathered.

    Raises
    ------
    SettingsError
        If there is no good checkpoint, it is of another run, or that run is completed.
    """
    saved = read_checkpoint(folder)
    # First of all: another version may have other settings.
    saved.refuse_other_versions()
    saved.refuse_other_settings({**settings.to_settings(), **options})
    _refuse_completed(folder, saved.server_round, settings.num_server_rounds)
    run = prepare(folder, settings, options, grid, saved.identity.client_key)
    run.strategy.nodes.expect(saved.identity.num_partitions)
    run.strategy.nodes.gather(grid)
    saved.refuse_other(run.identity(run.strategy.nodes.num_partitions))
    run.strategy.restore(saved.tensors, saved.values)
    return run, saved


def reopen(folder: Path, data_dir: str = "") -> tuple[Run, Checkpoint]:
    """Make a run again as it was after its last checkpoint, to look at its model: without nodes.

    Parameters
    ----------
    folder : Path
        Its record.
    data_dir : str
        Where its data lies now; empty: where it was.

    Raises
    ------
    SettingsError
        If there is no good checkpoint, or the data is not the run's.
    """
    saved = read_checkpoint(folder)
    here = {"data-dir": data_dir} if data_dir else {}
    if pick_device("auto").type == "cpu":
        here["server-device"] = "cpu"
    run = prepare(folder, *read_settings({**saved.identity.settings, **here}))
    saved.refuse_other(run.identity(saved.identity.num_partitions))
    run.strategy.restore(saved.tensors, saved.values)
    return run, saved


def finish(grid: Grid, run: Run, record: RunRecord, saved: Checkpoint | None = None) -> None:
    """Run the rounds that are left, and leave the last model whatever ends them."""
    strategy, name = run.strategy, run.settings.strategy
    where = printable(run.folder)
    log(INFO, "prowd: %s on %s, record in %s", name, run.settings.data_name, where)
    if saved is None:
        strategy.nodes.gather(grid)
        done, model = 0, federated_state(run.model)
        identity = run.identity(strategy.nodes.num_partitions)
    else:
        done, model = saved.server_round, saved.model
        identity = replace(saved.identity, settings=run.all_settings)
        log(INFO, "prowd: resuming after round %d", done)
    checkpoints = Checkpoints(run.folder, identity)

    def keep(server_round: int, state: State) -> None:
        nonlocal done, model
        kept = what_is_kept(strategy.checkpoint)
        checkpoints.write(server_round, record.seconds, state, *kept)
        done, model = server_round, state

    if saved is None:
        keep(0, model)
    try:
        run_rounds(grid, strategy, run.settings, model, run.evaluator, record, keep, done)
    except BaseException:
        # A run that fails, as by a lack of nodes, leaves the model that it had.
        try:
            _write_model(run, record, done, model)
        except SettingsError as error:  # On a full disk; what failed first is what is reported.
            log(ERROR, "prowd: %s", error)
        raise
    _write_model(run, record, done, model)
    record.write_summary("completed")
    # The lines that said so have scrolled away.
    short, dropped = record.short_rounds, record.dropped_rounds
    also = f"clients were left out of {short} of its rounds (rounds.jsonl); " if short else ""
    also += f"the result of {dropped} of its rounds was dropped (rounds.jsonl); " if dropped else ""
    log(INFO, "prowd: completed; %srecord in %s", also, where)


def _write_model(run: Run, record: RunRecord, done: int, model: State) -> None:
    """Write the model of the last round, if there was one and the server has the model."""
    if done and run.strategy.evaluates_on_server:
        model = run.strategy.state_at(max(run.strategy.nodes.widths()), model)
        network = run.evaluator.network(quantize_state(model, FLOAT_BITS))
        record.write_model(tensors_of(network.cpu(), model))


def _refuse_completed(folder: Path, done: int, asked: int) -> None:
    if done > asked:
        raise SettingsError(
            f"num-server-rounds: {asked}, but {printable(folder)} has {done} rounds already"
        )
    status = read_json(folder / SUMMARY).get("status")
    if done == asked and status == "completed":
        raise SettingsError(
            f"resume: {printable(folder)} is completed with its {done} rounds; "
            "a higher num-server-rounds resumes it"
        )
