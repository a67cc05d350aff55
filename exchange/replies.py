"""Replies one by one, validated on receipt: their report, their payload and its size."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from exchange.protocol import (
    REPORT,
    UPDATE,
    Declaration,
    ProtocolError,
    Report,
    finite_range,
    plain,
)
from exchange.round_plan import RoundPlan
from quant import (
    STYPE,
    Update,
    UpdateError,
    decode_all,
    is_statistic,
    squares_at_most,
)

Norms = Mapping[str, float]
Range = tuple[float, float]


class BadReply(ValueError):
    """A reply that cannot be used; the message says why, in one short line."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


@dataclass(frozen=True)
class Ranges:
    """What a client's figures can be: a task's `metric_range` and `loss_range`."""

    metric: Range = (0.0, 1.0)
    loss: Range = (0.0, 1e4)


# Of a classifier.
USUAL = Ranges()


@dataclass(frozen=True)
class Reply:
    """A client's reply as it came: the payload is yet to be decoded."""

    client: Declaration
    payload: bytes
    report: Report


@dataclass(frozen=True)
class Member:
    """A device whose update is in a sum: its number, what it counts for, and its dither."""

    number: int
    weight: int
    dither: int = 0


@dataclass(frozen=True)
class ClientUpdate:
    """A client's reply, decoded and validated; or with secure aggregation the mean of a group.

    Attributes
    ----------
    client : Declaration
        Who sent it, at which width.
    update : Update
        The weights or the difference; empty if the client was asked for nothing.
    report : Report
        The client's numbers.
    dither : int
        Seed of the dither that it was asked to round its weights with; 0: to nearest.
    members : tuple of Member
        The devices whose mean it is, which alone is known then; empty: it is one client's.
    from_received : bool
        Whether it is the model that they received, moved by the mean of how far each went from that
        model as it held it (`quant.moved_by`).
    everybody : int
        With noise, how many clients of the width there are: it counts as theirs, whoever took part.

    Examples
    --------
    >>> client = Declaration(partition_id=0, num_partitions=2, bits=4, num_examples=100, refused="")
    >>> report = Report(server_round=1, num_examples=100, loss=0.5, accuracy=0.8, seconds=2.0)
    >>> ClientUpdate(client, Update(4, "weights", {}, {}), report).client.bits
    4
    """

    client: Declaration
    update: Update
    report: Report
    dither: int = 0
    members: tuple[Member, ...] = ()
    from_received: bool = False
    everybody: int = 0

    @property
    def count(self) -> int:
        """Number of clients that it counts as."""
        return self.everybody or len(self.members) or 1


def payload_of(reply: Message) -> bytes | None:
    """Return the payload of a training reply as it was sent, None if there is not exactly one."""
    arrays = reply.content.get(UPDATE)
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [UPDATE]:
        return None
    if arrays[UPDATE].stype != STYPE:
        return None
    return arrays[UPDATE].data


def read_reply(
    reply: Message,
    client: Declaration,
    server_round: int,
    most_bytes: int,
    most_steps: int | None = None,
    ranges: Ranges = USUAL,
) -> Reply:
    """Take the report and, if one was asked for, the encoded update out of a training reply.

    Parameters
    ----------
    reply : Message
        A client's reply with content.
    client : Declaration
        Who sent it.
    server_round : int
        Round that it has to be of.
    most_bytes : int
        That its update takes; 0 if none was asked for.
    most_steps : int or None
        Optimizer steps that it can have taken; None if that is not known.
    ranges : Ranges
        As of `read_report`.

    Raises
    ------
    BadReply
        If the reply does not hold exactly one update of no more than this size, or its report
        cannot be true.
    """
    report = read_report(reply, server_round, ranges)
    if not client.num_partitions:
        # Data of its own may grow while it is connected; its weight does not.
        most_steps = None
        report = replace(report, num_examples=min(report.num_examples, client.num_examples))
    elif report.num_examples > client.num_examples:
        raise BadReply(
            f"it reports {report.num_examples} examples and declared {client.num_examples}"
        )
    if most_steps is not None and report.steps > most_steps:
        raise BadReply(f"it reports {report.steps} steps; its examples allow {most_steps}")
    if not most_bytes:
        return Reply(client, b"", report)
    payload = payload_of(reply)
    if payload is None:
        raise BadReply(f"the reply does not hold one array of type {STYPE}")
    if len(payload) > most_bytes:
        # Here, so that what is too long is not kept until its turn comes.
        raise BadReply(f"its payload has {len(payload)} bytes; this model takes {most_bytes}")
    return Reply(client, payload, report)


def read_report(reply: Message, server_round: int, ranges: Ranges = USUAL) -> Report:
    """Read and check the report in a reply.

    Parameters
    ----------
    reply : Message
        A client's reply with content.
    server_round : int
        Round that it has to be of.
    ranges : Ranges
        Of the metric and of the loss.

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
    least, most = finite_range(ranges.metric)
    if not least <= report.accuracy <= most:
        raise BadReply(
            f"it reports an accuracy of {report.accuracy}; allowed: {least:g} to {most:g}"
        )
    if report.steps < 0 or not 0 <= report.began_clean <= 1:
        raise BadReply(f"it reports {report.steps} steps, began_clean {report.began_clean}")
    if not isfinite(report.seconds):
        raise BadReply(f"it reports {report.seconds} s")
    least, most = finite_range(ranges.loss)
    if not least <= report.loss <= most:
        raise BadReply(f"it reports a loss of {report.loss}; allowed: {least:g} to {most:g}")
    return report


def training_metrics(reports: Sequence[Report]) -> MetricRecord:
    """Average what clients saw in training, weighted by examples."""
    total = sum(r.num_examples for r in reports)
    return MetricRecord(
        {
            "num-examples": total,
            "train-loss": sum(r.loss * r.num_examples for r in reports) / total,
            "train-accuracy": sum(r.accuracy * r.num_examples for r in reports) / total,
            "train-seconds": sum(r.seconds for r in reports),
        }
    )


def decode_in_order(
    plan: RoundPlan, replies: Sequence[Reply], rejected: MutableMapping[int, str]
) -> Iterator[ClientUpdate]:
    """Decode replies in the order given; malformed ones are left out.

    Parameters
    ----------
    plan : RoundPlan
        What they are validated against.
    replies : sequence of Reply
        The replies.
    rejected : mutable mapping of int to str
        Called for each reply that is left out, with partition and reason.
    """
    expected = [(r.payload, plan.expected[r.client.partition_id]) for r in replies]
    for reply, update in zip(replies, decode_all(expected), strict=True):
        if isinstance(update, UpdateError):
            rejected[reply.client.partition_id] = str(update)
        else:
            dither = plan.expected[reply.client.partition_id].dither
            yield ClientUpdate(reply.client, update, reply.report, dither)
        # Let go of it before the next one is decoded.
        del update


def within_norms(
    plan: RoundPlan, replies: list[Reply], bound: float, rejected: MutableMapping[int, str]
) -> list[Reply]:
    """Return the replies whose updates are not out of all proportion (`too_large`).

    Parameters
    ----------
    plan, replies, rejected
        As of `decode_in_order`.
    bound : float
        Of the strategy; 0 lets everything pass.
    """
    sent = scale_of(plan.start)
    if not bound or all_small((_norms_at_most(plan, reply) for reply in replies), sent, bound):
        return replies
    # Seldom: the norms themselves are needed, for which everything is decoded once more.
    norms = {
        item.client.partition_id: norms_of(item.update.dequantize())
        for item in decode_in_order(plan, replies, rejected)
    }
    large = too_large(norms, sent, bound)
    rejected.update(large)
    return [r for r in replies if r.client.partition_id in norms.keys() - large.keys()]


def _norms_at_most(plan: RoundPlan, reply: Reply) -> Norms:
    squares = squares_at_most(reply.payload, plan.expected[reply.client.partition_id])
    return _norms_from(*squares)


def norms_of(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the Euclidean norms of a model's parameters and of its BatchNorm statistics."""
    squares = {"parameters": 0.0, "statistics": 0.0}
    for name, tensor in values.items():
        squares[_kind(name)] += float(tensor.norm()) ** 2
    return _norms_from(**squares)


def _norms_from(parameters: float, statistics: float) -> dict[str, float]:
    """Return the same from their sums of squares."""
    return {"parameters": sqrt(parameters), "statistics": sqrt(statistics)}


def scale_of(model: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norms that updates are measured by: a model's, or if it is all zeros, of ones.

    A linear model may begin with zeros, beside which everything would be too large.
    """
    counts = {"parameters": 0, "statistics": 0}
    for name, tensor in model.items():
        counts[_kind(name)] += tensor.numel()
    return {kind: norm or sqrt(counts[kind]) for kind, norm in norms_of(model).items()}


def all_small(largest: Iterable[Norms], sent: Norms, bound: float) -> bool:
    """Return whether no update can be `too_large`, whatever the others are.

    Parameters
    ----------
    largest : iterable of mapping
        Norms that the updates have at most.
    sent, bound
        As of `too_large`.
    """
    most = _most(sent, bound)
    return all(norms[kind] <= most[kind] for norms in largest for kind in most)


def too_large(updates: Mapping[int, Norms], sent: Norms, bound: float) -> dict[int, str]:
    """Say which updates are out of all proportion.

    An update may be `bound` times as large as the model that was sent, or as the round's median
    update if that is larger. The model alone would not do, as all honest clients may leave a small
    one far behind; nor the median, as all but one may stand still. Of an even number the lower
    median is taken, so that of two clients the smaller one counts.

    One that comes alone is its own median, and is compared with the model only. Statistics may be
    the square of `bound` times as large as the model's, as variances grow so when weights grow by
    `bound`.

    Parameters
    ----------
    updates : mapping of int to mapping
        `norms_of` the decoded update of each partition.
    sent : mapping
        `scale_of` the model that was sent.
    bound : float
        From 1; 0 lets everything pass.

    Returns
    -------
    dict of int to str
        The reason by partition.
    """
    reasons: dict[int, str] = {}
    if not bound or not updates:
        return reasons
    alone = len(updates) == 1
    for kind, by_model in _most(sent, bound).items():
        norms = sorted(norms[kind] for norms in updates.values())
        median = 0.0 if alone else norms[(len(norms) - 1) // 2]
        most = max(by_model, median * bound)
        for partition, own in updates.items():
            if own[kind] > most:
                reasons[partition] = (
                    f"its {kind} have a norm of {own[kind]:.3g}; norm-bound {bound:g} allows "
                    f"{most:.3g}"
                )
    return reasons


def _most(sent: Norms, bound: float) -> dict[str, float]:
    """Norms that are allowed whatever the other updates are."""
    return {k: n * (bound**2 if k == "statistics" else bound) for k, n in sent.items()}


def _kind(name: str) -> str:
    return "statistics" if is_statistic(name) else "parameters"
