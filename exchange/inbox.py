"""Replies taken from Flower's grid one at a time; one that cannot be read is an error, no crash."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import WARNING
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from core.arguments import check_number
from core.errors import FederationError
from exchange.protocol import Declaration, last_line
from exchange.pulling import NotYetComplete, only_the_reply
from exchange.round_plan import RoundLog
from exchange.undocumented import unreadable

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
# A message outlives its round by no more than so many seconds: the last look takes its time.
_MOST_GRACE = 5.0
# Calls that the SuperLink may fail in a row; it waits for its database for some seconds each time.
_MOST_FAILURES = 10

Answer = TypeVar("Answer")
Batch = Callable[[], list[Message]]


class SuperLinkFailed(Exception):
    """The SuperLink failed for what may pass: it is asked again later, and nothing else now."""


def receive(
    grid: Grid, batches: Sequence[Batch], timeout: float | None, most_bytes: int
) -> Iterator[Message]:
    """Send messages, batch by batch, and then yield each reply as soon as it is there.

    A reply that cannot be read comes as an error. One that is still being uploaded is
    looked at again later, and the others come meanwhile.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    batches : sequence of callable
        Each makes some of the messages, one a node, which are sent before the next is called.
    timeout : float or None
        Seconds from the last batch, its sending included, after which the replies that have not
        come are given up. Then nodes are not given their messages any more either; those of the
        batches before the last live twice as long, as it takes its time to be made.
    most_bytes : int
        The arrays of one reply take no more than this.

    Examples
    --------
    >>> replies = receive(grid, [lambda: [message]], timeout=60.0, most_bytes=1_000_000)
    >>> [reply.has_error() for reply in replies]
    [False]
    """
    if timeout is not None:
        check_number("timeout", timeout, least=0)
    waiting, deadline = [], None
    for place, batch in enumerate(batches):
        messages = batch()
        deadline = None if timeout is None else time.monotonic() + timeout
        if timeout is not None:
            _expire_with_round(messages, timeout if place == len(batches) - 1 else 2 * timeout)
        pushed = _push(grid, messages)
        waiting += [m for m in messages if m.metadata.message_id in pushed]
    pause = _SHORTEST_PAUSE
    while waiting:
        unanswered = []
        for place, message in enumerate(waiting):
            try:
                reply = pull(grid, message, most_bytes)
            except SuperLinkFailed:
                # It comes last next time: the failure may be of this reply alone.
                unanswered += [*waiting[place + 1 :], message]
                break
            if reply is None:
                unanswered.append(message)
                continue
            yield reply
            # Let go of it before the next one is pulled, so that no two are held.
            del reply
        if deadline is not None and time.monotonic() >= deadline:
            return
        answered = len(unanswered) < len(waiting)
        pause = _SHORTEST_PAUSE if answered else min(1.5 * pause, _LONGEST_PAUSE)
        waiting = unanswered
        if waiting:
            left = pause if deadline is None else deadline - time.monotonic()
            time.sleep(max(0.0, min(pause, left)))


def _push(grid: Grid, messages: list[Message]) -> set[str]:
    """Send messages together, as what they share is then sent once; return the IDs of those."""
    return {i for i in patiently(lambda: grid.push_messages(messages)) if i}


def _expire_with_round(messages: list[Message], timeout: float) -> None:
    """Limit the messages' time to live: else a late client works off all old rounds first."""
    lives = timeout + min(_MOST_GRACE, timeout / 5)
    now = time.time()
    for message in messages:
        # Flower counts from when it was made, since when the other nodes' models were encoded.
        message.metadata.ttl = now - message.metadata.created_at + lives


def pull(grid: Grid, message: Message, most_bytes: int = 0) -> Message | None:
    """Return the reply to one message: an error if it cannot be read, None if it is not there yet.

    By itself, because Flower decodes whatever the nodes sent while it pulls: one reply that it
    cannot decode would take the others along, and all would be in memory at once.

    Raises
    ------
    SuperLinkFailed
        If the SuperLink failed for what may pass. A reply that it had marked as delivered by then
        does not come any more, and is missing from the round.
    """
    message_id = message.metadata.message_id
    try:
        with only_the_reply(grid, message, most_bytes) as check:
            replies = list(grid.pull_messages([message_id]))
            mine = [r for r in replies if r.metadata.reply_to_message_id == message_id]
            # Flower itself words an error where part of a reply is lost.
            check(any(not reply.has_error() for reply in mine))
        return _checked(mine[0]) if mine else None
    except NotYetComplete:
        return None
    except httpx.HTTPStatusError as error:
        raise _passing(error) from error
    except (FederationError, httpx.HTTPError, OSError, MemoryError):
        # The connection to the SuperLink or this machine, not the reply.
        raise
    except Exception as error:  # Decoding untrusted bytes can raise anything.
        return unreadable(message, f"its reply cannot be read: {type(error).__name__}: {error}")


def patiently(call: Callable[[], Answer]) -> Answer:
    """Call the SuperLink, and again where it failed for what may pass.

    It keeps a message that it is given again once, as the message's ID is made of its content.

    Raises
    ------
    httpx.HTTPStatusError
        If it refuses the call, or fails too often.
    """
    for _ in range(_MOST_FAILURES):
        try:
            return call()
        except httpx.HTTPStatusError as error:
            _passing(error)
        time.sleep(_LONGEST_PAUSE)
    return call()


def _passing(error: httpx.HTTPStatusError) -> SuperLinkFailed:
    """Warn of a failure of the SuperLink's own, and raise any other.

    A node that pushes much at once holds its database, and a call meanwhile is answered
    with 500. Flower tries again only at statuses that a proxy gives.
    """
    if not error.response.is_server_error:
        raise error
    log(WARNING, "The SuperLink failed, it is asked again: %s", error)
    return SuperLinkFailed(str(error))


def _checked(reply: Message) -> Message:
    """Return the reply if its content is a record; it is what the node made it."""
    if not reply.has_error() and not isinstance(reply.content, RecordDict):
        raise TypeError(f"it holds a {type(reply.content).__name__}")
    return reply


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


def _by_message_id(
    messages: Iterable[Message], clients: dict[int, Declaration]
) -> dict[str, Declaration]:
    return {m.metadata.message_id: clients[m.metadata.dst_node_id] for m in messages}


def warn_of_left_out(
    server_round: int, clients: Mapping[int, Declaration], round_log: RoundLog
) -> None:
    """Log which of the clients that were asked, by node ID, are left out, and why."""
    reasons = round_log.rejected | round_log.failed
    for node_id, client in clients.items():
        if reason := reasons.get(client.partition_id):
            log(
                WARNING,
                "Round %d continues without node %d (partition %d): %s",
                server_round,
                node_id,
                client.partition_id,
                reason,
            )
