"""What is refused before the first run of a comparison."""

import json

import pytest
from run_records import write_run

from prowd.cli import main
from prowd.compare.command import Choice, Comparison

PLAN = """
title = "Small"
seeds = [0]
[settings]
num-server-rounds = 4
bit-mix = "3:0.5,32:0.5"
learning-rate = 0.1
[scenarios.half]
[systems.A]
strategy = "fedavg"
"""


@pytest.fixture
def compare(tmp_path, capsys):
    """Run `prowd compare` on a small plan; return its exit code and what it said."""
    plan = tmp_path / "small.toml"

    def run(*arguments, text=PLAN):
        plan.write_bytes(text if isinstance(text, bytes) else text.encode())
        if "--output-dir" not in arguments:
            arguments = ("--output-dir", str(tmp_path / "out"), *arguments)
        code = main(["compare", str(plan), *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def made(tmp_path):
    """The only run of the plan, done already."""
    return write_run(tmp_path / "out" / "half-A-seed0", "fedavg", 0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "no-such = 1"], "half-A-seed0: no-such: there is no such setting"),
        (["--set", "batch-size = 0"], "half-A-seed0: batch-size: 0 is not allowed"),
        (["--set", "data-dir = '/path/to/images'"], "there is no folder /path/to/images"),
        (["--set", "seed = 5"], "--set: seed is left to prowd compare"),
        (["--set", "run-name = 'x'"], "--set: run-name is left to prowd compare"),
        (["--set", "momentum = 2020-01-01"], "--set: momentum is a text, a number"),
        (["--set", "momentum"], "--set: write it as"),
        (["--seeds", "0,0"], "--seeds: 0,0 names a seed twice"),
        (["--seeds", "one"], "--seeds: 'one' is not whole numbers"),
        (["--output-dir", "/proc/x"], "--output-dir: /proc/x cannot be made"),
    ],
)
def test_what_no_run_can_have_is_one_line(compare, arguments, reason):
    code, said, complained = compare(*arguments)
    assert (code, said) == (2, "")
    assert reason in complained
    assert complained.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff\xfe", "small.toml"),
        (PLAN.replace("[0]", "[1, 1]"), "seeds: [1, 1] is not allowed"),
        ("base = 'small.toml'\nsettings = 5", "settings"),
    ],
)
def test_what_no_plan_can_be_is_one_line(compare, text, reason):
    code, _, complained = compare(text=text)
    assert code == 2
    assert reason in complained
    assert complained.count("\n") == 1


def test_no_run_at_a_time_is_refused(compare, capsys):
    with pytest.raises(SystemExit):
        compare("--jobs", "0")
    assert "--jobs: '0' is not allowed" in capsys.readouterr().err


def test_a_run_under_other_settings_is_not_taken_for_one_of_these(compare, made):
    code, said, _ = compare()
    assert (code, said.splitlines()[0]) == (0, "Small: 1 of 1 runs are done")
    # What changes no number may change.
    elsewhere = str(made.parent)
    code, said, _ = compare("--set", "node-wait = 5.0", "--set", f"data-dir = '{elsewhere}'")
    assert (code, said.splitlines()[0]) == (0, "Small: 1 of 1 runs are done")
    code, said, complained = compare("--set", "num-server-rounds = 5")
    assert (code, said) == (2, "")
    assert "was run with num-server-rounds = 4, and not 5" in complained
    code, said, complained = compare("--set", "learning-rate = 0.25")
    assert (code, said) == (2, "")
    settings = json.loads((made / "config.json").read_text())["settings"]
    assert f"was run with learning-rate = {settings['learning-rate']}, and not 0.25" in complained


def test_what_is_set_against_the_file_is_in_the_title(compare, made):
    rate = json.loads((made / "config.json").read_text())["settings"]["learning-rate"]
    text = PLAN.replace("learning-rate = 0.1\n", "")
    given = ["--set", f"learning-rate = {rate}", "--set", "bit-mix = '3:0.5,32:0.5'"]
    code, said, _ = compare(*given, "--set", f"data-dir = '{made}'", text=text)
    assert (code, said.splitlines()[0]) == (0, f"Small, learning-rate {rate}: 1 of 1 runs are done")
    assert f"### Small, learning-rate {rate}: half" in said


def test_what_beats_one_system_alone_is_in_the_title_too(tmp_path):
    """The file's own value, but not what one of its systems has; and another number of clients."""
    plan = tmp_path / "plan.toml"
    plan.write_text(f"federation = 'num-supernodes=2'\n{PLAN}learning-rate = 0.2\n")

    def title(sets=(), federation=""):
        choice = Choice(sets=sets, federation=federation)
        return Comparison.read(plan, choice, tmp_path / "out").experiment.title

    assert title() == title(federation="num-supernodes=2 client-resources-num-cpus=2") == "Small"
    assert title(["learning-rate = 0.1"]) == "Small, learning-rate 0.1"
    assert title(federation="num-supernodes=4") == "Small, num-supernodes=4"


def test_seeds_that_were_run_before_stay_in_the_table(compare, made, tmp_path):
    write_run(tmp_path / "out" / "half-A-seed7", "fedavg", 7)
    code, said, _ = compare("--seeds", "7")
    assert (code, said.splitlines()[0]) == (0, "Small: 1 of 1 runs are done")
    table = json.loads((tmp_path / "out" / "table.json").read_text())["results"]
    assert [result["seed"] for result in table] == [0, 7]
