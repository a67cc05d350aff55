"""Replies through the door that a run uses: `receive`, and `Nodes.gather` for declarations."""

import json

import httpx
import pytest
import torch
from federation import InProcessGrid, ScriptedClient, federation, payload_record
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    validate_object_content,
)
from measuring import peak_memory

from strategies import FedAvg, receive
from task.protocol import REPORT, UPDATE

STATE = {"w": torch.linspace(-1, 1, 24).reshape(4, 6), "b": torch.zeros(4)}


def honest(partition, of=3, bits=8):
    return ScriptedClient(partition, of, bits, lambda state: state)


def train(strategy, grid, timeout=0.0):
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    return strategy.aggregate_train(1, receive(grid, messages, timeout, strategy.largest_payload))


class Undecodable(InProcessGrid):
    """Pulling what node 101 answers to one kind of message raises, as Flower's decoding does."""

    def __init__(self, nodes, kind, error):
        super().__init__(nodes)
        self.kind, self.error = kind, error

    def pull_messages(self, message_ids):
        asked = [self._waiting[i].metadata for i in message_ids if i in self._waiting]
        if any(m.dst_node_id == 101 and m.message_type == self.kind for m in asked):
            raise self.error
        return super().pull_messages(message_ids)


def undecodable(kind, error):
    return Undecodable(federation([honest(i) for i in range(3)], STATE).nodes, kind, error)


ERRORS = [ValueError("no head"), KeyError("x"), AttributeError("data"), RecursionError("deep")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_reply_that_flower_cannot_decode_fails_its_client_only(error):
    strategy = FedAvg()
    train(strategy, undecodable("train", error))
    assert strategy.round_log.aggregated == [0, 2]
    assert "its reply cannot be read" in strategy.round_log.failed[1]


def test_a_declaration_that_flower_cannot_decode_refuses_its_node_only():
    strategy = FedAvg(node_wait=1.0)
    train(strategy, undecodable("query", ValueError("no head")))
    assert strategy.round_log.aggregated == [0, 2]


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_lost_connection_to_the_superlink_is_not_taken_for_a_bad_reply(kind):
    with pytest.raises(httpx.ConnectError):
        train(FedAvg(node_wait=1.0), undecodable(kind, httpx.ConnectError("gone")))


def test_a_reply_that_claims_to_answer_anothers_message_fails_its_own_client():
    """What a reply says of itself is what its node wrote; Flower does not compare it."""
    grid = federation([honest(i) for i in range(3)], STATE)
    strategy, client = FedAvg(), grid.nodes[101]

    def forging(message):
        if message.metadata.message_type == "query":
            return client(message)
        first = next(m for m in grid.sent if m.metadata.message_type == "train")
        return Message(client(message).content, reply_to=first)

    grid.nodes[101] = forging
    train(strategy, grid)
    assert strategy.round_log.aggregated == [0, 2]
    assert "answers another message" in strategy.round_log.failed[1]


def test_replies_that_are_ready_together_are_not_in_memory_together():
    grid = federation([honest(i, 50) for i in range(50)], STATE)

    def large(client):
        def answer(message):
            reply = client(message)
            if message.metadata.message_type == "train":
                reply.content[UPDATE] = payload_record(bytes(4_000_000))
            return reply

        return answer

    grid.nodes = {node_id: large(client) for node_id, client in grid.nodes.items()}
    strategy = FedAvg()
    peak = peak_memory(lambda: train(strategy, grid))
    assert len(strategy.round_log.rejected) == 50
    assert peak < 20_000_000


class Inflating(InProcessGrid):
    """Brings every reply through Flower's own objects, as the grid of a real federation does."""

    def pull_messages(self, message_ids):
        return [self._through_flower(reply) for reply in super().pull_messages(message_ids)]

    def _through_flower(self, reply):
        objects = get_all_nested_objects(reply)
        contents = {object_id: part.deflate() for object_id, part in objects.items()}
        for content in contents.values():
            validate_object_content(content)
        return inflate_object_from_contents(reply.object_id, contents)


def repeating(monkeypatch, data, times):
    """Arrays that hold `data` list each of their chunks so often."""
    deflate = Array.deflate

    def repeated(array):
        if array.data != data:
            return deflate(array)
        fields = {"dtype": "uint8", "shape": [1], "stype": array.stype}
        body = json.dumps({**fields, "arraychunk_ids": [0] * times}).encode()
        array.slice_array()
        return add_header_to_object_body(object_body=body, obj=array)

    monkeypatch.setattr(Array, "deflate", repeated)


@pytest.mark.parametrize("arrays", [1, 40])
def test_an_array_that_repeats_its_chunks_is_never_built(monkeypatch, arrays):
    """2 MB sent, 400 MB built: by one array, or by many that are each within bounds."""
    grid = Inflating(federation([honest(i) for i in range(3)], STATE).nodes)
    client, data = grid.nodes[101], bytes(2_000_000) if arrays == 1 else bytes(100)
    repeating(monkeypatch, data, 200 if arrays == 1 else 1)

    def bomb(message):
        reply = client(message)
        if message.metadata.message_type == "train":
            kinds = [f"kind-{i}" for i in range(arrays)]
            reply.content[UPDATE] = ArrayRecord({k: Array("uint8", (1,), k, data) for k in kinds})
        return reply

    grid.nodes[101] = bomb
    strategy = FedAvg()
    peak = peak_memory(lambda: train(strategy, grid))
    assert strategy.round_log.aggregated == [0, 2]
    assert "its arrays take more than" in strategy.round_log.failed[1]
    assert peak < 20_000_000
    assert Array.inflate.__qualname__ == "Array.inflate"


def test_a_declaration_brings_no_arrays():
    grid = Inflating(federation([honest(i) for i in range(3)], STATE).nodes)
    client = grid.nodes[101]

    def bulky(message):
        reply = client(message)
        if message.metadata.message_type == "query":
            reply.content["more"] = payload_record(bytes(1000))
        return reply

    grid.nodes[101] = bulky
    strategy = FedAvg(node_wait=1.0)
    train(strategy, grid)
    assert strategy.round_log.aggregated == [0, 2]


def test_the_reason_for_setting_a_reply_aside_is_one_short_line():
    grid = federation([honest(i) for i in range(3)], STATE)
    client = grid.nodes[101]

    def wordy(message):
        reply = client(message)
        if message.metadata.message_type == "train":
            reply.content[REPORT] = MetricRecord({"\n" + "k" * 10_000: 1})
        return reply

    grid.nodes[101] = wordy
    strategy = FedAvg()
    train(strategy, grid)
    reason = strategy.round_log.rejected[1]
    assert len(reason) <= 500
    assert reason.isprintable()
