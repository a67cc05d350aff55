"""Every kind of end of a run: one line in the log, the same in its record, and an exception."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from logging import ERROR
from types import SimpleNamespace

import pytest
import ray
from flower_log import flower_log
from flwr.common.logger import log
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
from flwr.supercore.constant import FORCE_EXIT_TIMEOUT_SECONDS
from flwr.supercore.exit import register_signal_handlers, signal_handler
from flwr.supercore.exit.exit_handler import trigger_exit_handlers
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.telemetry import EventType

from core.errors import SettingsError
from server_app.ending import TRACEBACK, Ending, RunFailed
from server_app.folder import locked
from server_app.record import RunRecord
from strategies import FederationError

STOPPED = (
    "Flower has ended this run: it was stopped (flwr stop), or its server was not heard of for "
    "about a minute"
)


class Own(SettingsError):
    """Of the user's own, with other arguments."""

    def __init__(self, setting, reason):
        super().__init__(f"{setting}:\n{reason}")


class OwnFederationError(FederationError):
    def __init__(self, count, *, of):
        super().__init__(f"{count} of {of}")


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Forget the exit handlers of other tests; Flower's logger filters no ending of this one."""
    monkeypatch.setattr(logging.getLogger("flwr"), "filters", [])
    monkeypatch.setattr("flwr.supercore.exit.exit_handler.registered_exit_handlers", [])


@pytest.fixture
def said():
    with flower_log() as listener:
        yield listener


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def run(folder, happens, config=None):
    """Run what happens in a run with a record; as Flower does, log what is raised, and end."""
    raised = None
    try:
        with Ending(config or {}) as ending:
            record = RunRecord(folder)
            ending.watch(record)
            ending.lock(folder)
            happens(record)
    except BaseException as error:
        raised = error
        if isinstance(error, Exception):
            log(ERROR, "%s raised an exception", "ServerApp", exc_info=error)
    flower_exits()
    return raised


def flower_exits():
    """Do what `flwr_exit` does, but for the end of the process."""
    trigger_exit_handlers(run_before_force_exit=False)


def raising(error):
    def happens(record):
        record.round_begun = 3
        raise error

    return happens


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def assert_failed(folder, said, reason):
    assert said.ends() == [reason]
    summary = summary_of(folder)
    assert (summary["status"], summary["reason"]) == ("failed", reason)


# Errors of the run itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (SettingsError("data-dir: no\nfolder \x1b"), SettingsError, r"data-dir: no folder \x1b"),
        (FederationError("0 nodes can take part"), FederationError, "0 nodes can take part"),
        (Own("mine", "is wrong"), SettingsError, "mine: is wrong"),
        (OwnFederationError(1, of=2), FederationError, "1 of 2"),
    ],
)
def test_an_error_that_names_what_is_wrong_is_the_line(folder, said, error, kind, reason):
    raised = run(folder, raising(error))
    assert type(raised) is kind
    assert str(raised) == reason
    assert_failed(folder, said, reason)
    assert "Traceback" not in "".join(said.of_server)
    assert not (folder / TRACEBACK).exists()


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero"),
        (SystemExit(), "SystemExit"),
        (SystemExit("bye"), "SystemExit: bye"),
        (GeneratorExit(), "GeneratorExit"),
        (MemoryError(), "MemoryError"),
        (SettingsError(), "SettingsError"),
        (RuntimeError("b\udcff"), r"RuntimeError: b\xff"),
        (Mute(), "Mute: (a Mute without words, as its __str__ fails)"),
    ],
)
def test_any_other_error_is_a_line_with_its_place_and_its_traceback_is_kept(
    folder, said, error, named
):
    raised = run(folder, raising(error))
    # Flower takes what is no Exception, as in a strategy that exits, for a good end.
    assert type(raised) is RunFailed
    [line] = said.ends()
    assert line.startswith(f"the run failed in round 3: {named} (test_ending.py:")
    assert line.endswith(f"; traceback in {folder / TRACEBACK}")
    assert str(raised) == line
    assert_failed(folder, said, line)
    kept = (folder / TRACEBACK).read_text()
    assert kept.startswith("Traceback (most recent call last):\n")
    assert "happens(record)" in kept
    assert type(error).__name__ in kept
    # It is in the file, and not in the log as well.
    assert said.of_server[-1] == "ERROR ServerApp raised an exception"


def test_code_of_the_users_own_is_named_by_its_setting(folder, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_strategy", sys.modules[__name__])
    config = {"strategy": "own_strategy:Strategy"}
    run(folder, raising(KeyError("w")), config)
    [line] = said.ends()
    assert line.startswith("strategy: 'own_strategy:Strategy' failed in round 3: KeyError: 'w' (")


def test_an_error_before_there_is_a_record_shows_its_traceback(said):
    with pytest.raises(RunFailed) as caught, Ending({}):
        raise ZeroDivisionError("too early")
    line = str(caught.value)
    assert line.startswith("the run failed before its first round: ZeroDivisionError: too early (")
    assert said.ends() == [line]
    log(ERROR, "%s raised an exception", "ServerApp", exc_info=caught.value)
    # It is kept nowhere else.
    assert "Traceback" in said.of_server[-1]
    assert "ZeroDivisionError: too early" in said.of_server[-1]


def test_a_traceback_that_cannot_be_kept_is_shown(folder, said):
    def happens(record):
        (folder / TRACEBACK).mkdir()
        raise ZeroDivisionError

    run(folder, happens)
    [line] = said.ends()
    assert "traceback" not in line
    assert summary_of(folder)["reason"] == line
    assert "Traceback" in said.of_server[-1]


def test_ctrl_c_is_passed_on(folder, said):
    assert type(run(folder, raising(KeyboardInterrupt()))) is KeyboardInterrupt
    assert_failed(folder, said, "interrupted in round 3")


def test_a_run_that_flower_ended_says_so_without_a_traceback(folder, said):
    raised = run(folder, raising(RunNotRunningException()))
    assert type(raised) is RunFailed
    assert_failed(folder, said, STOPPED)
    assert "Traceback" not in "".join(said.of_server)
    assert not (folder / TRACEBACK).exists()


# Ends by Flower ----------------------------------------------------------------------------------


def test_an_engine_that_cannot_start_is_told_by_what_it_lacks(folder, said, monkeypatch):
    """Flower's own function logs what is heard here, and its engine three tracebacks more."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": {"CPU": 2.0}}])

    def happens(_):
        try:
            pool_size_from_resources({"num_cpus": 64, "num_gpus": 0.1})
        except ValueError as error:
            log(ERROR, "An exception occured!! %s", error)
            log(ERROR, traceback.format_exc())
            log(ERROR, "%s raised an exception", "Simulation", exc_info=error)
        flower_exits()

    assert run(folder, happens) is None
    assert_failed(
        folder,
        said,
        "federation-config: client-resources-num-cpus=64 client-resources-num-gpus=0.1 is more "
        "than there is for a single client; the simulation has 2 CPUs and 0 GPUs",
    )
    assert "Traceback" not in "".join(said.of_server)
    assert "ERROR Simulation raised an exception" in said.of_server


def test_an_engine_that_says_it_in_other_words_is_understood(folder, said):
    def happens(_):
        log(ERROR, "The ActorPool is empty. %s", "Too few.")
        flower_exits()

    run(folder, happens)
    expected = "federation-config: client-resources is more than there is for a single client"
    assert_failed(folder, said, expected)


def test_a_simulation_that_failed_says_at_what(folder, said):
    def happens(_):
        try:
            try:
                raise OSError("/dev/shm is full")
            except OSError as error:
                raise RuntimeError("Simulation Runtime crashed.") from error
        except RuntimeError as error:
            log(ERROR, "%s raised an exception", "Simulation", exc_info=error)
        flower_exits()

    run(folder, happens)
    [line] = said.ends()
    assert line.startswith("Flower's simulation has ended: OSError: /dev/shm is full (test_ending")
    assert_failed(folder, said, line)
    # No other place keeps it.
    assert any("Traceback" in text for text in said.of_server)


def test_a_client_without_a_cpu_is_named_and_no_division(folder, said, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Resources": {"CPU": 2}}])

    def happens(_):
        try:
            pool_size_from_resources({"num_cpus": 0, "num_gpus": 0.0})
        except ZeroDivisionError as error:
            log(ERROR, "%s raised an exception", "Simulation", exc_info=error)
        flower_exits()

    run(folder, happens)
    expected = "federation-config: client-resources-num-cpus=0 is not allowed; 1 or more is"
    assert_failed(folder, said, expected)


def test_a_superlink_that_is_gone_is_told(folder, said, monkeypatch):
    def happens(_):
        monkeypatch.setattr(os, "getppid", lambda: 1)
        flower_exits()

    run(folder, happens)
    assert_failed(
        folder,
        said,
        "the SuperLink that started this run has ended; docs/resume.md says how to resume",
    )


@pytest.fixture
def signals(monkeypatch):
    """Flower's own handlers of signals, which here end no process."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def leave(**_):
        flower_exits()
        sys.exit(0)

    monkeypatch.setattr(signal_handler, "flwr_exit", leave)
    register_signal_handlers(EventType.PING)
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize(
    ("number", "by"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGQUIT, "SIGQUIT"),
        # What Flower sends to itself where the SuperLink says that the run is over.
        (signal.SIGINT, "flwr stop, or Ctrl-C"),
    ],
)
def test_a_signal_is_named(folder, said, signals, number, by):
    raised = run(folder, lambda _: signal.raise_signal(number))
    assert type(raised) is SystemExit
    assert_failed(folder, said, f"stopped by {by}; docs/resume.md says how to resume")
    assert not (folder / TRACEBACK).exists()


def test_what_fails_after_flower_has_ended_the_run_is_not_the_reason(folder, said):
    """In simulation the run's thread continues for seconds, with clients that are gone."""

    def happens(record):
        log(ERROR, "The ActorPool is empty. %s", "Too few.")
        flower_exits()
        record.round_begun = 1
        raise FederationError("no node is connected")

    raised = run(folder, happens)
    expected = "federation-config: client-resources is more than there is for a single client"
    assert type(raised) is RunFailed
    assert str(raised) == expected
    assert_failed(folder, said, expected)


def test_a_record_that_is_opened_after_the_end_says_failed(folder, said):
    """The engine may fail while the run still imports or reads its settings."""

    def run_late():
        with Ending({}) as ending:
            flower_exits()
            ending.watch(RunRecord(folder))
            raise SettingsError("too late")

    with pytest.raises(RunFailed):
        run_late()
    [line] = said.ends()
    assert line.startswith("stopped by ")
    assert_failed(folder, said, line)


@pytest.mark.parametrize(
    ("round_begun", "reason"),
    [
        (2, "stopped by a signal, as SIGTERM; docs/resume.md says how to resume"),
        (
            0,
            "Flower's simulation has ended before the first round: a signal stopped it, or it "
            "could not start, and its log says why",
        ),
    ],
)
def test_a_main_thread_that_ended_without_exit_handlers_ends_the_run(
    folder, said, monkeypatch, round_begun, reason
):
    """In simulation: Ray takes over SIGTERM. The process would wait for this thread for ever."""
    (main := threading.Thread()).start()
    main.join()
    codes, ended = [], threading.Event()

    def leave(code):
        codes.append(code)
        ended.set()

    ending = Ending({})
    record = RunRecord(folder)
    record.round_begun = round_begun
    ending.watch(record)
    monkeypatch.setattr(threading, "main_thread", lambda: main)
    monkeypatch.setattr("server_app.ending.time", SimpleNamespace(sleep=codes.append))
    monkeypatch.setattr("server_app.ending.os", SimpleNamespace(_exit=leave, getppid=os.getppid))
    with ending:
        assert ended.wait(60)
    assert codes == [FORCE_EXIT_TIMEOUT_SECONDS, 1]
    assert_failed(folder, said, reason)


# Good ends, and what is left ---------------------------------------------------------------------


def test_a_completed_run_stays_completed_when_flower_exits(folder, said):
    def happens(record):
        record.write_summary("completed")

    assert run(folder, happens) is None
    assert said.ends() == []
    assert summary_of(folder)["status"] == "completed"


def test_an_error_after_the_good_end_is_told_and_does_not_undo_it(folder, said):
    def happens(record):
        record.write_summary("completed")
        raise ZeroDivisionError

    assert type(run(folder, happens)) is RunFailed
    assert len(said.ends()) == 1
    assert summary_of(folder)["status"] == "completed"


@pytest.mark.parametrize("error", [None, ZeroDivisionError(), KeyboardInterrupt(), SystemExit()])
def test_locks_are_let_go_whatever_the_end(folder, said, error):
    def happens(record):
        with pytest.raises(SettingsError, match="another process is writing"), locked(folder):
            pass
        if error is not None:
            raise error

    run(folder, happens)
    with locked(folder):
        pass


def test_locks_are_held_until_it_is_written_how_the_run_ended(folder, said, monkeypatch):
    held = []
    write = RunRecord.write_summary

    def writing(record, status, reason=""):
        if status == "failed":
            with pytest.raises(SettingsError, match="another process is writing"), locked(folder):
                pass
            held.append(status)
        write(record, status, reason)

    monkeypatch.setattr(RunRecord, "write_summary", writing)
    run(folder, raising(ZeroDivisionError()))
    assert held == ["failed"]


def test_a_summary_that_cannot_be_written_is_a_line_of_its_own(folder, said):
    def happens(_):
        (folder / "summary.json").unlink()
        (folder / "summary.json").mkdir()
        raise FederationError("0 nodes can take part")

    assert type(run(folder, happens)) is FederationError
    first, second = said.ends()
    assert first == "0 nodes can take part"
    assert second == f"output-dir: {folder}/summary.json cannot be written: Is a directory"


def test_a_second_run_of_a_process_is_not_affected_by_the_first(tmp_path, said):
    first, second = tmp_path / "first", tmp_path / "second"

    def lacks(_):
        log(ERROR, "The ActorPool is empty. %s", "Too few.")
        flower_exits()

    run(first, lacks)
    run(second, lambda _: flower_exits())
    assert summary_of(second)["reason"].startswith("stopped by ")
    filters = logging.getLogger("flwr").filters
    assert len([one for one in filters if type(one).__name__ == "_LastWords"]) == 1
