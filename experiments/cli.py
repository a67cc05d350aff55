"""The console command `prowd`."""

import argparse
import os
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from experiments.checks import check_runs
from experiments.live import run_all
from experiments.plan import Experiment, Setting, read_experiment, refuse_own
from experiments.publish import publish
from experiments.records import Record, find_runs, read_record
from experiments.runs import PlannedRun, planned_runs
from experiments.settings_page import settings_page
from experiments.table import result_of, to_json, to_markdown
from task.errors import SettingsError

# What a shell reports of a command that Ctrl-C ended.
_INTERRUPTED = 130
_NO_MATPLOTLIB = "the report draws with matplotlib; pip install -e '.[figures]'"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="prowd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser("compare", help="run systems x seeds of a file, make one table")
    compare.add_argument("file", type=Path, help="experiment file (TOML)")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    compare.add_argument("--seeds", help="other seeds, as 0,1,2")
    compare.add_argument("--scenarios", help="only these of the file, as 50-50,80-20")
    compare.add_argument("--systems", help="only these of the file, as ProWD,FedCOM")
    compare.add_argument("--federation", help="another --federation-config")
    compare.add_argument("--jobs", type=_count, default=1, help="runs at a time")
    compare.add_argument("--output-dir", type=Path, help="default: ~/prowd-runs/FILE")
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="show runs on a page of HTML")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="or a folder of runs")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html there")
    report.set_defaults(command=_report)
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
    seeds = _seeds(given.seeds) if given.seeds else experiment.seeds
    changes: dict[str, object] = {"seeds": list(dict.fromkeys([*experiment.seeds, *seeds]))}
    if given.federation:
        changes["federation"] = given.federation
    experiment = Experiment.read({**experiment.to_settings(), **changes}, f"{given.file.name}: ")
    output_dir = (given.output_dir or Path("~/prowd-runs") / given.file.stem).expanduser().resolve()
    scenarios = _chosen("--scenarios", given.scenarios, experiment.scenarios)
    systems = _chosen("--systems", given.systems, experiment.systems)
    # Of all runs, so that what two scenarios share has the folder that it always has.
    planned = planned_runs(experiment, output_dir, _overrides(given.sets))
    chosen = [r for r in planned if r.seed in seeds and r.scenario in scenarios]
    chosen = [run for run in chosen if run.system in systems]
    check_runs(chosen + [run for run in planned if run.folder.exists()])
    _make_folder(output_dir)
    if find_spec("matplotlib") is None:
        print(f"prowd: there will be no page: {_NO_MATPLOTLIB}", file=sys.stderr)
    outcome = run_all(experiment, chosen, given.jobs)
    # With what was run before.
    records = {run.folder: read_record(run.folder) for run in planned if run.folder.exists()}
    _write_table(experiment, planned, records, output_dir)
    named = [(r.scenario, r.system, records[r.folder]) for r in planned if r.folder in records]
    page = output_dir / "report.html"
    try:
        _write_page(page, experiment.title, list(records.values()), named)
    except SettingsError as error:  # The runs are not in vain: the table is there.
        print(f"prowd: {page} is not written: {error}", file=sys.stderr)
    for run, reason in outcome.failures.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    if outcome.interrupted:
        print("prowd: interrupted; the same command runs what is left", file=sys.stderr)
        return _INTERRUPTED
    return 1 if outcome.failures else 0


def _publish(given: argparse.Namespace) -> int:
    for path in publish(given.output_dir.expanduser(), given.docs.expanduser()):
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


def _write_table(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    records: Mapping[Path, Record],
    output_dir: Path,
) -> None:
    done = [run for run in runs if run.completed]
    found = [result_of(run.scenario, run.system, run.seed, records[run.folder]) for run in done]
    results = [result for result in found if result]
    if not results:
        return
    text = to_markdown(experiment.title, results)
    (output_dir / "table.md").write_text(text)
    (output_dir / "table.json").write_text(to_json(experiment.title, results))
    print(f"\n{text}\n{output_dir / 'table.md'}")


def _report(given: argparse.Namespace) -> int:
    folders = find_runs(given.runs)
    # Beside the runs: in their own folder, or in the one that they share.
    shared = Path(os.path.commonpath([path.resolve() for path in given.runs]))
    output = (given.output or shared / "report.html").expanduser()
    names = [path.resolve().name for path in given.runs]
    title = ", ".join(names) if len(names) <= 3 else shared.name
    _write_page(output, title, [read_record(folder) for folder in folders])
    return 0


def _write_page(
    path: Path,
    title: str,
    records: Sequence[Record],
    named: Sequence[tuple[str, str, Record]] | None = None,
) -> None:
    try:
        from experiments.report import write_page
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise SettingsError(_NO_MATPLOTLIB) from None
    try:
        write_page(path, title, records, named)
    except OSError as error:
        raise SettingsError(f"--output: {path} cannot be written: {error.strerror}") from None
    print(path)


def _make_folder(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise SettingsError(f"--output-dir: {output_dir} cannot be made: {reason}") from None


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; allowed: 1 and more")
    return number


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds: {text!r} is not whole numbers, as in 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds: {text} names a seed twice")
    return seeds


def _chosen(option: str, text: str | None, named: Collection[str]) -> Collection[str]:
    names = text.split(",") if text else named
    if unknown := [name for name in names if name not in named]:
        raise SettingsError(f"{option}: there is no {unknown[0]!r}; there are {', '.join(named)}")
    return names


def _overrides(sets: list[str]) -> dict[str, Setting]:
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


if __name__ == "__main__":
    sys.exit(main())
