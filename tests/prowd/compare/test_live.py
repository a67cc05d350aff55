"""A comparison in progress: where runs stand, how long they take, in a terminal and in none."""

import errno
import io
import os
import pty
import re
import sys
import threading
import time

import pytest
from rich.console import Console
from run_records import COMMON, entry

from prowd.compare import live
from prowd.compare.live import Board, Outcome, run_all
from prowd.compare.plan import Experiment
from prowd.compare.runs import INTERRUPTED, planned_runs
from server_app.record import RunRecord

EXPERIMENT = Experiment(
    title="Digits",
    seeds=[0],
    settings={"num-server-rounds": 4},
    scenarios={"half": {}},
    systems={"A": {"strategy": "fedavg"}, "B": {"strategy": "fedavg", "batch-size": 0}},
)
FAILED = "batch-size: 0 is not allowed"


def leave_record(run, federation, stop=None, starting=None):
    """Leave what `flwr run` leaves, in a moment: two rounds, or the failure of a wrong setting."""
    record = RunRecord(run.folder)
    if run.settings.get("batch-size") == 0:
        record.write_summary("failed", FAILED)
        return FAILED
    record.write_config({**COMMON, **run.settings})
    for number in (1, 2):
        record.append_round(entry("fedavg", number, 0.75))
    record.write_summary("completed")
    record.close()
    return ""


def test_a_run_is_followed_in_its_own_record(runs, monkeypatch):
    """What is shown of a run comes from its record: rounds, accuracy, and the time left."""
    now = 0.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now)
    board = Board("Digits", runs, runs)
    board.begin(runs[0])
    record = RunRecord(runs[0].folder)
    assert shown(board)["half-A-seed0"] == "running 0/4 --:--"
    for number in (1, 2, 3):
        now += 5
        record.append_round(entry("fedavg", number, 0.75))
        text = shown(board)
    # A round takes five seconds; accuracy is of the last round that was evaluated.
    assert text["half-A-seed0"] == "running 3/4 average 75.00% 3-bit 65.00% 32-bit 85.00% 00:05"
    assert text["half-B-seed0"] == "waiting 0/4 --:--"
    # One round of this run, and the other's four, at this rate.
    assert text["Digits"] == "3/8 1 running, 1 waiting 00:25"
    board.end(runs[0], FAILED)
    text = shown(board)
    assert text["half-A-seed0"] == f"failed 3/4 {FAILED}"
    # Of the run that failed no round is left.
    assert text["Digits"] == "3/8 1 failed, 1 waiting 00:20"


def shown(board):
    """Return what the table says of each run, and of all of them."""
    console = Console(file=io.StringIO(), width=160)
    console.print(board.live.get_renderable())
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    return {line[0]: " ".join(line[1:]) for line in lines}


def test_a_small_terminal_shows_what_runs_and_what_failed(tmp_path):
    seeds = EXPERIMENT.model_copy(update={"seeds": list(range(10))})
    runs = planned_runs(seeds, tmp_path, {})
    board = Board("Digits", runs, runs[-2:])
    for run in runs[-2:]:
        board.begin(run)
    board.end(runs[-1], FAILED)
    assert list(shown(board))[1:4] == ["Digits", runs[-2].folder.name, runs[-1].folder.name]


def test_a_narrow_terminal_cuts_nothing_off(tmp_path):
    name, reason = "80-20-one-normalization-for-all", "[red] no folder /path/to/cifar10-images"
    plan = EXPERIMENT.model_copy(update={"systems": {name: {}}, "seeds": [0, 1]})
    runs = planned_runs(plan, tmp_path, {})
    leave_record(runs[0], "")
    board = Board("Digits", runs, runs[1:])
    board.begin(runs[1])
    board.end(runs[1], reason)
    console = Console(file=io.StringIO(), width=80)
    console.print(board.live.get_renderable())
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = "".join("".join(lines).split())
    # What stands in square brackets is no markup.
    for part in ("seed0", "75.00%", "65.00%", "32-bit85.00%", "2/4", "[red]", "cifar10-images"):
        assert part in text


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setattr(live, "execute", leave_record)
    return planned_runs(EXPERIMENT, tmp_path, {})


def test_without_a_terminal_there_are_plain_lines(runs, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run_all(EXPERIMENT, runs, 1) == Outcome({"half-B-seed0": FAILED}, interrupted=False)
    said = re.sub(r"after \d+:\d\d", "after 0:00", capsys.readouterr().out)
    assert said.splitlines() == [
        "Digits: 0 of 2 runs are done",
        "[1/2] half-A-seed0 ...",
        "[1/2] half-A-seed0: done after 0:00 | average 75.00% 3-bit 65.00% 32-bit 85.00%",
        "[2/2] half-B-seed0 ...",
        f"[2/2] half-B-seed0: failed: {FAILED}",
    ]


def test_a_run_that_cannot_be_written_fails_and_the_others_continue(runs, monkeypatch):
    def full_disk(run, federation, stop, starting):
        raise OSError(errno.ENOSPC, "No space left on device", "/a/log")

    monkeypatch.setattr(live, "execute", full_disk)
    reasons = {run.folder.name: "/a/log: No space left on device" for run in runs}
    assert run_all(EXPERIMENT, runs, 1) == Outcome(reasons, interrupted=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_one_run_otherwise_stops_all(runs, monkeypatch, error):
    """Two at a time: the first raises, the second is told to stop."""
    both_run, told = threading.Barrier(2), []

    def fail_or_wait(run, federation, stop, starting):
        both_run.wait(10)
        if run.system == "A":
            raise error
        told.append(stop.wait(10))
        return INTERRUPTED

    monkeypatch.setattr(live, "execute", fail_or_wait)
    if error is KeyboardInterrupt:
        assert run_all(EXPERIMENT, runs, 2) == Outcome({}, interrupted=True)
    else:
        with pytest.raises(error):
            run_all(EXPERIMENT, runs, 2)
    assert told == [True]


def test_in_a_terminal_a_table_lives(runs, monkeypatch):
    """A real pseudo-terminal: the table changes while runs continue, and stays at the end."""

    def slowly(run, federation, stop, starting):
        time.sleep(1.5)
        return leave_record(run, federation)

    monkeypatch.setattr(live, "execute", slowly)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    output = shown_in_a_terminal(lambda: run_all(EXPERIMENT, runs, 1), monkeypatch)
    assert "\x1b[" in output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert re.search(r"half-A-seed0 .* running", plain)
    assert re.search(r"half-B-seed0 .* waiting", plain)
    last = plain[plain.rindex("accuracy, or reason") :]
    assert re.search(r"half-A-seed0 .* done .* 2/4 .* average 75.00%", last)
    assert re.search(rf"half-B-seed0 .* failed .* {FAILED}", last)
    assert "..." not in plain


def shown_in_a_terminal(run, monkeypatch):
    ours, theirs = pty.openpty()
    parts = []

    def drain():
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed.
                return
            if not data:
                return
            parts.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        run()
    reader.join()
    os.close(ours)
    return b"".join(parts).decode()
