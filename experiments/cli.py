"""The console command `prowd`."""

import argparse
import json
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.plan import Experiment, Setting, read_experiment
from experiments.publish import publish
from experiments.runs import PlannedRun, execute, pending, planned_runs
from experiments.settings_page import settings_page
from experiments.table import result_of, to_markdown
from task.errors import SettingsError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="prowd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser("compare", help="run systems x seeds of a file, make one table")
    compare.add_argument("file", type=Path, help="experiment file (TOML)")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    compare.add_argument("--seeds", help="other seeds, as 0,1,2")
    compare.add_argument("--federation", help="another --federation-config")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time")
    compare.add_argument("--output-dir", type=Path, help="default: ~/prowd-runs/FILE")
    compare.set_defaults(command=_compare)
    publish = commands.add_parser("publish", help="put a comparison into docs/results.md")
    publish.add_argument("output_dir", type=Path, help="where prowd compare wrote")
    publish.add_argument("--docs", type=Path, default=Path("docs"))
    publish.set_defaults(command=_publish)
    settings = commands.add_parser("settings", help="print every setting, its default and use")
    settings.set_defaults(command=_settings)
    export = commands.add_parser("export", help="write a run's model, packed and as ONNX")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="record of the run")
    export.add_argument("--bits", type=int, help="default: the narrowest of the run")
    export.add_argument("--output", type=Path, help="folder; default: RUN_DIR/export")
    export.add_argument("--data-dir", type=Path, help="where the run's data lies now")
    export.set_defaults(command=_export)
    given = parser.parse_args(arguments)
    try:
        return given.command(given)
    except SettingsError as error:
        print(f"prowd: {error}", file=sys.stderr)
        return 2


def _compare(given: argparse.Namespace) -> int:
    experiment = read_experiment(given.file)
    changes: dict[str, object] = {}
    if given.seeds:
        changes["seeds"] = _seeds(given.seeds)
    if given.federation:
        changes["federation"] = given.federation
    experiment = Experiment.read({**experiment.to_settings(), **changes}, f"{given.file.name}: ")
    output_dir = given.output_dir or Path("~/prowd-runs").expanduser() / given.file.stem
    runs = planned_runs(experiment, output_dir.resolve(), _overrides(given.sets))
    failures = _run_all(experiment, runs, given.jobs)
    _write_table(experiment, runs, output_dir)
    for run, reason in failures.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _publish(given: argparse.Namespace) -> int:
    for path in publish(given.output_dir, given.docs):
        print(path)
    return 0


def _settings(given: argparse.Namespace) -> int:
    print(settings_page(), end="")
    return 0


def _export(given: argparse.Namespace) -> int:
    from experiments.export import export  # The server's packages take seconds to import.

    data_dir = str(given.data_dir.expanduser().resolve()) if given.data_dir else ""
    for line in export(given.run_dir, given.bits, given.output, data_dir):
        print(line, flush=True)
    return 0


def _run_all(experiment: Experiment, runs: list[PlannedRun], jobs: int) -> dict[str, str]:
    waiting, total = pending(runs), len({run.folder for run in runs})
    print(f"{experiment.title}: {total - len(waiting)} of {total} runs are done")
    failures = {}

    def run_one(number: int, run: PlannedRun) -> None:
        print(f"[{number}/{len(waiting)}] {run.folder.name} ...", flush=True)
        if reason := execute(run, experiment.federation):
            failures[run.folder.name] = reason

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(run_one, range(1, len(waiting) + 1), waiting))
    return failures


def _write_table(experiment: Experiment, runs: list[PlannedRun], output_dir: Path) -> None:
    results = [result_of(run) for run in runs if run.completed]
    if not results:
        return
    text = to_markdown(experiment.title, results)
    (output_dir / "table.md").write_text(text)
    lines = ",\n".join(json.dumps(result) for result in results)
    title = json.dumps(experiment.title)
    (output_dir / "table.json").write_text(f'{{"title": {title}, "results": [\n{lines}\n]}}\n')
    print(f"\n{text}\n{output_dir / 'table.md'}")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds: {text!r} is not whole numbers, as in 0,1,2") from None


def _overrides(sets: list[str]) -> dict[str, Setting]:
    try:
        return {k: v for part in sets for k, v in tomllib.loads(part).items()}
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--set: write it as model = 'resnet20' ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
