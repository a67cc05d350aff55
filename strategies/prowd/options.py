"""ProWD's own settings, each explained where it is set."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from core.errors import SettingsError
from core.options import Allowed, Idle, IdleWith, Options
from quant import FLOAT_BITS, MAX_BITS, MIN_BITS

Share = Annotated[float, Field(ge=0, le=1)]
_LADDER = (
    f"auto, or rising widths of {MIN_BITS} to {MAX_BITS} and then {FLOAT_BITS}, as in 4,8,16,32"
)

_UNTUNED = IdleWith("finetune-every", 0)


class FineTuningOptions(Options):
    """How the dequantizer is fine-tuned."""

    ladder: Annotated[str, Allowed(_LADDER), _UNTUNED, Idle.ALL_FLOAT32] = Field(
        "auto", description="Rungs of the dequantizer; auto: from the widths."
    )
    finetune_steps: Annotated[int, Field(ge=1), _UNTUNED] = Field(
        20, description="Steps of a fine-tuning."
    )
    finetune_learning_rate: Annotated[float, Field(gt=0), _UNTUNED] = Field(
        0.003, description="Step size of a fine-tuning."
    )
    distill_weight: Annotated[float, Field(ge=0), _UNTUNED, Idle.NO_BUFFER] = Field(
        0.1, description="Weight lambda of the distillation loss."
    )

    @field_validator("ladder")
    @classmethod
    def _ladder_rises(cls, value: str) -> str:
        if value != "auto":
            parse_ladder(value)
        return value


class ProWDOptions(FineTuningOptions):
    """ProWD's own settings (`prowd-...`).

    Those of the paper's literal form are `strategies.prowd.paper.ProWDPaperOptions.as_prowd`.

    >>> ProWDOptions(low_bit_weight=0.5).low_bit_weight
    0.5
    """

    reference: Annotated[Literal["client-start", "global"], Idle.ALL_FLOAT32] = Field(
        "client-start",
        description="What a low-bit client's movement is measured from: the quantized model that "
        "it started from, or the float32 global model.",
    )
    dequantize: Annotated[Literal["group", "client"], _UNTUNED, Idle.ALL_FLOAT32] = Field(
        "group", description="Dequantize the mean of a group, or each client's weights."
    )
    finetune_every: Annotated[int, Field(ge=0), Idle.ONE_WIDTH] = Field(
        0,
        description="Rounds between fine-tunings of the dequantizer's blocks; 0: never trained, "
        "and exact in what the server knows.",
    )
    align: Annotated[Literal["auto", "on", "off"], Idle.ONE_WIDTH] = Field(
        "auto",
        description="Take out of each low-bit group's movement what distinguishes it, level by "
        "level, from the mean movement of the groups above it; auto: in strict training.",
    )
    own_normalization: Annotated[bool, Idle.ONE_WIDTH] = Field(
        True,
        description="Each width keeps its own normalization and biases, all that is not quantized.",
    )
    mask: Annotated[Literal["relevant", "random"], IdleWith("mask-at-least", 1), Idle.ONE_WIDTH] = (
        Field(
            "relevant",
            description="Which coordinates are kept: the most relevant, or as many at random (a "
            "control for experiments).",
        )
    )
    mask_at_most: Annotated[Share, Idle.ONE_WIDTH] = Field(
        1.0, description="tau: largest share of coordinates kept."
    )
    mask_at_least: Annotated[Share, Idle.ONE_WIDTH] = Field(
        1.0, description="Smallest share of coordinates kept."
    )
    low_bit_weight: Annotated[float, Field(gt=0, le=1), Idle.ONE_WIDTH] = Field(
        1.0, description="Weight of a low-bit example against a high-bit one."
    )
    server_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Step size with which the server applies the aggregated movement."
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the last round's movement of the weights that is added."
    )
    normalization: Literal["count", "clients"] = Field(
        "count",
        description="Divide each coordinate by the clients that contribute to it, or by all.",
    )
    aggregate: Literal["differences", "weights"] = Field(
        "differences", description="Mask and average movements, or weights."
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ProWDOptions":
        if self.mask_at_least > self.mask_at_most:
            raise SettingsError(
                f"prowd-mask-at-least: {self.mask_at_least:g} is above prowd-mask-at-most "
                f"{self.mask_at_most:g}"
            )
        return self


def parse_ladder(text: str) -> tuple[int, ...]:
    """Read ``"4,8,16,32"``.

    Raises
    ------
    ValueError
        If the widths do not rise, do not end at 32, or do not exist.
    """
    try:
        ladder = tuple(int(part) for part in text.split(","))
    except ValueError:
        ladder = ()
    valid = all(MIN_BITS <= bits <= MAX_BITS for bits in ladder[:-1]) and ladder[-1:] == (
        FLOAT_BITS,
    )
    if not valid or list(ladder) != sorted(set(ladder)):
        raise ValueError(f"a ladder is {_LADDER}")
    return ladder
