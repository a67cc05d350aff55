"""The run record's schema: its files, and what each holds; for writer and readers.

A reader takes what is there: records of other versions hold fewer and more figures.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

CONFIG, SUMMARY, ROUNDS, WEIGHTS = "config.json", "summary.json", "rounds.jsonl", "weights.jsonl"
MODEL = "model.safetensors"
# More than any figure of a run, with finite sums and squares; and three centuries.
LARGEST_FIGURE, _MOST_SECONDS = 1e100, 1e10


def _number(value: float | None) -> float:
    """Return a number as the record means it, with null for one that is not finite."""
    # Compared first: a whole number may be too large for a float.
    known = value is not None and -LARGEST_FIGURE <= value <= LARGEST_FIGURE
    return float(value) if known and value is not None else math.nan


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
    loss, train_loss : dict of str to float, and float
        Of the evaluated model, by width and "average"; mean of the clients' training.
    uplink_bytes, downlink_bytes : dict of str to int
        By width, summed over its clients.
    seconds : dict of str to float
        Of the "round" and its parts "train", "aggregate", "evaluate".
    left_out, left_out_of_evaluation : dict of str to str
        By partition, why a client was rejected or failed.
    evaluated_by_clients : dict of str to float
        What clients found, if they evaluated, as ``accuracy-8``, ``spread-8`` and ``worst-8``; of a
        task with several metrics also ``f1/mean-8``, and so ``spread``, ``least`` and ``most``.
    metrics : dict of str to dict
        By width and name, where a task has several.
    secure : dict of str to dict
        With secure aggregation, of each width: how many "devices" are in its sum, of which width
        where several were merged ("devices-4"), and the bits of its sums of codes and of
        fixed-point numbers ("code-bits", "float-bits").
    complaints : dict of str to list of int
        With secure aggregation, the partitions whose shares others say they cannot open, and these.
    privacy : dict of str to float
        With differential privacy: "epsilon" after this round at "delta", and the round's
        "noise_multiplier".
    own : dict
        What the strategy reports; it stands under the strategy's name.
    """

    round: Annotated[int, Field(ge=1, lt=2**31)]
    accuracy: dict[WidthOrAverage, Number] = Field(default_factory=dict)
    loss: dict[WidthOrAverage, Number] = Field(default_factory=dict)
    train_loss: Number = math.nan
    uplink_bytes: dict[Width, Count] = Field(default_factory=dict)
    downlink_bytes: dict[Width, Count] = Field(default_factory=dict)
    seconds: dict[str, Seconds] = Field(default_factory=dict)
    clients: dict[str, Count] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    left_out_of_evaluation: dict[str, str] = Field(default_factory=dict)
    dropped: str = ""
    unchanged: str = ""
    asked: list[Count] = Field(default_factory=list)
    evaluated_by_clients: dict[str, Number] = Field(default_factory=dict)
    metrics: dict[Width, dict[str, Number]] = Field(default_factory=dict)
    secure: dict[Width, dict[str, Count]] = Field(default_factory=dict)
    complaints: dict[str, list[Count]] = Field(default_factory=dict)
    privacy: dict[str, Number] = Field(default_factory=dict)
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
    reach: Annotated[float, Field(gt=0, le=LARGEST_FIGURE, allow_inf_nan=False)]
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
    """config.json: every setting, what "auto" stood for, when the run began and on what.

    And the same before each resume.
    """

    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    chosen: dict[str, str] = Field(default_factory=dict)
    date: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | int | None] = Field(default_factory=dict)
    resumed_after: Count = 0
    earlier: list[dict[str, object]] = Field(default_factory=list)


class Summary(_Part):
    """summary.json: how the run stands, its last and best figures, and all bytes by direction."""

    status: str = ""
    reason: str = ""
    rounds: Count = 0
    accuracy: dict[str, dict[WidthOrAverage, Number]] = Field(default_factory=dict)
    loss: dict[str, dict[WidthOrAverage, Number]] = Field(default_factory=dict)
    uplink_bytes: Count = 0
    downlink_bytes: Count = 0
    privacy: dict[str, Number] = Field(default_factory=dict)
    seconds: Number = math.nan
