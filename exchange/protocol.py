"""The messages between a strategy and a client: declaration, instruction, model, report and update.

All but the model and the update are frozen dataclasses of plain values. `to_record` turns them into
what a Flower record holds, `from_record` back, refusing what is missing, of the wrong type, or
unknown. The functions below them are all that a ClientApp needs to take part under any strategy of
this project; it may train as it likes. `client_app.app` is one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, cast, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from core.run_record import LARGEST_FIGURE
from core.settings import Upload
from quant import STYPE, Update, UpdateSpec, decode, encode

# Keys of the records in a message.
MODEL = "model"
UPDATE = "update"
INSTRUCTION = "instruction"
DECLARATION = "declaration"
REPORT = "report"
# All metrics of an evaluation.
METRICS = "metrics"
# What the server says of the task.
FACTS = "task"
# What Flower's `start` is given for the clients, under the name that Flower's strategies use.
CONFIG = "config"

# An instruction's `downlink_bits` that leaves it to the strategy's `broadcast`; never sent.
BY_BROADCAST = -1

# Of one evaluation, and the characters of a name.
MOST_METRICS, MOST_IN_A_NAME = 64, 100

Uplink = Literal["weights", "difference", "nothing"]


def plain(text: str) -> str:
    """Return untrusted text as one short line that can be logged."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])


def last_line(reason: str | None) -> str:
    """Return the last line of an error's reason: of a traceback, what was raised."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return plain(lines[-1]) if lines else "no reason given"


def in_range(value: float, allowed: tuple[float, float]) -> float:
    """Return a figure as it is reported: the nearest that the range has; NaN stays.

    >>> in_range(float("inf"), (0.0, 1e4))
    10000.0
    """
    least, most = finite_range(allowed)
    return min(max(value, least), most)


def finite_range(allowed: tuple[float, float]) -> tuple[float, float]:
    """Return a range that has two ends, so that sums and squares stay finite.

    >>> finite_range((0.0, float("inf")))
    (0.0, 1e+100)
    """
    least, most = allowed
    return max(least, -LARGEST_FIGURE), min(most, LARGEST_FIGURE)


class ProtocolError(ValueError):
    """A record that does not follow the protocol."""


@dataclass(frozen=True)
class _Record:
    """Frozen dataclass of ints, floats and strings that travels as a flat mapping."""

    def to_record(self) -> dict[str, Any]:
        """Return the values by field name."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """Read the values back.

        Raises
        ------
        ProtocolError
            If a field is missing, unknown, or of another type than declared.
        """
        declared: dict[str, Any] = {f.name: f.type for f in fields(cls)}
        texts = (Uplink, Upload)
        expected = {name: str if kind in texts else kind for name, kind in declared.items()}
        if set(record) != set(expected):
            odd = ", ".join(sorted(set(record) ^ set(expected)))
            raise ProtocolError(f"{cls.__name__}: missing or unknown: {odd}")
        for name, kind in expected.items():
            if type(record[name]) is not kind and not (kind is float and type(record[name]) is int):
                raise ProtocolError(
                    f"{cls.__name__}: {name} is {record[name]!r}; it must be {kind.__name__}"
                )
        for name, kind in declared.items():
            if kind in texts and record[name] not in get_args(kind):
                raise ProtocolError(f"{cls.__name__}: {name} is {record[name]!r}")
        return cls(**record)


@dataclass(frozen=True)
class Declaration(_Record):
    """A node's answer to the server's query, given once.

    Attributes
    ----------
    partition_id, num_partitions : int
        Which part of the data the node holds, of how many; -1 of 0 where it has data of its own:
        the server then gives it a number.
    bits : int
        Width that it computes and stores with; 0 if it is refused.
    num_examples : int
        Training images that it holds.
    refused : str
        Why the node cannot take part; empty if it can.

    Examples
    --------
    >>> Declaration(0, 10, bits=4, num_examples=500, refused="").to_record()["bits"]
    4
    """

    partition_id: int
    num_partitions: int
    bits: int
    num_examples: int
    refused: str


@dataclass(frozen=True)
class Instruction(_Record):
    """What a strategy asks of a client in one message.

    Attributes
    ----------
    server_round : int
        Round, from 1.
    uplink : str
        What the client sends: "weights", a "difference" to the model that it received, or "nothing"
        but its report.
    uplink_bits : int
        Width of what it sends; 0 is the client's own.
    downlink_bits : int
        Width of the payload that carries the model, whatever the client's own is: 2 to 16, or 32
        for float32; 0 if no model is sent and the client continues from its own. By default the one
        that `broadcast` leads to, which the strategy puts in before it sends the instruction.
    proximal_mu : float
        Factor of the proximal term against the received model; 0 leaves it out.
    tracking_epoch : int
        FedCOMGATE: corrections of this epoch are kept from round to round, those of another are
        dropped; 0: gradients are not tracked.
    tracking_steps : int
        Most local steps that a client took in the round before.
    server_learning_rate : float
        Step size with which the server applied the average difference of that round.
    coded : int
        1 if the update's codes may be entropy-coded, as differences from those of the model that
        was sent, else 0.
    keep_in : str
        Folder for what a simulated client keeps from round to round; its last part names the run.
        A networked node, which keeps it in its own ``state-dir``, gets that last part alone.
        Empty: in memory only.
    upload : str
        Which of its weights it sends, or takes the difference of: "forward", "dithered" or "stored"
        (`quant.upload`).
    dither : int
        Seed of the dither, from 1; 0 where nothing is rounded with one.
    number : int
        Of the client among all: its partition, or what the server gave it instead.

    Examples
    --------
    >>> Instruction(server_round=1, uplink="difference", uplink_bits=4).to_record()["uplink"]
    'difference'
    """

    server_round: int
    uplink: Uplink = "weights"
    uplink_bits: int = 0
    downlink_bits: int = BY_BROADCAST
    proximal_mu: float = 0.0
    tracking_epoch: int = 0
    tracking_steps: int = 0
    server_learning_rate: float = 1.0
    coded: int = 0
    keep_in: str = ""
    upload: Upload = "forward"
    dither: int = 0
    number: int = 0


@dataclass(frozen=True)
class Report(_Record):
    """Numbers that come back with an update or an evaluation.

    Attributes
    ----------
    server_round : int
        Round of the instruction that it answers.
    num_examples : int
        Images trained or evaluated on.
    loss : float
        Mean loss over them, within the task's ``loss_range``, whose ends also stand for more.
    accuracy : float
        The first of the task's metrics: by default the share of right answers, 0 to 1.
    seconds : float
        Time that the client took for it.
    steps : int
        Optimizer steps taken; 0 for an evaluation.
    began_clean : int
        1 if the client had nothing kept to correct its gradients by, else 0.

    Examples
    --------
    >>> Report.from_record(Report(1, 500, loss=0.5, accuracy=0.8, seconds=2.0).to_record()).loss
    0.5
    """

    server_round: int
    num_examples: int
    loss: float
    accuracy: float
    seconds: float
    steps: int = 0
    began_clean: int = 0


def to_array(payload: bytes) -> Array:
    """Wrap a payload as the one array of a record."""
    return Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)


def answer_query(message: Message, declaration: Declaration) -> Message:
    """Answer the server's query what this node is.

    >>> reply = answer_query(message, Declaration(0, 10, bits=4, num_examples=500, refused=""))
    >>> reply.content["declaration"]["bits"]
    4
    """
    record = ConfigRecord(declaration.to_record())
    return Message(RecordDict({DECLARATION: record}), reply_to=message)


def instruction_in(message: Message) -> Instruction:
    """Return what a message to train or to evaluate asks.

    Raises
    ------
    ProtocolError
        If it is not from a strategy of this project.

    Examples
    --------
    >>> instruction_in(message).server_round
    1
    """
    return Instruction.from_record(cast(ConfigRecord, message.content[INSTRUCTION]))


def facts_in(message: Message) -> dict[str, Any] | None:
    """Return what the server says of the task; None if it says nothing.

    >>> facts_in(message)
    {'classes': ['cat', 'dog']}
    """
    return dict(cast(ConfigRecord, message.content[FACTS])) if FACTS in message.content else None


def config_in(message: Message) -> dict[str, Any]:
    """Return what Flower's `start` was given for the clients; empty if that was nothing.

    >>> config_in(message)
    {'epochs': 3}
    """
    return dict(cast(ConfigRecord, message.content[CONFIG])) if CONFIG in message.content else {}


def model_in(message: Message, spec: UpdateSpec) -> Update | None:
    """Return the model that a message carries, as it was sent; None if it carries none.

    Parameters
    ----------
    message : Message
        To train or to evaluate.
    spec : UpdateSpec
        Tensors of the model, ``quant.spec_of(network)``.

    Raises
    ------
    UpdateError
        If it is not a whole, unaltered model of these tensors.

    Examples
    --------
    >>> model_in(message, UpdateSpec({"bias": (2,)})).dequantize()
    {'bias': tensor([1., 1.])}
    """
    bits = instruction_in(message).downlink_bits
    if not bits:
        return None
    # By key: Flower's views of one kind of record tie the message into a cycle.
    arrays = cast(ArrayRecord, message.content[MODEL])
    return decode(arrays[MODEL].data, spec, bits)


def answer(
    message: Message,
    report: Report,
    update: Update | None = None,
    sent: Update | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Message:
    """Answer a message to train or to evaluate.

    Parameters
    ----------
    message : Message
        The message.
    report : Report
        The client's numbers.
    update : Update, optional
        What it was asked to send: its weights, or the difference to what it was sent.
    sent : Update, optional
        The model that it was sent (`model_in`): the codes of weights travel as differences from
        those of this model.
    metrics : mapping of str to float, optional
        Of an evaluation: all metrics by name, the first of which is the report's `accuracy`; NaN
        where nothing was counted.

    Examples
    --------
    >>> report = Report(1, num_examples=500, loss=0.5, accuracy=0.8, seconds=2.0)
    >>> reply = answer(message, report, quantize_state({"bias": torch.ones(2)}, 32))
    >>> sorted(reply.content)
    ['report', 'update']
    """
    content = RecordDict({REPORT: MetricRecord(report.to_record())})
    if metrics:
        # Lists, which keep their order.
        names, values = list(metrics), [float(value) for value in metrics.values()]
        content[METRICS] = ConfigRecord({"names": names, "values": values})
    if update is not None:
        instruction = instruction_in(message)
        payload = encode(
            update,
            coded=bool(instruction.coded),
            start=sent,
            stamp=instruction.server_round,
            dither=instruction.dither,
        )
        content[UPDATE] = ArrayRecord({UPDATE: to_array(payload)})
    return Message(content, reply_to=message)
