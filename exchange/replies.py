"""Replies one by one: checked at the door, a bad one set aside."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from math import isfinite

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.logger import log

from exchange.protocol import MOST_LOSS, REPORT, UPDATE, Declaration, ProtocolError, Report, plain
from quant import STYPE, Update


class BadReply(ValueError):
    """A reply that cannot be used; the message says why, in one short line."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


@dataclass(frozen=True)
class Packed:
    """A client's reply as it came: the payload not yet unpacked."""

    client: Declaration
    payload: bytes
    report: Report


@dataclass(frozen=True)
class ClientUpdate:
    """A client's reply, unpacked and checked.

    Attributes
    ----------
    client : Declaration
        Who sent it, at which width.
    update : Update
        The weights or the difference; empty if the client was asked for nothing.
    report : Report
        The client's numbers.
    """

    client: Declaration
    update: Update
    report: Report


def open_report(reply: Message, server_round: int) -> Report:
    """Read and check the report in a reply.

    Raises
    ------
    BadReply
        If there is none, it is of another round, or its numbers cannot be true.
    """
    # By key: Flower's views of one kind of record tie the reply into a cycle, and it is kept until
    # the next garbage collection.
    record = reply.content.get(REPORT)
    if not isinstance(record, MetricRecord):
        raise BadReply("the reply holds no report")
    try:
        report = Report.from_record(record)
    except ProtocolError as error:
        raise BadReply(str(error)) from None
    if report.server_round != server_round:
        raise BadReply(f"it reports on round {report.server_round}; this is round {server_round}")
    if report.num_examples < 1:
        raise BadReply(f"it reports {report.num_examples} examples")
    if not 0 <= report.accuracy <= 1:
        raise BadReply(f"it reports an accuracy of {report.accuracy}")
    if report.steps < 0 or not 0 <= report.began_clean <= 1:
        raise BadReply(f"it reports {report.steps} steps, began_clean {report.began_clean}")
    if not isfinite(report.seconds):
        raise BadReply(f"it reports {report.seconds} s")
    if not 0 <= report.loss <= MOST_LOSS:
        raise BadReply(f"it reports a loss of {report.loss}; allowed: 0 to {MOST_LOSS:g}")
    return report


def payload_of(reply: Message) -> bytes | None:
    """Return the payload of a training reply as it was sent, None if there is not exactly one."""
    arrays = reply.content.get(UPDATE)
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [UPDATE]:
        return None
    if arrays[UPDATE].stype != STYPE:
        return None
    return arrays[UPDATE].data


def open_training_reply(
    reply: Message,
    client: Declaration,
    server_round: int,
    size: int,
    most_steps: int | None = None,
) -> Packed:
    """Take the report and, if one was asked for, the packed update out of a training reply.

    Parameters
    ----------
    reply : Message
        A client's reply with content.
    client : Declaration
        Who sent it.
    server_round : int
        Round that it has to be of.
    size : int
        Bytes that its update takes at most; 0 if none was asked for.
    most_steps : int or None
        Optimizer steps that it can have taken; None if that is not known.

    Raises
    ------
    BadReply
        If the reply does not hold exactly one update of no more than this size, or its report
        cannot be true.
    """
    report = open_report(reply, server_round)
    if report.num_examples > client.num_examples:
        raise BadReply(
            f"it reports {report.num_examples} examples and declared {client.num_examples}"
        )
    if most_steps is not None and report.steps > most_steps:
        raise BadReply(f"it reports {report.steps} steps; its examples allow {most_steps}")
    if not size:
        return Packed(client, b"", report)
    payload = payload_of(reply)
    if payload is None:
        raise BadReply(f"the reply does not hold one array of type {STYPE}")
    if len(payload) > size:
        # Here, so that what is too long is not kept until its turn comes.
        raise BadReply(f"its payload has {len(payload)} bytes; this model takes {size}")
    return Packed(client, payload, report)


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
    dropped : str
        Why the result of the round was dropped; empty if it was not.
    unchanged : str
        Why the model is the one before, though updates were used; empty if it is not.
    own : dict
        What the strategy itself reports: numbers, texts, lists, and mappings under text keys.
    detailed : bool
        Whether this round is to be recorded in full.
    weights : dict
        Then, from a strategy that has them, `WeightDistributions.to_record`.
    """

    sampled: list[int] = field(default_factory=list)
    aggregated: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    uplink_bytes: Counter[int] = field(default_factory=Counter)
    downlink_bytes: Counter[int] = field(default_factory=Counter)
    dropped: str = ""
    unchanged: str = ""
    own: dict[str, object] = field(default_factory=dict)
    detailed: bool = False
    weights: dict[str, object] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[int, str]:
        """Partitions that were asked in vain, with the reason."""
        return self.rejected | self.failed

    def warn(self, server_round: int, clients: Mapping[int, Declaration]) -> None:
        """Log which of the clients that were asked, by node ID, are left out, and why."""
        for node_id, client in clients.items():
            if reason := self.left_out.get(client.partition_id):
                log(
                    WARNING,
                    "Round %d goes on without node %d (partition %d): %s",
                    server_round,
                    node_id,
                    client.partition_id,
                    reason,
                )


def match_replies(
    messages: list[Message],
    clients: dict[int, Declaration],
    replies: Iterable[Message],
    round_log: RoundLog,
) -> Iterator[tuple[Declaration, Message]]:
    """Yield the replies that carry content, with the client that each comes from.

    A reply is matched by the message that it answers: an error for a node that vanished comes from
    the SuperLink itself. Errors and missing replies are noted in the log, replies to anything
    else ignored.
    """
    waiting: dict[str, Declaration] = {}
    known = 0
    for reply in replies:
        if known < len(messages):
            # Not before: a message has no ID until it has been pushed, or is yet to be made.
            waiting |= _by_message_id(messages[known:], clients)
            known = len(messages)
        client = waiting.pop(reply.metadata.reply_to_message_id, None)
        if client is None:
            continue
        if reply.has_error():
            round_log.failed[client.partition_id] = last_line(reply.error.reason)
        else:
            yield client, reply
    waiting |= _by_message_id(messages[known:], clients)
    for client in waiting.values():
        round_log.failed[client.partition_id] = "no reply in time"


def last_line(reason: str | None) -> str:
    """Return the last line of an error's reason: of a traceback, what was raised."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return plain(lines[-1]) if lines else "no reason given"


def _by_message_id(
    messages: Iterable[Message], clients: dict[int, Declaration]
) -> dict[str, Declaration]:
    return {m.metadata.message_id: clients[m.metadata.dst_node_id] for m in messages}
