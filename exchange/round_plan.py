"""One round: what is asked of each client, and what happened to it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from flwr.app import ConfigRecord, Message

from core.errors import SettingsError
from core.seeds import Stream, derive_seed
from core.settings import LowBitTraining, Upload
from exchange.protocol import (
    BY_BROADCAST,
    CONFIG,
    Declaration,
    Instruction,
    ProtocolError,
    Uplink,
)
from exchange.states import State
from quant import (
    FLOAT_BITS,
    MAX_BITS,
    MIN_BITS,
    Expected,
    Update,
    UpdateSpec,
    is_width,
    upload_bits,
)

if TYPE_CHECKING:
    from exchange.secure_round import SecureRound

_ALLOWED = f"0, {MIN_BITS} to {MAX_BITS}, and {FLOAT_BITS}"


@dataclass(frozen=True)
class WidthPlan:
    """What is fixed of a width before anybody is drawn.

    Attributes
    ----------
    client : Declaration
        One of its clients.
    instruction : Instruction
        What it would be asked.
    clients : int
        How many there are.
    drawn : float
        How many of them take part in a round on average. A sum with noise is divided by it: by the
        number that did take part, or whose update was good, the model would tell who they are.
    """

    client: Declaration
    instruction: Instruction
    clients: int
    drawn: float


@dataclass
class RoundPlan:
    """The messages of one round, and what they ask of each client.

    Attributes
    ----------
    start : dict of str to Tensor
        The float32 model that the round begins with.
    spec : UpdateSpec
        Its tensors.
    clients : dict of int to Declaration
        By node ID.
    instructions, expected : dict of int to Instruction, and to Expected
        By partition: what the client is asked, and the update that it then sends.
    messages : list of Message
        One a client, of those that were made so far.
    received : dict of int to dict of str to Tensor
        With noise of the server: the model as the clients of a width are sent it.
    widths : dict of int to WidthPlan
        With differential privacy: what is fixed of each width, whoever is drawn of it.
    secure : SecureRound, optional
        With secure aggregation: the groups whose sums alone are seen.
    """

    start: State = field(default_factory=dict)
    spec: UpdateSpec = field(default_factory=lambda: UpdateSpec({}))
    clients: dict[int, Declaration] = field(default_factory=dict)
    instructions: dict[int, Instruction] = field(default_factory=dict)
    expected: dict[int, Expected] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    received: dict[int, State] = field(default_factory=dict)
    widths: dict[int, "WidthPlan"] = field(default_factory=dict)
    secure: "SecureRound | None" = None

    @property
    def largest_payload(self) -> int:
        """Bytes of the largest update that a client is asked for."""
        if self.secure is not None:
            return self.secure.largest_payload
        return max((expected.most_bytes for expected in self.expected.values()), default=0)

    def ask(self, client: Declaration, instruction: Instruction) -> None:
        """Plan what a client is asked."""
        bits = instruction.uplink_bits or client.bits
        self.instructions[client.partition_id] = instruction
        self.expected[client.partition_id] = (
            Expected(self.spec, 0)
            if instruction.uplink == "nothing"
            else Expected(
                self.spec,
                bits,
                instruction.uplink,
                stamp=instruction.server_round,
                dither=instruction.dither,
            )
        )

    def sent(self, client: Declaration, model: Update) -> None:
        """Note the model that a client was sent, which its update may refer to."""
        expected = self.expected[client.partition_id]
        self.expected[client.partition_id] = replace(expected, start=model)


@dataclass
class RoundLog:
    """What happened to the clients of one round.

    Attributes
    ----------
    sampled, aggregated : list of int
        Partitions that were asked, and those whose update was used.
    rejected, failed : dict of int to str
        Partitions that sent something unusable, and those that sent an error or nothing, with the
        reason.
    uplink_bytes, downlink_bytes : Counter of int
        Payload bytes by width, summed over clients.
    received : float
        When the last reply had come, on `time.monotonic`.
    dropped : str
        Why the result of the round was dropped; empty if it was not.
    unchanged : str
        Why the model is the one before, though updates were used; empty if it is not.
    own : dict
        What the strategy itself reports: numbers, texts, lists, and mappings under text keys.
    secure : dict
        With secure aggregation, of each group: its devices, and the bits of its sums.
    complaints : dict of str to list of int
        The partitions whose shares others say they cannot open, and these.
    noise_multiplier : float or None
        With differential privacy: the smallest of all groups' whose sum was seen, to account the
        round with; None: no sum was.
    detailed : bool
        Whether this round is to be recorded in full.
    weights : dict
        Then, from a strategy that has them, `WeightDistributions.to_record`.

    Examples
    --------
    >>> RoundLog(sampled=[0, 1], aggregated=[0], failed={1: "no reply"}).left_out
    {1: 'no reply'}
    """

    sampled: list[int] = field(default_factory=list)
    aggregated: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    uplink_bytes: Counter[int] = field(default_factory=Counter)
    downlink_bytes: Counter[int] = field(default_factory=Counter)
    received: float = 0.0
    dropped: str = ""
    unchanged: str = ""
    own: dict[str, object] = field(default_factory=dict)
    secure: dict[str, dict[str, Any]] = field(default_factory=dict)
    complaints: dict[str, list[int]] = field(default_factory=dict)
    noise_multiplier: float | None = None
    detailed: bool = False
    weights: dict[str, object] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[int, str]:
        """Partitions that were asked and not used, with the reason."""
        return self.rejected | self.failed


def completed(instruction: Instruction, by_broadcast: int, owner: str) -> Instruction:
    """Return an instruction with the width of its downlink put in.

    Parameters
    ----------
    instruction : Instruction
        From `MixedPrecisionStrategy.instruct`.
    by_broadcast : int
        Width of the downlink where the instruction names none.
    owner : str
        Class that it is from, for the errors.

    Raises
    ------
    SettingsError
        If it asks for what there is not.
    """
    asks = f"{owner}.instruct asks for"
    if not isinstance(instruction, Instruction):
        raise SettingsError(f"strategy: {owner}.instruct returns no Instruction: {instruction!r}")
    downlink = instruction.downlink_bits
    if downlink == BY_BROADCAST:
        downlink = by_broadcast
    for key, bits in (("downlink-bits", downlink), ("uplink-bits", instruction.uplink_bits)):
        if type(bits) is not int or (bits and not is_width(bits)):
            raise SettingsError(f"{key}: {asks} {bits!r}; allowed: {_ALLOWED}")
    if instruction.uplink not in get_args(Uplink):
        allowed = ", ".join(get_args(Uplink))
        raise SettingsError(f"uplink: {asks} {instruction.uplink!r}; allowed: {allowed}")
    try:
        Instruction.from_record(instruction.to_record())
    except ProtocolError as error:
        raise SettingsError(f"strategy: {asks} what cannot be sent: {error}") from None
    if instruction.tracking_epoch and downlink != FLOAT_BITS:
        raise SettingsError(
            f"downlink-bits: {asks} {downlink} beside tracking, whose corrections need the exact "
            f"model; allowed: {FLOAT_BITS}"
        )
    return replace(instruction, downlink_bits=downlink)


def with_upload(
    instruction: Instruction,
    client: Declaration,
    training: LowBitTraining,
    upload: Upload,
    seed: int,
) -> Instruction:
    """Say in which form a client is to send its weights.

    Parameters
    ----------
    instruction : Instruction
        That is `completed`.
    client : Declaration
        Whom it is for.
    training : {"qat", "strict", "integer"}
        How low-bit clients train.
    upload : {"forward", "dithered", "stored"}
        What they send (`quant.upload`).
    seed : int
        The run's, for the dither.
    """
    if client.bits == FLOAT_BITS or training == "strict" or instruction.uplink == "nothing":
        # What it holds is what it computes with.
        return replace(instruction, upload="stored")
    bits, dither = instruction.uplink_bits, 0
    if instruction.uplink == "weights" and not bits:
        bits = upload_bits(client.bits, training, upload)
    if upload == "dithered":
        path = (instruction.server_round, client.partition_id)
        dither = derive_seed(seed, Stream.DITHER, *path) or 1
    return replace(instruction, upload=upload, uplink_bits=bits, dither=dither)


def summed_bits(instruction: Instruction, client: Declaration, training: LowBitTraining) -> int:
    """Return the width of the codes that a client adds to a secure sum; 32: it adds none.

    Codes of one grid can be summed. Each client fits a grid of its own to a difference, but for the
    strict ones: theirs is the difference of two codes of one grid.

    Parameters
    ----------
    instruction : Instruction
        That is complete (`with_upload`).
    client : Declaration
        Whom it is for.
    training : {"qat", "strict", "integer"}
        How low-bit clients train.
    """
    own_grid = instruction.uplink_bits or training != "strict"
    if instruction.uplink == "difference" and own_grid:
        return FLOAT_BITS
    return instruction.uplink_bits or client.bits


def with_config(messages: Iterable[Message], config: Mapping[str, Any] | None) -> list[Message]:
    """Add to messages what Flower's `start` was given for the clients, if anything was."""
    messages = list(messages)
    if config:
        for message in messages:
            # A record each: a client in this process may change its own.
            message.content[CONFIG] = ConfigRecord(dict(config))
    return messages
