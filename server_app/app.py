"""The ServerApp: from settings to a finished run."""

from collections.abc import Mapping
from logging import WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from server_app.build import read_settings
from server_app.ending import Ending
from server_app.idle import idle_settings
from server_app.record import RunRecord, open_record
from server_app.run import finish, prepare, restore
from task.settings import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Validate the settings, run the rounds, leave the run record."""
    config = context.run_config
    with Ending(config) as ending:
        if config.get("resume"):
            _resume(grid, config, ending)
        else:
            _begin(grid, config, ending)


def _begin(grid: Grid, config: Mapping[str, object], ending: Ending) -> None:
    record = _open_record(config)
    ending.watch(record)
    ending.lock(record.folder)
    settings, options = read_settings(config)
    for line in idle_settings(config):
        log(WARNING, "prowd: %s", line)
    record.write_config({**settings.to_settings(), **options})
    run = prepare(record.folder, settings, options)
    finish(grid, run, record)


def _resume(grid: Grid, config: Mapping[str, object], ending: Ending) -> None:
    settings, options = read_settings(config)
    folder = Path(settings.resume).expanduser()
    # Before the checkpoint is read: another process that went on with it would leave it stale.
    ending.lock(folder)
    run, saved = restore(grid, folder, settings, options)
    # Not before all has been found in order: a refused run leaves the record as it was.
    record = RunRecord(folder, saved.server_round, saved.seconds)
    ending.watch(record)
    record.write_config(run.all_settings)
    finish(grid, run, record, saved)


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
