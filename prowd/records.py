"""Run records as others read them: all that is whole, and what is not by name."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)

from core.errors import SettingsError
from core.files import is_locked, read_regular
from core.run_record import CONFIG, ROUNDS, SUMMARY, WEIGHTS, Config, Round, Summary, Weights

# Why a run is not finished whose record says "running" while no process holds its lock.
KILLED = "ended without a word (killed?)"
FILES = (CONFIG, SUMMARY, ROUNDS)
Read = TypeVar("Read", bound=BaseModel)
OfRound = TypeVar("OfRound", "Round", "Weights")


@dataclass(frozen=True)
class Record:
    """A run, read from its record.

    Attributes
    ----------
    folder : Path
        Of the run.
    config : Config
        Its settings.
    summary : Summary
        How it ended; ``status`` is "running" for one that did not; `reason` is then `KILLED` where
        no process writes it any more.
    rounds : tuple of Round
        Those that could be read, in order.
    weights : tuple of Weights
        Likewise.
    damage : tuple of str
        What could not be read and why, one line each.
    """

    folder: Path
    config: Config
    summary: Summary
    rounds: tuple[Round, ...]
    weights: tuple[Weights, ...]
    damage: tuple[str, ...]

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        """Every setting by its full key; empty if they are lost."""
        return self.config.settings

    @property
    def num_rounds(self) -> int:
        """Rounds that were asked for; 0 if that is lost."""
        asked = self.settings.get("num-server-rounds", 0)
        return asked if isinstance(asked, int) else 0


def read_config(folder: Path) -> Config:
    """Read a run's settings; empty if they cannot be read."""
    return _read_file(folder / CONFIG, Config, [])


def read_summary(folder: Path) -> Summary:
    """Read how a run ended; its status is empty if it cannot be read."""
    return _read_file(folder / SUMMARY, Summary, [])


def read_record(folder: Path, weights: bool = True) -> Record:
    """Read what is whole of a run's record, also of one that is still written.

    Parameters
    ----------
    folder : Path
        Of the run.
    weights : bool
        Whether to read weights.jsonl too, which takes longest.
    """
    damage: list[str] = []
    summary = _read_file(folder / SUMMARY, Summary, damage)
    # A run with wrong settings has no settings and no rounds, one that begins has none yet.
    whole = summary.status not in ("failed", "running")
    if summary.status == "running" and is_locked(folder) is False:
        summary = summary.model_copy(update={"reason": KILLED})
    config = _read_file(folder / CONFIG, Config, damage, needed=whole)
    strategy = str(config.settings.get("strategy", ""))

    def read_round(entry: dict[str, Any]) -> Round:
        return Round.model_validate({**entry, "own": entry.get(strategy) or {}})

    rounds = _read_lines(folder / ROUNDS, read_round, damage)
    damage += [f"{ROUNDS} {gap}" for gap in _gaps(rounds, summary.rounds if whole else 0)]
    file = folder / WEIGHTS
    seen = _read_lines(file, Weights.model_validate, damage) if weights else ()
    return Record(folder, config, summary, rounds, seen, tuple(damage))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of runs: each path that is one, and those in each path that holds some.

    What `prowd compare` has moved aside is left out of a folder of runs.

    Raises
    ------
    SettingsError
        If a path is neither.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise SettingsError(f"{path}: there is no such folder")
        runs = [path] if is_run(path) else sorted(p for p in path.iterdir() if is_run(p))
        kept = [run for run in runs if run == path or ".broken" not in run.name]
        if not kept:
            raise SettingsError(f"{path}: holds no run; one has {', '.join(FILES)}")
        found |= dict.fromkeys(run.resolve() for run in kept)
    return list(found)


def is_run(folder: Path) -> bool:
    """Return whether a folder holds any file of a run's record."""
    return any((folder / name).is_file() for name in FILES)


def _read_file(path: Path, kind: type[Read], damage: list[str], needed: bool = True) -> Read:
    try:
        return kind.model_validate(_parse(read_regular(path)))
    except FileNotFoundError:
        damage += [f"{path.name} is missing"] if needed else []
    except (OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} is damaged: {_short(error)}")
    return kind()


def _read_lines(
    path: Path, read: Callable[[dict[str, Any]], OfRound], damage: list[str]
) -> tuple[OfRound, ...]:
    """Read line by line; a line that cannot be read, or repeats a round, is named and left out."""
    try:
        lines = read_regular(path).splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        damage.append(f"{path.name} cannot be read: {error.strerror}")
        return ()
    found: list[OfRound] = []
    for number, line in enumerate(lines, 1):
        try:
            part = read(_parse(line))
        except (ValueError, RecursionError) as error:
            damage.append(f"{path.name} line {number} is damaged: {_short(error)}")
            continue
        if found and part.round <= found[-1].round:
            damage.append(f"{path.name} line {number} holds round {part.round} out of turn")
            continue
        found.append(part)
    return tuple(found)


def _gaps(rounds: Sequence[Round], last: int) -> Iterator[str]:
    """Name the rounds that are missing, up to the last one that there was."""
    numbers = [0, *(entry.round for entry in rounds)]
    if last > numbers[-1]:
        numbers.append(last + 1)
    for before, after in pairwise(numbers):
        if after == before + 2:
            yield f"lacks round {before + 1}"
        elif after > before + 2:
            yield f"lacks rounds {before + 1} to {after - 1}"


def _parse(data: bytes) -> dict[str, Any]:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}"[:200]
    return (str(getattr(error, "strerror", None) or error) or type(error).__name__)[:200]
