"""Replies through Flower's HTTP grid and SuperLink, from nodes that send what they should not."""

import json
import time
import tracemalloc
from importlib.metadata import version

import numpy as np
import pytest
import torch
from federation import ScriptedClient, payload_record, refusal, with_w
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import array as flower_array
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from specs import spec_of_state
from superlink import SuperLink

from core.errors import FederationError
from exchange import pulling
from exchange.inbox import pull
from exchange.protocol import UPDATE
from exchange.states import to_arrays
from strategies import FedAvg, receive

SMALL = {"w": torch.linspace(-1, 1, 24).reshape(4, 6), "b": torch.zeros(4)}
# One update of it takes 2 MB.
LARGE = {"w": torch.linspace(-1, 1, 500_000).reshape(1000, 500)}


@pytest.fixture
def link():
    """A SuperLink; messages are made in its run."""
    before = TaskIdentity.run_id
    yield SuperLink()
    TaskIdentity.run_id = before


class Federation:
    """Three clients behind a SuperLink; what the second does with training can be replaced."""

    def __init__(self, link, state=SMALL):
        self.link, self.state = link, state
        self.strategy = FedAvg(context=with_w(node_wait=5.0))
        self.clients = [ScriptedClient(i, 3, 32, lambda s: s) for i in range(3)]
        for client in self.clients:
            client.spec = spec_of_state(state)
        self.ids = [link.add(client) for client in self.clients]

    @property
    def second(self):
        return self.ids[1]

    def alter(self, change, kind="train"):
        """Let the second client's replies of one kind be changed before they are sent."""
        client = self.clients[1]

        def answer(message):
            reply = client(message)
            if message.metadata.message_type == kind:
                change(reply)
            return reply

        self.link.nodes[self.second] = answer

    def ask(self, timeout=20.0):
        """Send a round's messages; return its replies, which come as they are asked for."""
        arrays = to_arrays(self.state)
        batches = self.strategy.training_messages(1, arrays, self.link.grid)
        return receive(self.link.grid, batches, timeout, self.strategy.largest_payload)

    def train(self, timeout=20.0):
        self.strategy.aggregate_train(1, self.ask(timeout))
        return self.strategy.round_log


def assert_only_the_second_failed(log, reason):
    assert log.aggregated == [0, 2]
    assert reason in log.failed[1]


def test_what_stands_between_grid_and_superlink_is_called(link, monkeypatch):
    """Flower may change how its grid pulls; what bounds it would then silently do nothing."""
    called = set()
    for name in ("PullMessages", "PullObject", "ConfirmMessageReceived"):
        real = getattr(pulling._ClientForOneReply, name)

        def spy(self, request, name=name, real=real):
            called.add(name)
            return real(self, request)

        monkeypatch.setattr(pulling._ClientForOneReply, name, spy)
    client = link.grid._client
    assert Federation(link).train().aggregated == [0, 1, 2]
    assert called == {"PullMessages", "PullObject", "ConfirmMessageReceived"}
    assert link.grid._client is client


def failing(link, monkeypatch, name, answered):
    """Let the SuperLink fail at its first two calls of one kind: before its work, or after it."""
    monkeypatch.setattr("exchange.inbox._LONGEST_PAUSE", 0.01)
    client, failures = link.grid._client, iter([True, True])

    class Failing:
        def __getattr__(self, called):
            def call(request):
                # The grid calls in several threads.
                fails = called == name and next(failures, False)
                if not fails or answered:
                    answer = getattr(client, called)(request)
                if fails:
                    raise refusal(500)
                return answer

            return call

    link.grid._client = Failing()
    return failures


CALLS = ["GetNodes", "PushMessages", "PushObject", "PullObject", "ConfirmMessageReceived"]


@pytest.mark.parametrize(
    ("name", "answered"),
    [*((n, a) for n in CALLS for a in (False, True)), ("PullMessages", False)],
)
def test_a_superlink_that_fails_for_a_while_is_asked_again(link, monkeypatch, name, answered):
    failures = failing(link, monkeypatch, name, answered)
    assert Federation(link).train().aggregated == [0, 1, 2]
    assert not list(failures)


def test_a_rejected_reply_stays_so_where_the_superlink_fails_to_delete_it(link, monkeypatch):
    federation = Federation(link)
    federation.alter(too_many_objects)
    replies = federation.ask()
    failures = failing(link, monkeypatch, "ConfirmMessageReceived", answered=False)
    federation.strategy.aggregate_train(1, replies)
    assert_only_the_second_failed(federation.strategy.round_log, "more than 2000 objects")
    assert not list(failures)


def instruct(link, node_id, content):
    """Push an instruction from the SuperLink to itself, which every pull of replies then gets."""
    metadata = Metadata(
        run_id=link.run_id,
        message_id="",
        src_node_id=1,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=1000.0,
        message_type="train",
    )
    link.send(node_id, make_message(metadata=metadata, content=content))


def unreadable(monkeypatch):
    """An array that names a chunk which it does not have."""
    return listing(monkeypatch, b"unreadable", [7])


def listing(monkeypatch, data, indices):
    """An array of one chunk, which says that it consists of its chunks of these numbers."""
    deflate = Array.deflate

    def lying(array):
        if array.data != data:
            return deflate(array)
        fields = {"dtype": "uint8", "shape": [1], "stype": array.stype}
        body = json.dumps({**fields, "arraychunk_ids": indices}).encode()
        return add_header_to_object_body(object_body=body, obj=array)

    monkeypatch.setattr(Array, "deflate", lying)
    return ArrayRecord({"x": Array("uint8", (1,), "own", data)})


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("readable", [True, False])
def test_instructions_that_a_node_injects_disturb_no_other(link, monkeypatch, kind, readable):
    federation = Federation(link)
    content = RecordDict({"x": ConfigRecord({"x": 1}) if readable else unreadable(monkeypatch)})
    looks = []

    def inject():
        looks.append(1)
        # Four looks at each node: a query may fail twice.
        if len(looks) <= 12:
            instruct(link, federation.second, content)
        else:
            link.serve()

    if kind == "query":
        link.at_pull = inject
    replies = federation.ask()
    if kind == "train":
        link.at_pull = inject
    federation.strategy.aggregate_train(1, replies)
    assert len(looks) > 12
    assert federation.strategy.round_log.aggregated == [0, 1, 2]


def test_a_reply_that_cannot_be_read_fails_its_own_client_only(link, monkeypatch):
    federation, record = Federation(link), unreadable(monkeypatch)
    federation.alter(lambda reply: reply.content.update({"x": record}))
    log = federation.train()
    assert_only_the_second_failed(log, "its reply cannot be read")


def test_a_reply_that_claims_to_answer_anothers_message_fails_its_own_client_only(link):
    """By its announcement it answers its own, else Flower's SuperLink would not take it."""
    federation = Federation(link)
    replies = federation.ask()

    def serve():
        first, _, third = federation.ids
        asked = {node_id: link.fetch(node_id) for node_id in federation.ids}
        if asked[first] is None:
            return
        forged = Message(
            federation.clients[1](asked[federation.second]).content, reply_to=asked[first]
        )
        forged.metadata.__dict__["_src_node_id"] = federation.second
        link.send(federation.second, forged, answers=asked[federation.second].metadata.message_id)
        for node_id in (first, third):
            link.send(node_id, link.nodes[node_id](asked[node_id]))

    link.at_pull = serve
    federation.strategy.aggregate_train(1, replies)
    log = federation.strategy.round_log
    assert_only_the_second_failed(log, "answers another message")


def announce(federation):
    """Let the second client announce its reply and upload nothing; the others answer as always."""
    link, uploads = federation.link, []

    def serve():
        message = link.fetch(federation.second)
        if message is not None:
            answer = federation.clients[1](message)
            uploads.append(link.send(federation.second, answer, upload=False))
        link.serve(but=(federation.second,))

    link.at_pull = serve
    return uploads


def test_a_reply_that_is_never_uploaded_holds_up_no_other(link):
    federation = Federation(link)
    replies = federation.ask(timeout=1.0)
    announce(federation)
    began = time.monotonic()
    federation.strategy.aggregate_train(1, replies)
    # Flower's own grid waits for an hour.
    assert time.monotonic() - began < 30
    assert federation.strategy.round_log.aggregated == [0, 2]
    assert federation.strategy.round_log.failed == {1: "no reply in time"}


def test_a_reply_that_is_uploaded_later_is_used_and_the_others_come_first(link):
    federation = Federation(link)
    replies = federation.ask()
    uploads = announce(federation)
    came = []

    def noting():
        for reply in replies:
            came.append(reply.metadata.src_node_id)
            if len(came) == 2:
                uploads[0]()
            yield reply

    federation.strategy.aggregate_train(1, noting())
    assert federation.strategy.round_log.aggregated == [0, 1, 2]
    assert came[2] == federation.second


def test_what_was_downloaded_is_not_downloaded_again(link):
    """All is there but the last object, at nine looks of ten."""
    federation = Federation(link)
    replies = federation.ask()
    missing = []
    found = link.state.get_object

    def get_object(run_id, object_id):
        content = found(run_id, object_id)
        if content and content.startswith(b"MetricRecord") and len(missing) < 9:
            missing.append(object_id)
            return b""
        return content

    link.serve()
    link.state.get_object = get_object
    link.calls.clear()
    federation.strategy.aggregate_train(1, replies)
    assert federation.strategy.round_log.aggregated == [0, 1, 2]
    # A message of a record of records, a report, an array and its chunk: six each.
    assert link.calls.count("PullObject") == 3 * 6 + 9


def test_a_reply_that_the_superlink_has_lost_fails_its_client_only(link):
    federation = Federation(link)
    replies = federation.ask()
    found = link.state.get_object
    second = []

    def get_object(run_id, object_id):
        return None if object_id in second else found(run_id, object_id)

    def serve():
        link.serve()
        link.state.get_object = get_object
        for message in link.state.message_res_store.values():
            if message.metadata.src_node_id == federation.second:
                second.append(message.metadata.message_id)

    link.at_pull = serve
    federation.strategy.aggregate_train(1, replies)
    log = federation.strategy.round_log
    assert_only_the_second_failed(log, "could not be found")


def too_many_bytes(reply):
    """40 MB in eight chunks, all of them different."""
    noise = np.random.default_rng(0).bytes(40_000_000)
    reply.content["more"] = ArrayRecord({"x": Array("uint8", (len(noise),), "own", noise)})


def too_long_a_record(reply):
    reply.content["more"] = ConfigRecord({"x": "x" * 1_100_000})


def too_many_objects(reply):
    arrays = {str(i): Array("uint8", (1,), "own", str(i).encode()) for i in range(1001)}
    reply.content["more"] = ArrayRecord(arrays)


def peak_of(federation):
    """Train, and return the most bytes that were allocated once all nodes had answered."""
    replies = federation.ask()

    def serve():
        federation.link.serve()
        federation.link.at_pull = lambda: None
        tracemalloc.start()

    federation.link.at_pull = serve
    try:
        federation.strategy.aggregate_train(1, replies)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (too_many_bytes, "its arrays take more than 154 bytes"),
        (too_long_a_record, "more than 1000000 bytes besides its arrays"),
        (too_many_objects, "more than 2000 objects"),
    ],
)
def test_too_much_is_refused_while_it_is_downloaded_and_not_kept(link, change, reason):
    federation = Federation(link)
    federation.alter(change)
    # Two objects of 5 MiB at a time, each as it came and once more out of its envelope.
    assert peak_of(federation) < 25_000_000
    log = federation.strategy.round_log
    assert_only_the_second_failed(log, reason)
    # Of messages to nodes there is more: these nodes confirm nothing.
    kept = [found.content for found in link.state.object_store.store.values()]
    assert not any(content.startswith(b"MetricRecord") for content in kept)


def test_an_array_that_lists_its_chunk_a_hundred_times_is_never_built(link, monkeypatch):
    """Uploaded are 2 MB, as many as were asked for; built would be 200 MB."""
    federation = Federation(link, LARGE)
    record = listing(monkeypatch, bytes(1_999_000), [0] * 100)
    federation.alter(lambda reply: reply.content.update({UPDATE: record}))
    assert peak_of(federation) < 40_000_000
    log = federation.strategy.round_log
    assert_only_the_second_failed(log, "its arrays take more than")


def test_arrays_that_share_a_chunk_are_counted_one_by_one(link):
    federation = Federation(link)
    data = bytes(100)
    arrays = {f"kind-{i}": Array("uint8", (1,), f"kind-{i}", data) for i in range(40)}
    federation.alter(lambda reply: reply.content.update({UPDATE: ArrayRecord(arrays)}))
    log = federation.train()
    assert_only_the_second_failed(log, "its arrays take more than")


def test_an_honest_update_comes_in_many_chunks(link, monkeypatch):
    """Different ones and, of the bias of zeros, equal ones."""
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4)
    log = Federation(link).train()
    assert log.aggregated == [0, 1, 2]


def test_a_declaration_brings_no_arrays(link):
    federation = Federation(link)
    federation.alter(lambda reply: reply.content.update({"x": payload_record(bytes(9))}), "query")
    assert federation.train().aggregated == [0, 2]


def test_a_message_ends_with_its_round(link):
    """A client that comes late is not given a message whose reply is not awaited any more."""
    federation = Federation(link)
    replies = federation.ask(timeout=0.5)
    link.at_pull = lambda: None
    assert list(replies) == []
    time.sleep(0.2)
    assert [link.fetch(node_id) for node_id in federation.ids] == [None, None, None]


def test_a_message_is_there_throughout_its_round(link):
    """Its time begins when it is sent, whatever time the packing of the models took."""
    federation = Federation(link)
    replies = federation.ask(timeout=100.0)
    messages = federation.strategy._plan.messages
    for message in messages:
        message.metadata.__dict__["_created_at"] -= 1000.0
    assert len(list(replies)) == 3
    for message in messages:
        ends = message.metadata.created_at + message.metadata.ttl - time.time()
        assert 100 < ends < 110


def test_an_object_that_two_threads_bring_counts_once():
    """A look that gives up leaves a thread of Flower's behind, which continues to download."""
    objects = get_all_nested_objects(Array("uint8", (1000,), "own", bytes(1000)))
    arrival = pulling._Arrival()
    for _ in range(2):
        for object_id, found in objects.items():
            content = found.deflate()
            arrival.add(object_id, PullObjectResponse(object_content=content), most_bytes=1000)
    arrival.read(most_bytes=1000)
    # And what comes after the reply was read is not kept.
    arrival.add("late", PullObjectResponse(object_content=content), most_bytes=1000)
    assert not arrival.objects


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("PullMessages", "does not ask for messages by PullMessages"),
        ("ConfirmMessageReceived", "does not confirm messages by ConfirmMessageReceived"),
    ],
)
def test_a_flower_that_goes_another_way_ends_the_run_by_name(link, monkeypatch, name, said):
    """As a later version might: the calls go to the SuperLink past what stands between."""

    def past(self, request):
        return getattr(self._client, name)(request)

    federation = Federation(link)
    federation.ask()  # The nodes have been asked what they are.
    monkeypatch.setattr(pulling._ClientForOneReply, name, past)
    with pytest.raises(FederationError, match=rf"flwr {version('flwr')} {said}, so that"):
        federation.train()


def test_a_grid_without_the_client_that_is_guarded_ends_the_run_by_name(link):
    federation = Federation(link)
    federation.ask()
    message = Message(RecordDict(), federation.second, "query")
    grid = object.__new__(HttpGrid)
    with pytest.raises(FederationError, match="without the client that is guarded"):
        pull(grid, message)
