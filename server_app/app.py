"""The ServerApp: from settings to a finished run."""

from collections.abc import Mapping
from logging import WARNING

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from core.errors import SettingsError
from core.files import user_path
from core.settings import Settings
from exchange.undocumented import is_simulated
from server_app.build import read_settings
from server_app.ending import Ending
from server_app.idle import idle_settings
from server_app.record import RunRecord, open_record
from server_app.run import finish, prepare, restore

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
    _warn_of_idle(grid, config)
    record.write_config({**settings.to_settings(), **options})
    run = prepare(record.folder, settings, options, grid)
    record.write_config(run.all_settings, run.strategy.chosen())
    finish(grid, run, record)


def _resume(grid: Grid, config: Mapping[str, object], ending: Ending) -> None:
    settings, options = read_settings(config)
    _warn_of_idle(grid, config)
    folder = user_path("resume", settings.resume)
    # Before the checkpoint is read: another process that resumed it would leave it stale.
    ending.lock(folder)
    run, saved = restore(grid, folder, settings, options)
    # Not before all has been found in order: a refused run leaves the record as it was.
    record = RunRecord(folder, saved.server_round, saved.seconds)
    ending.watch(record)
    record.write_config(run.all_settings, run.strategy.chosen())
    finish(grid, run, record, saved)


def _warn_of_idle(grid: Grid, config: Mapping[str, object]) -> None:
    for line in idle_settings(config, is_simulated(grid)):
        log(WARNING, "prowd: %s", line)


def _open_record(run_config: Mapping[str, object]) -> RunRecord:
    """Make the record before all settings are known to be good: a failed run leaves one too."""
    defaults = Settings()
    strategy = str(run_config.get("strategy") or defaults.strategy)
    task = str(run_config.get("task") or defaults.task)
    data = str(run_config.get("dataset") or defaults.dataset) if task == "images" else task
    output_dir = _one(run_config, "output-dir").output_dir
    try:
        run_name = _one(run_config, "run-name").run_name
    except SettingsError:
        run_name = ""  # It is refused with all the others, and the record holds the reason.
    return open_record(output_dir, run_name, _slug(strategy), _slug(data))


def _one(run_config: Mapping[str, object], key: str) -> Settings:
    return Settings.read({key: run_config[key]} if run_config.get(key) else {})


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)[:40]
