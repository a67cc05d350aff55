"""The ServerApp: from settings to a finished run."""

from collections.abc import Mapping
from logging import ERROR

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from server_app.build import read_settings
from server_app.record import RunRecord, open_record
from server_app.run import complete, prepare, take_up
from strategies import FederationError
from task.errors import SettingsError
from task.settings import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Validate the settings, run the rounds, leave the run record."""
    config = context.run_config
    record = None
    try:
        if config.get("resume"):
            run, saved = take_up(grid, *read_settings(config))
            # Not before all has been found in order: a refused run leaves the record as it was.
            record = RunRecord(run.folder, saved.server_round, saved.seconds)
            record.write_config(run.all_settings)
        else:
            record = _open_record(config)
            settings, options = read_settings(config)
            record.write_config({**settings.to_settings(), **options})
            run, saved = prepare(record.folder, settings, options), None
        complete(grid, run, record, saved)
    except (SettingsError, FederationError) as error:
        # One line that says what is wrong. Flower marks the run failed only if it is raised on, and
        # prints a traceback, which is kept short.
        log(ERROR, "prowd: %s", error)
        _close_failed(record, str(error))
        raise type(error)(str(error)) from None
    except BaseException as error:
        _close_failed(record, f"{type(error).__name__}: {error}")
        raise
    finally:
        if record is not None:
            record.close()


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
    if record is None:
        return
    try:
        record.write_summary("failed", reason)
    except SettingsError as error:  # On a full disk; what failed first is what is reported.
        log(ERROR, "prowd: %s", error)
