"""What would go wrong with a comparison, found before its first run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from core.errors import SettingsError
from prowd.compare.runs import PlannedRun, unique
from prowd.records import read_config
from task.data.dataset import data_folder

# The length of a run, the rounds that are evaluated, and the partition distinguish runs here.
_COMPARED_THOUGH = frozenset({"num-server-rounds", "evaluate-every", "partition-file"})


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """Refuse settings that no run can have, and completed runs that were made under others.

    Parameters
    ----------
    runs : sequence of PlannedRun
        All that the table is made from.

    Raises
    ------
    SettingsError
        One line that names the run and the setting.
    """
    from server_app.build import choose_strategy, read_settings  # Takes seconds to import.

    for run in unique(runs):
        try:
            settings, own = read_settings(run.settings)
            choose_strategy(settings, own).make()
            if settings.data_dir:
                data_folder(settings.data_dir)
        except SettingsError as error:
            raise SettingsError(f"{run.folder.name}: {error}") from None
        if run.completed:
            _refuse_others(run.folder, {**settings.to_settings(), **own})


def may_differ() -> frozenset[str]:
    """Return the settings that may differ between runs that one table is made from."""
    from server_app.checkpoint import MAY_DIFFER  # Takes seconds to import.

    return MAY_DIFFER - _COMPARED_THOUGH | {"server-device"}


def _refuse_others(folder: Path, planned: Mapping[str, object]) -> None:
    made = read_config(folder).settings
    for key in planned.keys() & made.keys() - may_differ():
        if planned[key] != made[key]:
            raise SettingsError(
                f"{folder} was run with {key} = {made[key]!r}, and not {planned[key]!r}; give "
                "another --output-dir, or move it away"
            )
