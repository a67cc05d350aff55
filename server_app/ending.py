"""The end of a run: one line in the log and in the record, whatever ended it.

An exception in the ServerApp ends it, or Flower does: its simulation could not start, the run was
stopped, a signal came. In simulation Flower calls the ServerApp in a thread that ends with the
process, without an exception; but it calls exit handlers first, and has logged why.
"""

import logging
import os
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from logging import ERROR, LogRecord
from pathlib import Path
from signal import SIGINT, Signals
from types import TracebackType
from typing import Self

from flwr.common.logger import log

from core.errors import SettingsError, words_of
from core.failures import explain, one_line
from core.files import printable
from exchange.undocumented import (
    FORCE_EXIT_TIMEOUT_SECONDS,
    RunNotRunningException,
    add_exit_handler,
)
from server_app.folder import locked, writing
from server_app.record import RunEnded, RunRecord
from strategies import FederationError

TRACEBACK = "traceback.txt"
_FLOWER = logging.getLogger("flwr")
_STOPPED = (
    "Flower has ended this run: it was stopped (flwr stop), or its server was not heard of for "
    "about a minute"
)
_HOW_TO_RESUME = "docs/resume.md says how to resume"
_NOT_BEGUN = (
    "Flower's simulation has ended before the first round: a signal stopped it, or it could not "
    "start, and its log says why"
)
# On an exception that has been said in one line.
_SAID = "_prowd_said"


class RunFailed(RuntimeError):
    """A run failed for what is no setting's fault; the message is the line that was logged."""


class Ending:
    """Ends a run with one line, whatever ends it; a context manager around the whole run.

    Parameters
    ----------
    config : mapping
        The run's configuration as it was given.

    Raises
    ------
    SettingsError, FederationError
        The one that ended it.
    RunFailed
        In place of any other exception, so that Flower counts the run as failed: in simulation it
        would take what is no `Exception`, as ``sys.exit()`` in a strategy, for a good end.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config
        self._record: RunRecord | None = None
        self._reason: str | None = None
        self._lock = threading.RLock()
        self._locks = ExitStack()
        self._flower = _LastWords()
        self._parent = os.getppid()

    def __enter__(self) -> Self:
        # It stays when the run is over, for what Flower logs then.
        for heard in [one for one in _FLOWER.filters if isinstance(one, _LastWords)]:
            _FLOWER.removeFilter(heard)
        _FLOWER.addFilter(self._flower)
        add_exit_handler(self._on_exit)
        if threading.current_thread() is not threading.main_thread():
            threading.Thread(target=self._outlive_main_thread, daemon=True).start()
        return self

    def lock(self, folder: Path) -> None:
        """Keep other processes out of a run's folder until it is written how the run ended."""
        self._locks.enter_context(locked(folder))

    def watch(self, record: RunRecord) -> None:
        """Note in this record how the run ends."""
        with self._lock:
            self._record = record
            if self._reason is not None:  # It ended meanwhile, in another thread.
                self._write(self._reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._end_with(error)
        finally:
            with self._lock, self._locks:
                if self._record is not None:
                    self._record.close()
                self._reason = self._reason or ""
                self._record = None

    def _end_with(self, error: BaseException) -> None:
        """Say the error in one line and raise it, or what stands for it."""
        if self._reason is not None:
            # Flower ends the process, and this thread with it.
            if isinstance(error, Exception):
                raise _said(RunFailed(self._reason)) from None
            return
        for kind in (SettingsError, FederationError):
            if isinstance(error, kind) and (line := one_line(words_of(error))):
                self._fail(line)
                # Not of the error's own class, which may take other arguments.
                raise _said(kind(line)) from None
        if isinstance(error, KeyboardInterrupt):
            self._fail(f"interrupted {_when(self._record)}")
            return
        if isinstance(error, RunNotRunningException):
            self._fail(_STOPPED)
            raise _said(RunFailed(_STOPPED)) from None
        line = explain(error, self._config, "the run", _when(self._record))
        kept = self._keep_traceback(error)
        self._fail(line + kept)
        failed = RunFailed(line + kept)
        # Flower prints the traceback where there is no file to keep it in.
        raise (_said(failed) if kept else failed) from error

    def _on_exit(self) -> None:
        """What Flower calls before it ends the process; after a good end too."""
        if self._reason is None:
            ended = os.getppid() != self._parent
            self._fail(self._flower.reason(superlink_ended=ended))

    def _outlive_main_thread(self) -> None:
        """End the run where Flower's main thread has ended without its exit handlers.

        In simulation Ray takes over SIGTERM, at which that thread ends; the process would wait for
        this run, and this run for clients that are there no longer.
        """
        threading.main_thread().join()
        if self._record is not None and self._record.round_begun:
            self._fail(f"stopped by a signal, as SIGTERM; {_HOW_TO_RESUME}")
        else:  # It may have ended before it had this exit handler to call.
            self._fail(_NOT_BEGUN)
        time.sleep(FORCE_EXIT_TIMEOUT_SECONDS)
        os._exit(1)

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            log(ERROR, "prowd: %s", reason)
            if self._record is not None:
                self._write(reason)

    def _write(self, reason: str) -> None:
        assert self._record is not None
        try:
            self._record.write_summary("failed", reason)
        except RunEnded:
            pass
        except SettingsError as error:  # On a full disk; what failed first is what is reported.
            log(ERROR, "prowd: %s", error)

    def _keep_traceback(self, error: BaseException) -> str:
        """Write the traceback into the record; return the line's hint at it."""
        if self._record is None:
            return ""
        path = self._record.folder / TRACEBACK
        try:
            with writing(path):
                text = "".join(traceback.format_exception(error))
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except SettingsError:
            return ""
        return f"; traceback in {printable(path)}"


class _LastWords(logging.Filter):
    """Filters what Flower logs before it ends the process: what the one line holds is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._error: BaseException | None = None
        self._too_much = ""

    def filter(self, record: LogRecord) -> bool:
        """Let all pass but tracebacks of errors that are, or will be, one line."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        text = record.msg if isinstance(record.msg, str) else ""
        if text.startswith("The ActorPool is empty") and record.args:
            self._too_much = _too_much(record.args)
        elif error is not None and text.endswith("raised an exception"):
            self._error = error
        if self._too_much or getattr(error, _SAID, False):
            record.exc_info = None
        # Flower also logs them as texts, at every level that the error passes.
        return not (self._too_much and text.startswith("Traceback (most recent call last)"))

    def reason(self, *, superlink_ended: bool) -> str:
        """Return why Flower ends the process, as far as it said so."""
        if self._too_much:
            return self._too_much
        if self._error is not None:
            root = _root(self._error)
            if isinstance(root, ZeroDivisionError):  # Flower divides by nothing else there.
                return "federation-config: client-resources-num-cpus=0 is not allowed; 1 or more is"
            return f"Flower's simulation has ended: {explain(root, {})}"
        if superlink_ended:
            return f"the SuperLink that started this run has ended; {_HOW_TO_RESUME}"
        return f"stopped by {_signal()}; {_HOW_TO_RESUME}"


def _too_much(arguments: object) -> str:
    """Say which resources a simulated client asks for that this machine has not."""
    match arguments:
        case (cpus, gpus, {"num_cpus": cpus_each, **more}):
            gpus_each = more.get("num_gpus", 0)
            return (
                f"federation-config: client-resources-num-cpus={cpus_each:g} "
                f"client-resources-num-gpus={gpus_each:g} is more than there is for a single "
                f"client; the simulation has {cpus:g} CPUs and {gpus:g} GPUs"
            )
    return "federation-config: client-resources is more than there is for a single client"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _signal() -> str:
    """Name the signal that Flower handles, as its handler is what calls here."""
    for frame, _ in traceback.walk_stack(None):
        number = frame.f_locals.get("signalnum")
        if isinstance(number, int) and number != SIGINT:
            return Signals(number).name
    # Flower sends it to its own process when the SuperLink reports the end of the run.
    return "flwr stop, or Ctrl-C"


def _when(record: RunRecord | None) -> str:
    if record is None or not record.round_begun:
        return "before its first round"
    return f"in round {record.round_begun}"


def _said(error: BaseException) -> BaseException:
    setattr(error, _SAID, True)
    return error
