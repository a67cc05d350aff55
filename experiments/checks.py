"""What would go wrong with a comparison, found before its first run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.records import read_record
from experiments.runs import PlannedRun, unique
from task.errors import SettingsError

# Where a record lies, and what computed it.
_NOT_COMPARED = frozenset({"output-dir", "run-name", "resume", "server-device"})


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """Refuse settings that no run can have, and records that were made under others.

    Parameters
    ----------
    runs : sequence of PlannedRun
        All that the table is made from.

    Raises
    ------
    SettingsError
        One line that names the run and the setting.
    """
    from server_app.build import build_strategy, read_settings  # Takes seconds to import.

    for run in unique(runs):
        try:
            settings, own = read_settings(run.settings)
            build_strategy(settings, own)
            _check_folder(settings.data_dir)
        except SettingsError as error:
            raise SettingsError(f"{run.folder.name}: {error}") from None
        if run.completed:
            _refuse_others(run.folder, {**settings.to_settings(), **own})


def _check_folder(data_dir: str) -> None:
    if data_dir and not Path(data_dir).expanduser().is_dir():
        raise SettingsError(f"data-dir: there is no folder {data_dir}")


def _refuse_others(folder: Path, planned: Mapping[str, object]) -> None:
    made = read_record(folder, weights=False).settings
    for key in planned.keys() & made.keys() - _NOT_COMPARED:
        if planned[key] != made[key]:
            raise SettingsError(
                f"{folder} was run with {key} = {made[key]!r}, and not {planned[key]!r}; give "
                "another --output-dir, or move it away"
            )
