"""Replies through the door that a run uses: `receive`, and `Nodes.gather` for declarations."""

from functools import partial

import httpx
import pytest
import torch
from federation import InProcessGrid, ScriptedClient, federation, payload_record, refusal, with_w
from flwr.app import Message, MetricRecord, RecordDict
from measuring import peak_memory

from exchange.protocol import REPORT, UPDATE
from exchange.states import to_arrays
from strategies import FedAvg, receive

STATE = {"w": torch.linspace(-1, 1, 24).reshape(4, 6), "b": torch.zeros(4)}


def honest(partition, of=3, bits=8):
    return ScriptedClient(partition, of, bits, lambda state: state)


def train(strategy, grid, timeout=0.0):
    arrays = to_arrays(STATE)
    batches = strategy.training_messages(1, arrays, grid)
    return strategy.aggregate_train(1, receive(grid, batches, timeout, strategy.largest_payload))


def test_each_batch_is_sent_before_the_next_is_made():
    grid, strategy = (
        federation([honest(i, 2, 8 * 4**i) for i in range(2)], STATE),
        FedAvg(context=with_w()),
    )
    arrays = to_arrays(STATE)
    sent_before = []

    def noting(batch):
        sent_before.append([m.metadata.message_type for m in grid.sent].count("train"))
        return batch()

    noted = [partial(noting, batch) for batch in strategy.training_messages(1, arrays, grid)]
    strategy.aggregate_train(1, receive(grid, noted, 100.0, strategy.largest_payload))
    assert sent_before == [0, 1]
    assert strategy.round_log.aggregated == [0, 1]
    # The first lives on while the second is made.
    lives = [m.metadata.ttl for m in grid.sent if m.metadata.message_type == "train"]
    assert [round(seconds) for seconds in lives] == [205, 105]


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
    strategy = FedAvg(context=with_w())
    train(strategy, undecodable("train", error))
    assert strategy.round_log.aggregated == [0, 2]
    assert "its reply cannot be read" in strategy.round_log.failed[1]


def test_a_declaration_that_flower_cannot_decode_refuses_its_node_only():
    strategy = FedAvg(context=with_w(node_wait=1.0))
    train(strategy, undecodable("query", ValueError("no head")))
    assert strategy.round_log.aggregated == [0, 2]


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_lost_connection_to_the_superlink_is_not_taken_for_a_bad_reply(kind):
    with pytest.raises(httpx.ConnectError):
        train(
            FedAvg(context=with_w(node_wait=1.0)),
            undecodable(kind, httpx.ConnectError("gone")),
        )


def test_a_failure_of_the_superlinks_own_costs_the_reply_and_not_the_run(caplog):
    """As while a node keeps its database locked; Flower does not try again at 500."""
    strategy = FedAvg(context=with_w())
    train(strategy, undecodable("train", refusal(500)), timeout=0.5)
    assert strategy.round_log.aggregated == [0, 2]
    assert strategy.round_log.failed == {1: "no reply in time"}
    assert "The SuperLink failed, it is asked again: 500" in caplog.text


def test_a_superlink_that_fails_at_every_reply_is_asked_for_one_at_a_time(caplog):
    """Each failure may take it seconds: a look at all replies would outlast the round."""

    class Failing(InProcessGrid):
        def pull_messages(self, message_ids):
            if self.sent[-1].metadata.message_type == "train":
                raise refusal(500)
            return super().pull_messages(message_ids)

    strategy = FedAvg(context=with_w())
    train(strategy, Failing(federation([honest(i) for i in range(3)], STATE).nodes))
    assert sorted(strategy.round_log.failed) == [0, 1, 2]
    assert caplog.text.count("The SuperLink failed") == 1


def test_a_failure_of_the_superlinks_own_leaves_a_node_unheard():
    strategy = FedAvg(context=with_w(node_wait=0.5))
    train(strategy, undecodable("query", refusal(500)))
    assert strategy.round_log.aggregated == [0, 2]


@pytest.mark.parametrize("kind", ["query", "train"])
def test_what_the_superlink_refuses_ends_the_run(kind):
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        train(
            FedAvg(context=with_w(node_wait=1.0)),
            undecodable(kind, refusal(403)),
        )


@pytest.mark.parametrize("status", [500, 403])
def test_a_superlink_that_never_answers_for_itself_ends_the_run(monkeypatch, status):
    monkeypatch.setattr("exchange.inbox._LONGEST_PAUSE", 0.001)
    calls = []

    class Broken(InProcessGrid):
        def get_nodes(self):
            calls.append(1)
            raise refusal(status)

    with pytest.raises(httpx.HTTPStatusError, match=str(status)):
        train(FedAvg(context=with_w()), Broken({}))
    assert len(calls) == (11 if status == 500 else 1)


def test_a_reply_that_claims_to_answer_anothers_message_is_ignored():
    """What a reply says of itself is what its node wrote."""
    grid = federation([honest(i) for i in range(3)], STATE)
    strategy, client = FedAvg(context=with_w()), grid.nodes[101]

    def forging(message):
        if message.metadata.message_type == "query":
            return client(message)
        first = next(m for m in grid.sent if m.metadata.message_type == "train")
        return Message(client(message).content, reply_to=first)

    grid.nodes[101] = forging
    train(strategy, grid)
    assert strategy.round_log.aggregated == [0, 2]
    assert strategy.round_log.failed == {1: "no reply in time"}


def test_what_else_comes_with_a_reply_is_ignored():
    """As instructions that a node pushed in the SuperLink's name, which come with every pull."""

    class Crowded(InProcessGrid):
        def pull_messages(self, message_ids):
            strange = Message(RecordDict(), 1, "train")
            return [strange, *super().pull_messages(message_ids)]

    grid = Crowded(federation([honest(i) for i in range(3)], STATE).nodes)
    strategy = FedAvg(context=with_w())
    train(strategy, grid)
    assert strategy.round_log.aggregated == [0, 1, 2]


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
    strategy = FedAvg(context=with_w())
    peak = peak_memory(lambda: train(strategy, grid))
    assert len(strategy.round_log.rejected) == 50
    assert peak < 20_000_000


def test_the_reason_for_setting_a_reply_aside_is_one_short_line():
    grid = federation([honest(i) for i in range(3)], STATE)
    client = grid.nodes[101]

    def wordy(message):
        reply = client(message)
        if message.metadata.message_type == "train":
            reply.content[REPORT] = MetricRecord({"\n" + "k" * 10_000: 1})
        return reply

    grid.nodes[101] = wordy
    strategy = FedAvg(context=with_w())
    train(strategy, grid)
    reason = strategy.round_log.rejected[1]
    assert len(reason) <= 500
    assert reason.isprintable()
