"""Replies taken from Flower's grid one at a time; one that cannot be read is an error, no crash."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


def receive(
    grid: Grid, messages: list[Message], timeout: float | None, most_bytes: int
) -> Iterator[Message]:
    """Send messages and yield each reply as soon as it is there.

    A reply that cannot be read comes as an error that says so.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    messages : list of Message
        One a node.
    timeout : float or None
        Seconds after which the replies that have not come are given up.
    most_bytes : int
        The arrays of one reply take no more than this.
    """
    pushed = {message_id for message_id in grid.push_messages(messages) if message_id}
    waiting = [m for m in messages if m.metadata.message_id in pushed]
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _SHORTEST_PAUSE
    while waiting:
        unanswered = []
        for message in waiting:
            reply = pull(grid, message, most_bytes)
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
            time.sleep(pause)


def pull(grid: Grid, message: Message, most_bytes: int = 0) -> Message | None:
    """Return the reply to one message: an error if it cannot be read, None if there is none yet.

    By itself, because Flower decodes whatever the nodes sent while it pulls: one reply that it
    cannot decode would take the others along, and all would be in memory at once.
    """
    message_id = message.metadata.message_id
    try:
        with _arrays_of(most_bytes):
            replies = list(grid.pull_messages([message_id]))
        return _checked(replies[0], message_id) if replies else None
    except (httpx.HTTPError, OSError, MemoryError):
        # The connection to the SuperLink or this machine, not the reply.
        raise
    except Exception as error:  # Decoding raises whatever the bytes of a stranger lead to.
        reason = f"its reply cannot be read: {type(error).__name__}: {error}"
        return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=message)


def _checked(reply: Message, message_id: str) -> Message:
    """Return the reply if it is one to this message; its content is what the node made it."""
    if reply.metadata.reply_to_message_id != message_id:
        raise ValueError("it says that it answers another message")
    if not reply.has_error() and not isinstance(reply.content, RecordDict):
        raise TypeError(f"it holds a {type(reply.content).__name__}")
    return reply


@contextmanager
def _arrays_of(most_bytes: int) -> Iterator[None]:
    """Let Flower build arrays of so many bytes in all, while one reply is pulled.

    An array lists the chunks that it is made of, and may list one a thousand times: what a node
    uploads does not bound what comes of it. Flower looks at no size before it joins them.
    """
    original = Array.__dict__["inflate"]
    left = most_bytes

    def inflate(
        cls: type[Array], content: bytes, children: dict[str, ArrayChunk] | None = None
    ) -> Array:
        nonlocal left
        names = get_object_children_ids_from_object_content(content)
        listed = json.loads(get_object_body(content, cls))["arraychunk_ids"]
        left -= sum(len(children[names[index]].data) for index in listed)
        if left < 0:
            raise ValueError(f"its arrays take more than {most_bytes} bytes")
        return original.__get__(None, cls)(content, children)

    Array.inflate = classmethod(inflate)
    try:
        yield
    finally:
        Array.inflate = original
