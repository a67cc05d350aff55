"""The console command `prowd`.

Each of its commands imports what it needs: torch and Flower take seconds, and not all need them.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from core.failures import explain, one_line
from core.files import printable, user_path

# What a shell reports of a command that Ctrl-C ended, and of one whose output pipe was closed.
_INTERRUPTED, _UNREAD = 130, 141
_PAGE = "report.html"
_EXTRA = ("onnx", "onnxruntime", "onnxscript")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 2 after an error, which is one line."""
    try:
        try:
            given = _parser().parse_args(arguments)
            return int(given.command(given))
        finally:
            # Here, so that what it fails at is not left to the interpreter's end.
            if sys.stdout is not None:  # It is None where a shell closed it.
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        _let_go_of_output()
        return _UNREAD
    except OSError as error:
        _let_go_of_output()
        of = printable(error.filename) if error.filename else "the output cannot be written"
        return _failed(f"{of}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        extra = (error.name or "").partition(".")[0] in _EXTRA
        brings = "; pip install -e '.[export]' brings it" if extra else ""
        return _failed(f"{error.name or error} is not installed{brings}")
    except Exception as error:
        return _failed(explain(error, {}))


def _failed(reason: str, code: int = 2) -> int:
    with suppress(OSError):
        print(f"prowd: {one_line(reason)}", file=sys.stderr)
    return code


def _let_go_of_output() -> None:
    """Let the interpreter's end not complain once more of an output that cannot be written."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prowd", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="of prowd, flwr and torch")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser("compare", help="run systems x seeds of a file, make one table")
    compare.add_argument("file", type=Path, help="experiment file (TOML)")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    compare.add_argument("--seeds", default="", help="other seeds, as 0,1,2")
    compare.add_argument("--scenarios", default="", help="only these of the file, as 50-50,80-20")
    compare.add_argument("--systems", default="", help="only these of the file, as ProWD,FedCOM")
    compare.add_argument("--federation", default="", help="another --federation-config")
    compare.add_argument("--jobs", type=_count, default=1, help="runs at a time")
    compare.add_argument("--output-dir", type=Path, help="default: ~/prowd-runs/FILE")
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="show runs on a page of HTML")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="or a folder of runs")
    report.add_argument("--output", metavar="FILE", help="or a folder; default: report.html there")
    report.set_defaults(command=_report)
    publish = commands.add_parser("publish", help="put a comparison into docs/results.md")
    publish.add_argument("output_dir", type=Path, help="where prowd compare wrote")
    publish.add_argument("--docs", type=Path, default=Path("docs"))
    publish.set_defaults(command=_publish)
    new = commands.add_parser("new", help="write a task of your own to begin with")
    new.add_argument("name", metavar="NAME", help="of its module, as my_task")
    new.set_defaults(command=_new)
    settings = commands.add_parser("settings", help="print every setting, its default and use")
    settings.set_defaults(command=_settings)
    export = commands.add_parser("export", help="write a run's model, packed and as ONNX")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="record of the run")
    export.add_argument("--bits", type=int, help="default: the narrowest of the run")
    export.add_argument("--output", type=Path, help="folder; default: RUN_DIR/export")
    export.add_argument("--data-dir", type=Path, help="where the run's data lies now")
    export.set_defaults(command=_export)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without a list of all that can be given."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(2, f"prowd: {one_line(message)}; {self.prog} --help lists the options\n")


class _Version(argparse.Action):
    """Prints the versions that decide what a run computes; none of the three is imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        found = []
        for package in ("prowd", "flwr", "torch"):
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                found.append(f"{package} not installed")
        print(", ".join(found))
        parser.exit()


def _new(given: argparse.Namespace) -> int:
    from prowd.new import new_task

    for line in new_task(given.name, Path.cwd()):
        print(line)
    return 0


def _compare(given: argparse.Namespace) -> int:
    from prowd.compare.command import Choice, Comparison

    output_dir = given.output_dir or Path("~/prowd-runs") / given.file.stem
    choice = Choice(given.sets, given.seeds, given.scenarios, given.systems, given.federation)
    output_dir = user_path("--output-dir", output_dir).resolve()
    comparison = Comparison.read(user_path("FILE", given.file), choice, output_dir)
    with _ended_as_by_ctrl_c():
        outcome = comparison.run(given.jobs)
    comparison.write()
    for run, reason in outcome.failures.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    if outcome.interrupted:
        print("prowd: interrupted; the same command runs what is left", file=sys.stderr)
        return _INTERRUPTED
    return 1 if outcome.failures else 0


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let a closed terminal, and `kill`, stop the runs too."""
    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _publish(given: argparse.Namespace) -> int:
    from prowd.publish.command import publish

    for path in publish(user_path("OUTPUT_DIR", given.output_dir), user_path("--docs", given.docs)):
        print(path)
    return 0


def _settings(given: argparse.Namespace) -> int:
    from prowd.settings_page import settings_page

    print(settings_page(), end="")
    return 0


def _export(given: argparse.Namespace) -> int:
    from prowd.export.command import export

    run_dir = user_path("RUN_DIR", given.run_dir)
    output = given.output and user_path("--output", given.output)
    data_dir = str(user_path("--data-dir", given.data_dir).resolve()) if given.data_dir else ""
    for line in export(run_dir, given.bits, output, data_dir):
        print(line, flush=True)
    return 0


def _report(given: argparse.Namespace) -> int:
    from prowd.records import find_runs, read_record
    from prowd.report.page import write_page

    runs = [user_path("RUN_DIR", path) for path in given.runs]
    folders = find_runs(runs)
    # Beside the runs: in their own folder, or in the one that they share.
    shared = Path(os.path.commonpath([path.resolve() for path in runs]))
    output = user_path("--output", given.output) if given.output else shared / _PAGE
    if given.output and (given.output.endswith(os.sep) or output.is_dir()):
        output /= _PAGE
    names = [path.resolve().name for path in runs]
    title = ", ".join(names) if len(names) <= 3 else shared.name
    write_page(output, title, [read_record(folder) for folder in folders])
    print(output)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: 1 and more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
