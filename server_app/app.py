"""The ServerApp: from settings to a finished run."""

from collections.abc import Mapping
from logging import ERROR, INFO

import torch
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from quant import FLOAT_BITS, quantize_state
from server_app.build import build_strategy, read_settings
from server_app.evaluation import CalibratedRounding, Evaluator, make_predict
from server_app.record import RunRecord, open_record
from server_app.rounds import run_rounds
from strategies import FederationError
from task.data import load_dataset
from task.errors import SettingsError
from task.models import build_model
from task.partition import evaluation_images, server_pixels
from task.settings import Settings
from task.training import check_quantizable, model_state

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Validate the settings, run the rounds, leave the run record."""
    record = None
    try:
        record = _open_record(context.run_config)
        _run(grid, context.run_config, record)
    except (SettingsError, FederationError) as error:
        # One line that says what is wrong. Flower marks the run failed only if it is raised on, and
        # prints a traceback, which is kept short.
        log(ERROR, "prowd: %s", error)
        _close_failed(record, str(error))
        raise type(error)(str(error)) from None
    except BaseException as error:
        _close_failed(record, f"{type(error).__name__}: {error}")
        raise


def _run(grid: Grid, run_config: Mapping[str, object], record: RunRecord) -> None:
    settings, options = read_settings(run_config)
    record.write_config({**settings.to_settings(), **options})
    torch.set_num_threads(settings.server_threads)
    # Before the data, which may have to be downloaded.
    strategy = build_strategy(settings, options)
    data = load_dataset(settings)
    model = build_model(settings.model, data.channels, data.size, data.num_classes, settings.seed)
    if min(settings.mix) < FLOAT_BITS:
        check_quantizable(model, settings.model)
    buffer = server_pixels(settings)
    strategy.predict = make_predict(model, buffer)
    strategy.round_calibrated = CalibratedRounding(settings, model, buffer)
    evaluator = Evaluator(settings, model, evaluation_images(settings), buffer)
    log(INFO, "prowd: %s on %s, record in %s", settings.strategy, settings.dataset, record.folder)
    state = run_rounds(grid, strategy, settings, model_state(model), evaluator, record)
    if strategy.evaluates_on_server:
        state = strategy.state_for(max(strategy.nodes.widths()), state)
        record.write_model(model_state(evaluator.network(quantize_state(state, FLOAT_BITS))))
    record.write_summary("completed")
    log(INFO, "prowd: completed; record in %s", record.folder)


def _open_record(run_config: Mapping[str, object]) -> RunRecord:
    """Make the record before all settings are known to be good: a failed run leaves one too."""
    defaults = Settings()
    keys = ("output-dir", "run-name", "strategy", "dataset")
    given = {key: run_config.get(key) for key in keys}
    where = Settings.read({key: given[key] for key in ("output-dir", "run-name") if given[key]})
    strategy = str(given["strategy"] or defaults.strategy)
    dataset = str(given["dataset"] or defaults.dataset)
    return open_record(where.output_dir, where.run_name, _slug(strategy), _slug(dataset))


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)[:40]


def _close_failed(record: RunRecord | None, reason: str) -> None:
    if record is not None:
        record.write_summary("failed", reason)
