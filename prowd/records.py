"""Run records as others read them: all that is whole, and what is not by name."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from core.errors import SettingsError
from core.files import is_locked, read_regular

# Why a run is not finished whose record says "running" while no process holds its lock.
KILLED = "ended without a word (killed?)"
FILES = ("config.json", "summary.json", "rounds.jsonl")
# More than any figure of a run, with finite sums and squares; and three centuries.
_MOST, _MOST_SECONDS = 1e100, 1e10


def _number(value: float | None) -> float:
    """Return a number as the record means it, with null for one that is not finite."""
    # Compared first: a whole number may be too large for a float.
    return math.nan if value is None or not -_MOST <= value <= _MOST else float(value)


Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    AfterValidator(_number),
]
# A time that is not known adds nothing.
Seconds = Annotated[Number, AfterValidator(lambda s: s if 0 <= s <= _MOST_SECONDS else 0.0)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Width = Annotated[str, Field(pattern=r"^[1-9][0-9]?$")]
WidthOrAverage = Annotated[str, Field(pattern=r"^([1-9][0-9]?|average)$")]
Counts = Annotated[list[Count], Field(min_length=1)]
Read = TypeVar("Read", bound=BaseModel)
OfRound = TypeVar("OfRound", "Round", "Weights")


class _Part(BaseModel):
    # Records of older and newer versions hold fewer and more figures.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Round(_Part):
    """One line of rounds.jsonl; what it lacks is empty.

    Attributes
    ----------
    round : int
        From 1.
    accuracy : dict of str to float
        In 0..1, by width and "average"; empty where the model was not evaluated.
    uplink_bytes, downlink_bytes : dict of str to int
        By width, summed over its clients.
    seconds : dict of str to float
        Of the "round" and its parts "train", "aggregate", "evaluate".
    left_out, left_out_of_evaluation : dict of str to str
        By partition, why a client was rejected or failed.
    own : dict
        What the strategy reports.
    """

    round: Annotated[int, Field(ge=1, lt=2**31)]
    accuracy: dict[WidthOrAverage, Number] = Field(default_factory=dict)
    uplink_bytes: dict[Width, Count] = Field(default_factory=dict)
    downlink_bytes: dict[Width, Count] = Field(default_factory=dict)
    seconds: dict[str, Seconds] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    left_out_of_evaluation: dict[str, str] = Field(default_factory=dict)
    own: dict[str, object] = Field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """Return a number that the strategy reports, None if it does not."""
        value = self.own.get(name)
        return _number(value) if isinstance(value, (int, float)) else None

    def figures(self, name: str) -> dict[str, float]:
        """Return numbers that the strategy reports by layer, empty if it does not."""
        values = self.own.get(name)
        if not isinstance(values, Mapping):
            return {}
        return {layer: _number(v) for layer, v in values.items() if isinstance(v, (int, float))}


class WeightCounts(_Part):
    """Weights in each bin, by layer; of low-bit groups by width first."""

    high: dict[str, Counts]
    before: dict[Width, dict[str, Counts]]
    after: dict[Width, dict[str, Counts]]


class Weights(_Part):
    """One line of weights.jsonl (`strategies.prowd.distributions`)."""

    round: Annotated[int, Field(ge=1, lt=2**31)]
    reach: Annotated[float, Field(gt=0, le=_MOST, allow_inf_nan=False)]
    high: Annotated[int, Field(ge=1, lt=100)]
    counts: WeightCounts

    @model_validator(mode="after")
    def _all_of_one_shape(self) -> Self:
        high, before, after = self.counts.high, self.counts.before, self.counts.after
        if not high or not before or before.keys() != after.keys():
            raise ValueError("groups are missing")
        groups = [high, *before.values(), *after.values()]
        if any(group.keys() != high.keys() for group in groups):
            raise ValueError("layers are missing")
        if len({len(counts) for group in groups for counts in group.values()}) != 1:
            raise ValueError("numbers of bins differ")
        return self


class Config(_Part):
    """config.json."""

    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    date: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Summary(_Part):
    """summary.json."""

    status: str = ""
    reason: str = ""
    rounds: Count = 0
    seconds: Number = math.nan


@dataclass(frozen=True)
class Record:
    """A run as its record tells it.

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
    """Read what a run was set to; it is empty if that cannot be told."""
    return _read_file(folder / "config.json", Config, [])


def read_summary(folder: Path) -> Summary:
    """Read how a run ended; its status is empty if that cannot be told."""
    return _read_file(folder / "summary.json", Summary, [])


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
    summary = _read_file(folder / "summary.json", Summary, damage)
    # A run with wrong settings has no settings and no rounds, one that begins has none yet.
    whole = summary.status not in ("failed", "running")
    if summary.status == "running" and is_locked(folder) is False:
        summary = summary.model_copy(update={"reason": KILLED})
    config = _read_file(folder / "config.json", Config, damage, needed=whole)
    strategy = str(config.settings.get("strategy", ""))

    def read_round(entry: dict) -> Round:
        return Round.model_validate({**entry, "own": entry.get(strategy) or {}})

    rounds = _read_lines(folder / "rounds.jsonl", read_round, damage)
    damage += [f"rounds.jsonl {gap}" for gap in _gaps(rounds, summary.rounds if whole else 0)]
    file = folder / "weights.jsonl"
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
    path: Path, read: Callable[[dict], OfRound], damage: list[str]
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


def _parse(data: bytes) -> dict:
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
