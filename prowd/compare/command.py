"""A comparison as `prowd compare` makes it: what is run, and what is written of it."""

import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import SettingsError
from prowd.compare.checks import check_runs, may_differ
from prowd.compare.live import Outcome, run_all
from prowd.compare.plan import Experiment, Setting, read_experiment, refuse_own
from prowd.compare.runs import PlannedRun, planned_runs
from prowd.publish.table import result_of, to_json, to_markdown
from prowd.records import read_record


@dataclass(frozen=True)
class Choice:
    """Values in place of those of the experiment file; empty: those of the file.

    Attributes
    ----------
    sets : sequence of str
        Settings, as ``"key = value"``.
    seeds, scenarios, systems : str
        With commas between them.
    federation : str
        Flower's ``--federation-config``.
    """

    sets: Sequence[str] = ()
    seeds: str = ""
    scenarios: str = ""
    systems: str = ""
    federation: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs of an experiment.

    Attributes
    ----------
    experiment : Experiment
        What is compared.
    planned, chosen : list of PlannedRun
        All runs, of which the table is made as far as they are done; and those that are asked for.
    output_dir : Path
        Where their records, the table and the page lie.
    """

    experiment: Experiment
    planned: list[PlannedRun]
    chosen: list[PlannedRun]
    output_dir: Path

    @classmethod
    def read(cls, file: Path, choice: Choice, output_dir: Path) -> "Comparison":
        """Read an experiment file and choose of it.

        Raises
        ------
        SettingsError
            If something that is asked for does not exist, or no run can have it.
        """
        experiment = read_experiment(file)
        seeds = _seeds(choice.seeds) if choice.seeds else experiment.seeds
        scenarios = _chosen("--scenarios", choice.scenarios, experiment.scenarios)
        systems = _chosen("--systems", choice.systems, experiment.systems)
        overrides = _overrides(choice.sets)
        changes: dict[str, object] = {
            "title": _title(experiment, overrides, choice.federation),
            "seeds": list(dict.fromkeys([*experiment.seeds, *seeds])),
        }
        if choice.federation:
            changes["federation"] = choice.federation
        experiment = Experiment.read({**experiment.to_settings(), **changes}, f"{file.name}: ")
        # Of all runs, so that what two scenarios share has the folder that it always has.
        planned = planned_runs(experiment, output_dir, overrides)
        chosen = [run for run in planned if run.scenario in scenarios and run.system in systems]
        chosen = [run for run in chosen if run.seed in seeds]
        check_runs([*chosen, *(run for run in planned if run.folder.exists())])
        return cls(experiment, planned, chosen, output_dir)

    def run(self, jobs: int) -> Outcome:
        """Run what was chosen and has not completed."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made: {error.strerror}"
            raise SettingsError(f"--output-dir: {self.output_dir} {reason}") from None
        return run_all(self.experiment, self.chosen, jobs)

    def write(self) -> None:
        """Write table and page of all runs that are there."""
        from prowd.report.page import write_page  # matplotlib takes a second to import.

        runs = [run for run in self.planned if run.folder.exists()]
        records = {run.folder: read_record(run.folder) for run in runs}
        found = [
            result_of(run.scenario, run.system, run.seed, records[run.folder])
            for run in runs
            if run.completed
        ]
        self._write_table([result for result in found if result])
        named = [(run.scenario, run.system, records[run.folder]) for run in runs]
        page = self.output_dir / "report.html"
        try:
            write_page(page, self.experiment.title, list(records.values()), named)
            print(page)
        except SettingsError as error:  # The table is there all the same.
            print(f"prowd: there is no page: {error}", file=sys.stderr)

    def _write_table(self, results: list[dict[str, Any]]) -> None:
        if not results:
            return
        text, path = to_markdown(self.experiment.title, results), self.output_dir / "table.md"
        try:
            path.write_text(text)
            path.with_suffix(".json").write_text(to_json(self.experiment.title, results))
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
        print(f"\n{text}\n{path}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds: {text!r} is not whole numbers, as in 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds: {text} names a seed twice")
    return seeds


def _chosen(option: str, text: str, named: Collection[str]) -> Collection[str]:
    names = text.split(",") if text else named
    if unknown := [name for name in names if name not in named]:
        raise SettingsError(f"{option}: there is no {unknown[0]!r}; there are {', '.join(named)}")
    return names


def _title(experiment: Experiment, overrides: Mapping[str, Setting], federation: str) -> str:
    """Name the settings that differ from the file, as the results are not those of the file."""
    runs = planned_runs(experiment, Path(), {})
    said = [
        f"{key} {value}"
        for key, value in overrides.items()
        if key not in may_differ() and any(run.settings.get(key) != value for run in runs)
    ]
    # The number of clients; nothing else in it changes a number.
    asked, own = (
        re.findall(r"num-supernodes=\d+", text) for text in (federation, experiment.federation)
    )
    said += [clients for clients in asked if clients not in own]
    return ", ".join([experiment.title, *said])


def _overrides(sets: Sequence[str]) -> dict[str, Setting]:
    try:
        given = {k: v for part in sets for k, v in tomllib.loads(part).items()}
        refuse_own(given)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--set: write it as model = 'resnet20' ({error})") from None
    except ValueError as error:
        raise SettingsError(f"--set: {error}") from None
    for key, value in given.items():
        if not isinstance(value, Setting):
            raise SettingsError(f"--set: {key} is a text, a number, true or false")
    return given
