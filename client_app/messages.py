"""A client's side of the messages: what it is asked and sent, and what it answers.

All that a ClientApp needs to take part under any strategy of this project; it may train as it
likes. `client_app.app` is one.
"""

from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from exchange.protocol import (
    CONFIG,
    DECLARATION,
    INSTRUCTION,
    MODEL,
    REPORT,
    UPDATE,
    Declaration,
    Instruction,
    Report,
)
from quant import STYPE, Update, UpdateSpec, decode_update, encode_update


def answer_query(message: Message, declaration: Declaration) -> Message:
    """Answer the server's query what this node is."""
    record = ConfigRecord(declaration.to_record())
    return Message(RecordDict({DECLARATION: record}), reply_to=message)


def instruction_in(message: Message) -> Instruction:
    """Return what a message to train or to evaluate asks.

    Raises
    ------
    ProtocolError
        If it is none of this project's strategies'.
    """
    return Instruction.from_record(cast(ConfigRecord, message.content[INSTRUCTION]))


def config_in(message: Message) -> dict[str, Any]:
    """Return what Flower's `start` was given for the clients; empty if that was nothing."""
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
    """
    bits = instruction_in(message).downlink_bits
    if not bits:
        return None
    # By key: Flower's views of one kind of record tie the message into a cycle.
    arrays = cast(ArrayRecord, message.content[MODEL])
    return decode_update(arrays[MODEL].data, spec, bits)


def answer(
    message: Message, report: Report, update: Update | None = None, sent: Update | None = None
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
        The model that it was sent (`model_in`): where this came as codes of the update's width,
        the update's codes travel as differences from them.
    """
    content = RecordDict({REPORT: MetricRecord(report.to_record())})
    if update is not None:
        asked = instruction_in(message)
        payload = encode_update(
            update,
            coded=bool(asked.coded),
            start=sent if asked.starts_from_codes(update.bits) else None,
            stamp=asked.server_round,
        )
        array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
        content[UPDATE] = ArrayRecord({UPDATE: array})
    return Message(content, reply_to=message)
