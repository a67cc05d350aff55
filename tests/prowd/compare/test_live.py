"""A comparison as it goes on: where runs stand, how long they take, in a terminal and in none."""

import errno
import io
import os
import pty
import re
import sys
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console
from run_records import COMMON, entry

from prowd.compare import live
from prowd.compare.live import Outcome, fitting_table, make_table, run_all
from prowd.compare.plan import Experiment
from prowd.compare.progress import Progress, State, Watch, seconds_left
from prowd.compare.runs import INTERRUPTED, planned_runs
from server_app.record import RunRecord

EXPERIMENT = Experiment(
    title="Digits",
    seeds=[0],
    settings={"num-server-rounds": 2},
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


def test_time_left_is_that_of_the_rounds_to_come():
    runs = [
        Progress("a", State.DONE, rounds=10, num_rounds=10, seconds=20.0),
        Progress("b", State.RUNNING, rounds=5, num_rounds=10, seconds=25.0),
        Progress("c", State.WAITING),
        Progress("d", State.FAILED, rounds=5, num_rounds=10, seconds=15.0),
    ]
    # b: 5 rounds of 5 s; c: 10 rounds of the usual (20 + 25 + 15) / 20 = 3 s.
    assert seconds_left(runs, 1) == 55.0
    # Two at a time: half of it, but no less than the longest.
    assert seconds_left(runs, 2) == 30.0
    # c begins as a and d did.
    began = [replace(runs[0], around=8.0), *runs[1:3], replace(runs[3], around=12.0)]
    assert seconds_left(began, 1) == 65.0
    assert seconds_left(runs[:1], 1) == 0.0
    assert seconds_left([Progress("c", State.WAITING)], 1) is None


def test_a_run_is_watched_by_its_own_record(tmp_path):
    first, second = planned_runs(EXPERIMENT, tmp_path, {})
    watch = Watch([first, second], [first, second])
    assert [run.state for run in watch.now()] == [State.WAITING, State.WAITING]
    watch.begin(first)
    record = RunRecord(first.folder)
    record.append_round(entry("fedavg", 1, 0.5))
    record.append_round(entry("fedavg", 2, 0.75))
    running = watch.now()[0]
    assert (running.state, running.rounds, running.num_rounds) == (State.RUNNING, 2, 2)
    assert running.scores() == "average 75.00% 3-bit 65.00% 32-bit 85.00%"
    record.write_summary("completed")
    assert watch.end(first, "").state is State.DONE
    watch.begin(second)
    failed = watch.end(second, FAILED)
    assert watch.now()[1] == failed
    assert (failed.state, failed.reason) == (State.FAILED, FAILED)


def rendered(runs, most=None, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(make_table("Digits", runs, 1, most))
    return console.file.getvalue()


def test_the_table_has_a_row_a_run():
    accuracy = {"3": 0.65, "average": 0.75}
    runs = [
        Progress("half-A-seed0", State.DONE, "", 4, 4, 12.0, accuracy),
        Progress("half-B-seed0", State.RUNNING, "", 2, 4, 70.0, accuracy),
        Progress("half-C-seed0", State.FAILED, "data: [red] is no folder"),
        Progress("half-D-seed0", State.WAITING, num_rounds=4),
    ]
    text = rendered(runs)
    assert re.search(r"half-A-seed0 .* done .* 4/4 .* average 75.00% 3-bit 65.00%", text)
    assert re.search(r"half-B-seed0 .* running .* 2/4 .* 1:10", text)
    # What stands in square brackets is no markup.
    assert re.search(r"half-C-seed0 .* failed .* data: \[red\] is no folder", text)
    assert re.search(r"half-D-seed0 .* waiting", text)
    # 2 rounds of 35 s, and 4 of the usual (12 + 70) / 6 s.
    assert "1 waiting, 1 running, 1 done, 1 failed; about 2:04 left" in " ".join(text.split())


def test_a_small_terminal_shows_what_runs_and_what_failed():
    done = [Progress(f"done-{i}", State.DONE, "", 4, 4, 4.0) for i in range(30)]
    others = [Progress("bad", State.FAILED, "why"), Progress("now", State.RUNNING)]
    console = Console(file=io.StringIO(), width=60, height=11)
    console.print(fitting_table("Digits", [*done, *others], 1, console))
    text = console.file.getvalue()
    assert "bad" in text
    assert "now" in text
    assert text.count("done-") == 1
    assert len(text.splitlines()) <= 10
    assert all(len(line) <= 60 for line in text.splitlines())


def test_a_narrow_terminal_cuts_nothing_off():
    accuracy = {"4": 0.55, "32": 0.57, "average": 0.56}
    name = "80-20-one-normalization-for-all-seed0"
    reason = "data-dir: there is no folder /path/to/cifar10-images"
    runs = [
        Progress(name, State.RUNNING, "", 12, 30, 70.0, accuracy),
        Progress("b", State.FAILED, reason),
    ]
    lines = rendered(runs, width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = "".join("".join(lines).split())
    for part in (name[-5:], "56.00%", "55.00%", "32-bit57.00%", "12/30", "cifar10-images"):
        assert part in text


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setattr(live, "execute", leave_record)
    return planned_runs(EXPERIMENT, tmp_path, {})


def test_without_a_terminal_there_are_plain_lines(runs, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run_all(EXPERIMENT, runs, 1) == Outcome({"half-B-seed0": FAILED}, interrupted=False)
    assert capsys.readouterr().out.splitlines() == [
        "Digits: 0 of 2 runs are done",
        "[1/2] half-A-seed0 ...",
        "[1/2] half-A-seed0: done after 0:06 | average 75.00% 3-bit 65.00% 32-bit 85.00%",
        "[2/2] half-B-seed0 ...",
        f"[2/2] half-B-seed0: failed: {FAILED}",
    ]


def test_a_run_that_cannot_be_written_fails_and_the_others_go_on(runs, monkeypatch):
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
    """A real pseudo-terminal: the table changes while runs go on, and stays at the end."""

    def slowly(run, federation, stop, starting):
        time.sleep(0.3)
        return leave_record(run, federation)

    monkeypatch.setattr(live, "execute", slowly)
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_LOOKS", 0.05)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    output = shown_in_a_terminal(lambda: run_all(EXPERIMENT, runs, 1), monkeypatch)
    assert "\x1b[" in output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert re.search(r"half-A-seed0 .* running", plain)
    assert re.search(r"half-B-seed0 .* waiting", plain)
    last = plain[plain.rindex("accuracy, or reason") :]
    assert re.search(r"half-A-seed0 .* done .* 2/2 .* average 75.00%", last)
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
