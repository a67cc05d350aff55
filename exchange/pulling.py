"""One reply at a time through Flower's HTTP grid: no other message, no more bytes, no waiting.

`HttpGrid.pull_messages` is given, besides the replies that it asks for, every message that any node
has pushed in the SuperLink's own name. It downloads the objects of all of them, however many and
large they are, and waits for those that were announced and not yet uploaded. So, while it pulls,
the grid gets another client, which stands between it and the SuperLink in the three calls that it
makes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from threading import Lock
from weakref import WeakKeyDictionary

import httpx
from flwr.app import Array, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from core.errors import FederationError

# What may come besides the chunks that arrays are made of: records, the report, an error. It is
# bounded apart, because reading it takes many times its bytes.
_MOST_BESIDES = 1_000_000
# Each is asked for by itself. Flower cuts arrays into chunks of 5 MiB.
_MOST_OBJECTS = 2000


class NotYetComplete(Exception):
    """Part of the reply has still to be uploaded."""


@dataclass
class _Arrival:
    """What has come of one reply, kept from one look to the next."""

    announced: PullAppMessagesResponse | None = None
    objects: dict[str, PullObjectResponse] = field(default_factory=dict)
    chunk_bytes: dict[str, int] = field(default_factory=dict)
    # The chunks that its arrays are made of, as often as they list them.
    listed: list[str] = field(default_factory=list)
    bytes_besides: int = 0
    is_read: bool = False
    # The grid asks for objects in several threads.
    lock: Lock = field(default_factory=Lock)

    def add(self, object_id: str, found: PullObjectResponse, most_bytes: int) -> None:
        """Keep an object, and reject what is too much.

        Raises
        ------
        ValueError
            If there are more bytes than allowed, or the object is not one of Flower's.
        """
        content = found.object_content
        kind, children, _ = get_object_head_values_from_object_content(content)
        with self.lock:
            if self.is_read or object_id in self.objects:
                # Asked for twice: by this look, and by a thread that the last one left behind.
                return
            self.objects[object_id] = found
            if kind == ArrayChunk.__qualname__:
                self.chunk_bytes[object_id] = len(get_object_body(content, ArrayChunk))
            else:
                self.bytes_besides += len(content)
            if kind == Array.__qualname__:
                indices = json.loads(get_object_body(content, Array))["arraychunk_ids"]
                self.listed += [children[index] for index in indices]
            _reject_large(sum(self.chunk_bytes.values()), most_bytes)
            if self.bytes_besides > _MOST_BESIDES:
                raise ValueError(f"it takes more than {_MOST_BESIDES} bytes besides its arrays")

    def read(self, most_bytes: int) -> None:
        """Let go of the objects, which the grid has by now, and reject what would become too much.

        An array lists the chunks that it is made of, and may list one a thousand times: what a
        node uploads does not bound what comes of it.
        """
        with self.lock:
            self.is_read = True
            self.objects.clear()
        _reject_large(sum(self.chunk_bytes[object_id] for object_id in self.listed), most_bytes)


def _reject_large(array_bytes: int, most_bytes: int) -> None:
    if array_bytes > most_bytes:
        raise ValueError(f"its arrays take more than {most_bytes} bytes")


# An entry lives as long as the message whose reply is awaited.
_ARRIVALS: WeakKeyDictionary[Message, _Arrival] = WeakKeyDictionary()


class _ClientForOneReply:
    """Stands in for the grid's client; its methods are named as Flower's."""

    def __init__(
        self, client: RuntimeHttpClient, message_id: str, arrival: _Arrival, most_bytes: int
    ) -> None:
        self._client = client
        self._message_id = message_id
        self._arrival = arrival
        self._most_bytes = most_bytes
        self._was_asked = False

    def check(self, came: bool) -> None:
        """Find out whether Flower's grid made the calls in which a reply is bounded.

        Raises
        ------
        FederationError
            If it did not: then nothing is bounded any more.
        """
        if not self._was_asked:
            raise _unknown_flower("does not ask for messages by PullMessages")
        if came and not self._arrival.is_read:
            raise _unknown_flower("does not confirm messages by ConfirmMessageReceived")

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        """Ask for the reply; the SuperLink names it only once, so that this is remembered.

        Raises
        ------
        ValueError
            If it was read before and not taken for the reply, or has too many objects.
        """
        self._was_asked = True
        if self._arrival.is_read:
            # The SuperLink assigns a reply to its message; the reply's own metadata is untrusted.
            raise ValueError("its metadata answers another message")
        if self._arrival.announced is not None:
            return self._arrival.announced
        found = self._client.PullMessages(request)
        mine = PullAppMessagesResponse()
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id == self._message_id:
                mine.messages_list.append(message)
                mine.message_object_trees.append(tree)
                self._arrival.announced = mine
                _reject_many_objects(tree)
        return mine

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        """Download one object, unless it is here already, or would be one too many.

        Raises
        ------
        NotYetComplete
            If it has not been uploaded.
        ValueError
            If it is too large, with those before it.
        """
        if request.object_id in self._arrival.objects:
            return self._arrival.objects[request.object_id]
        found = self._client.PullObject(request)
        if found.object_found and not found.object_available:
            raise NotYetComplete
        # What is not found any more is an error that Flower words; the reply is then given up.
        if found.object_found:
            self._arrival.add(request.object_id, found, self._most_bytes)
        return found

    def ConfirmMessageReceived(
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        """Let the SuperLink delete the objects: the grid has them all, and reads them now."""
        confirmed = self._client.ConfirmMessageReceived(request)
        self._arrival.read(self._most_bytes)
        return confirmed

    def discard(self) -> None:
        """Let the SuperLink delete a rejected reply, which it would else keep through the run."""
        if self._arrival.announced is None or self._arrival.is_read:
            return
        metadata = self._arrival.announced.messages_list[0].metadata
        # Where it fails at that, the reply is rejected all the same.
        with suppress(httpx.HTTPStatusError):
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=Node(node_id=metadata.dst_node_id),
                    run_id=metadata.run_id,
                    message_object_id=metadata.message_id,
                )
            )


def _unknown_flower(what: str) -> FederationError:
    return FederationError(
        f"flwr {version('flwr')} {what}, so that what nodes send would not be bounded; prowd works "
        "with flwr 1.41 and 1.42"
    )


def _reject_many_objects(tree: ObjectTree) -> None:
    if any(True for _ in islice(iterate_object_tree(tree), _MOST_OBJECTS, None)):
        raise ValueError(f"it consists of more than {_MOST_OBJECTS} objects")


@contextmanager
def only_the_reply(
    grid: Grid, message: Message, most_bytes: int
) -> Iterator[Callable[[bool], None]]:
    """Let a grid pull the reply to one message only, and no more than so many bytes of arrays.

    A grid in memory, as the simulation's, has nothing to download and is left as it is.

    Yields
    ------
    callable
        ``check(came)``, to be called once the grid has pulled, with whether the reply came.

    Raises
    ------
    FederationError
        From `check` or from here, if Flower does not go the way that is guarded.
    NotYetComplete
        From within, if part of the reply has still to be uploaded; it can be asked for again.
    ValueError
        From within, if the reply is too large. How large a single object may be, the SuperLink or
        the proxy before it decides: it is here before its bytes can be counted.
    """
    if not isinstance(grid, HttpGrid):
        yield lambda came: None
        return
    if not all(hasattr(grid, name) for name in ("_client", "_runtime_client")):
        raise _unknown_flower("has a grid without the client that is guarded")
    client = grid._runtime_client
    arrival = _ARRIVALS.setdefault(message, _Arrival())
    between = _ClientForOneReply(client, message.metadata.message_id, arrival, most_bytes)
    grid._client = between  # type: ignore[assignment]  # In its place, for one reply.
    try:
        yield between.check
    except (FederationError, NotYetComplete, httpx.HTTPError, OSError):
        raise
    except Exception:
        # Decoding untrusted bytes can raise anything.
        between.discard()
        raise
    finally:
        grid._client = client
