"""The command `prowd`: where it writes, and that whatever ends it is one line."""

import os
import re
import resource
from importlib.metadata import version
from pathlib import Path

import pytest
from own_process import python
from run_records import write_run

from prowd.cli import main

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run_folder(tmp_path):
    write_run(folder := tmp_path / "runs" / "one", "prowd", 0)
    return folder


def said(capsys, *arguments, code=2):
    assert main([str(word) for word in arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


NOBODY = "~nosuchuser/x"
EXPERIMENT = PROJECT / "experiments" / "digits.toml"
REFUSED = [
    (["report", NOBODY], "RUN_DIR: ~nosuchuser/x: no home folder is known for ~nosuchuser"),
    (["report", "RUN", "--output", NOBODY], "--output: ~nosuchuser/x: no home folder"),
    (["report", "RUN", "--output", "RUN/config.json/x"], "config.json/x cannot be written: "),
    (["report", "no-run\0"], "RUN_DIR: no-run"),
    (["compare", EXPERIMENT, "--output-dir", NOBODY], "--output-dir: ~nosuchuser/x: no home"),
    (["compare", EXPERIMENT, "--output-dir", "FILE/x"], "--output-dir: "),
    (["compare", NOBODY], "FILE: ~nosuchuser/x: no home folder"),
    (["compare", "FILE"], "FILE"),
    (["compare", "BASE"], "base: "),
    (["publish", NOBODY], "OUTPUT_DIR: ~nosuchuser/x: no home folder"),
    (["publish", "TABLE", "--docs", "DOCS"], "is no table of prowd compare"),
    (["publish", "LIST", "--docs", "DOCS"], "is no table of prowd compare"),
    (["export", NOBODY], "RUN_DIR: ~nosuchuser/x: no home folder"),
    (["export", "RUN"], "there is no checkpoint"),
    (["export", "RUN", "--output", NOBODY], "--output: ~nosuchuser/x: no home folder"),
    (["export", "RUN", "--data-dir", NOBODY], "--data-dir: ~nosuchuser/x: no home folder"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_whatever_ends_the_command_is_one_line(words, reason, run_folder, tmp_path, capsys):
    (file := tmp_path / "file").write_text("no = [toml")
    (base := tmp_path / "base.toml").write_text('base = "../other.toml"')
    (docs := tmp_path / "docs").mkdir()
    for name, content in (("table", "{"), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.json").write_text(content)
        with (docs / "results.md").open("a") as page:
            page.write(f"<!-- {name} -->\n<!-- end of {name} -->\n")
    places = {
        "RUN": run_folder,
        "FILE": file,
        "BASE": base,
        "TABLE": tmp_path / "table",
        "LIST": tmp_path / "list",
        "DOCS": docs,
    }
    words = [
        re.sub("RUN|FILE|BASE|TABLE|LIST|DOCS", lambda m: str(places[m[0]]), str(w)) for w in words
    ]
    reason = re.sub("^FILE$", str(file.name), reason)
    line = said(capsys, *words)
    assert line.startswith("prowd: ")
    assert reason in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: COMMAND; prowd --help lists the options"),
        (["nix"], "argument COMMAND: invalid choice: 'nix' (choose from 'compare', 'report', "),
        (["report"], "the following arguments are required: RUN_DIR; prowd report --help lists"),
        (
            ["export", "x", "--bits", "a\nb"],
            r"argument --bits: invalid int value: 'a\nb'; prowd exp",
        ),
        (["compare", "x", "--nope\n"], "unrecognized arguments: --nope; prowd --help lists the op"),
    ],
)
def test_a_command_that_is_none_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"prowd: {line}")


def test_a_fault_of_our_own_is_one_line_with_its_place(monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("prowd.settings_page.settings_page", broken)
    line = said(capsys, "settings")
    assert re.fullmatch(r"prowd: ZeroDivisionError: by zero \(prowd/cli\.py:\d+\)\n", line)


@pytest.mark.parametrize(
    ("given", "written"), [("~/there/", "there/report.html"), ("~/runs", "runs/report.html")]
)
def test_the_report_is_written_into_a_folder(
    given, written, run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    # Drawing them takes seconds: tests/prowd/report.
    monkeypatch.setattr("prowd.report.page._PARTS", ())
    where = said(capsys, "report", "~/runs/one", "--output", given, code=0).strip()
    assert where == str(tmp_path / written)
    assert (tmp_path / written).read_text().startswith("<!doctype html>")


def test_a_folder_that_is_a_file_is_no_output_of_export(run_folder, tmp_path, capsys):
    (tmp_path / "taken").touch()
    words = ("export", run_folder, "--output", tmp_path / "taken" / "deeper")
    assert "prowd: " in said(capsys, *words)


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_a_number_of_jobs_that_is_none(jobs, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(EXPERIMENT), "--jobs", jobs])
    assert f"--jobs: '{jobs}' is not allowed; allowed: 1 and more" in capsys.readouterr().err


def test_the_version_names_what_decides_a_run(tmp_path):
    done = python("-m", "prowd", "--version", cwd=tmp_path)
    named = [f"{name} {version(name)}" for name in ("prowd", "flwr", "torch")]
    assert (done.stdout, done.stderr) == (", ".join(named) + "\n", "")


def test_the_version_and_the_help_wait_for_nothing(tmp_path):
    code = "import sys, prowd.cli; print({'torch', 'flwr'} & sys.modules.keys())"
    assert python("-c", f"import prowd; {code}", cwd=tmp_path).stdout.strip() == "set()"


def test_a_closed_output_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = python("-m", "prowd", "--version", cwd=tmp_path, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    with open(tmp_path / "page", "w") as page:
        done = python(
            *("-m", "prowd", "--version"),
            cwd=tmp_path,
            stdout=page,
            # Unbuffered, Python itself passes over what was not written.
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            # As on a full disk; Python ignores the signal that comes with it.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),
        )
    assert done.returncode == 2
    assert done.stderr == "prowd: the output cannot be written: File too large\n"
