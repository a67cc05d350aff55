"""What all strategies share: sampling, rejection, and that order does not matter."""

import pytest
import torch
from federation import (
    InProcessGrid,
    LateGrid,
    ScriptedClient,
    federation,
    payload_record,
    report,
    run_round,
    with_w,
)
from flwr.app import ConfigRecord, Error, Message, RecordDict
from specs import to_bits

from exchange.nodes import sample_nodes
from exchange.protocol import REPORT, UPDATE, Declaration
from exchange.states import to_arrays
from quant import encode
from strategies import FedAvg, FederationError

STATE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


def constant(value):
    return lambda state: {name: torch.full_like(t, value) for name, t in state.items()}


def good(partition, of=3, value=2.0, bits=32):
    return ScriptedClient(partition, of, bits, constant(value))


class BadClient(ScriptedClient):
    """Declares itself properly and answers training with whatever `reply` makes."""

    def __init__(self, partition, of, reply):
        super().__init__(partition, of, 32, constant(9.0))
        self.reply = reply

    def __call__(self, message):
        if message.metadata.message_type == "query":
            return super().__call__(message)
        return self.reply(message)


def content(payload=None, metrics=None):
    record = RecordDict()
    if payload is not None:
        record[UPDATE] = payload_record(payload)
    if metrics is not None:
        record[REPORT] = metrics
    return lambda message: Message(record, reply_to=message)


def encoded(bits, state=None):
    state = state or {n: t + 9 for n, t in STATE.items()}
    return encode(to_bits(state, bits), stamp=1)


NAN = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
BAD_REPLIES = {
    "garbage": (content(b"garbage", report(10)), "7 bytes is shorter than the header"),
    "truncated": (
        content(encoded(32)[:-1], report(10)),
        "73 bytes; this model at 32 bits takes 74",
    ),
    "altered": (content(encoded(32)[:-1] + b"\7", report(10)), "checksum"),
    "other width": (content(encoded(8), report(10)), "8 bits; the client declared 32"),
    "other model": (
        content(encoded(32, {"w": torch.zeros(3, 2), "b": torch.zeros(2)}), report(10)),
        "table of tensors",
    ),
    "no update": (content(None, report(10)), "does not hold one array"),
    "no report": (content(encoded(32)), "holds no report"),
    "too many examples": (content(encoded(32), report(11)), "reports 11 examples and declared 10"),
    "no examples": (content(encoded(32), report(0)), "reports 0 examples"),
    "impossible accuracy": (content(encoded(32), report(10, accuracy=1.5)), "accuracy of 1.5"),
    "diverged": (content(encoded(32), report(10, loss=float("nan"))), "loss of nan"),
}


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_rejected_and_the_round_continues(kind):
    reply, reason = BAD_REPLIES[kind]
    strategy = FedAvg(context=with_w())
    grid = federation([good(0), BadClient(1, 3, reply), good(2, value=4.0)], STATE)
    new = run_round(strategy, grid, STATE)
    assert torch.equal(new["w"], torch.full((2, 3), 3.0))  # (2 + 4) / 2, without the bad 9
    assert strategy.round_log.aggregated == [0, 2]
    assert list(strategy.round_log.rejected) == [1]
    assert reason in strategy.round_log.rejected[1]
    assert strategy.round_log.failed == {}


def test_an_error_and_a_missing_reply_are_failures_with_their_reason():
    error = Error(code=2, reason="Traceback ...\nValueError: out of memory")
    crashed = BadClient(0, 3, lambda message: Message(error, reply_to=message))
    silent = BadClient(1, 3, lambda message: None)
    strategy = FedAvg(context=with_w())
    new = run_round(strategy, federation([crashed, silent, good(2)], STATE), STATE)
    assert torch.equal(new["b"], torch.full((2,), 2.0))
    assert strategy.round_log.failed == {
        0: "ValueError: out of memory",
        1: "no reply in time",
    }


def test_a_round_without_any_good_reply_keeps_the_model():
    strategy = FedAvg(context=with_w())
    bad = [BadClient(i, 2, content(b"x", report(10))) for i in range(2)]
    assert run_round(strategy, federation(bad, STATE), STATE) is None
    assert sorted(strategy.round_log.rejected) == [0, 1]


def test_a_reply_to_another_message_is_ignored():
    """A replayed reply of an earlier round answers a message that was not sent in this one."""
    strategy = FedAvg(context=with_w())
    grid = federation([good(0, 1)], STATE)
    run_round(strategy, grid, STATE)
    stale = grid.sent[-1]
    old_reply = grid.nodes[100](stale)
    arrays = to_arrays(STATE)
    messages = strategy.configure_train(2, arrays, ConfigRecord(), grid)
    grid.push_messages(messages)
    new, _ = strategy.aggregate_train(2, [old_reply])
    assert new is None
    assert strategy.round_log.failed == {0: "no reply in time"}


def test_order_of_arrival_does_not_change_a_bit():
    generator = torch.Generator().manual_seed(0)
    sent = [
        {n: torch.randn(t.shape, generator=generator) for n, t in STATE.items()} for _ in range(7)
    ]
    results = []
    for reverse in (False, True):
        clients = [ScriptedClient(i, 7, 32, lambda _, i=i: sent[i], 3 + i) for i in range(7)]
        grid = federation(clients, STATE, reverse=reverse)
        results.append(run_round(FedAvg(context=with_w()), grid, STATE))
    assert all(torch.equal(results[0][n], results[1][n]) for n in STATE)


def test_the_model_of_a_width_is_made_when_the_wider_clients_have_been_asked():
    rounded = []

    def round_calibrated(state, bits):
        rounded.append(bits)
        return to_bits(state, bits)

    context = with_w(broadcast="calibrated", round_calibrated=round_calibrated)
    strategy = FedAvg(context=context)
    grid = federation(
        [good(0, 4, bits=4), good(1, 4), good(2, 4, bits=8), good(3, 4, bits=8)], STATE
    )
    arrays = to_arrays(STATE)
    batches = strategy.training_messages(1, arrays, grid)
    asked = [([m.metadata.dst_node_id for m in batch()], list(rounded)) for batch in batches]
    assert asked == [([101], []), ([102, 103], [8]), ([100], [8, 4])]
    assert strategy.round_log.sampled == [0, 1, 2, 3]


def test_a_strategy_with_a_configure_train_of_its_own_is_refused():
    """As the server would not call it."""
    with pytest.raises(TypeError, match="override training_messages"):

        class Own(FedAvg):
            def configure_train(self, server_round, arrays, config, grid):
                return []


def test_replies_that_come_before_all_messages_are_made_are_counted_too():
    strategy = FedAvg(context=with_w())
    grid = federation([good(i, 3, bits=bits) for i, bits in enumerate((4, 8, 32))], STATE)
    arrays = to_arrays(STATE)
    batches = strategy.training_messages(1, arrays, grid)
    replies = (reply for batch in batches for reply in grid.send_and_receive(batch()))
    strategy.aggregate_train(1, replies)
    assert strategy.round_log.aggregated == [0, 1, 2]
    assert strategy.round_log.failed == {}


def test_bytes_are_counted_per_width_as_sent():
    clients = [good(0, bits=4), good(1, bits=4), good(2, bits=32)]
    strategy = FedAvg(context=with_w())
    run_round(strategy, federation(clients, STATE), STATE)
    # Header 20; table: 2 + 1 + 2 + 4 * ndim for "w" and "b" = 13 + 9 = 22. 32 bits: 8 floats = 32.
    # 4 bits: 2 scales = 8, 6 codes = 3, 2 floats = 8.
    assert strategy.round_log.uplink_bytes == {4: 2 * (20 + 22 + 19), 32: 20 + 22 + 32}
    assert strategy.round_log.downlink_bytes == {4: 2 * (20 + 22 + 32), 32: 20 + 22 + 32}


def declared(partition, of=10):
    return Declaration(partition, of, 32, 10, "")


def test_sampling_depends_on_partition_and_seed_not_on_node_ids():
    one = {1000 + p: declared(p) for p in range(10)}
    other = {9999 - 7 * p: declared(p) for p in range(10)}
    for server_round in range(1, 6):
        first = sample_nodes(one, 0.3, 5, server_round)
        second = sample_nodes(other, 0.3, 5, server_round)
        partitions = [d.partition_id for d in first.values()]
        assert partitions == [d.partition_id for d in second.values()]
        assert len(set(partitions)) == 3
    rounds = [tuple(sample_nodes(one, 0.3, 5, r)) for r in range(1, 9)]
    assert len(set(rounds)) > 1
    assert rounds != [tuple(sample_nodes(one, 0.3, 6, r)) for r in range(1, 9)]


def test_at_least_one_node_is_sampled():
    assert len(sample_nodes({7: declared(0)}, 0.01, 0, 1)) == 1


def test_nodes_are_asked_once():
    clients = [good(i, 2) for i in range(2)]
    grid = federation(clients, STATE)
    strategy = FedAvg(context=with_w())
    for server_round in (1, 2, 3):
        run_round(strategy, grid, STATE, server_round)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert kinds.count("query") == 2
    assert kinds.count("train") == 6
    assert strategy.nodes.widths() == {32: 2}


def refusing(partition, of, reason="node-config bits: 7.5 is not a bit-width"):
    client = good(partition, of)
    client.declaration = Declaration(partition, of, 0, 0, reason)
    return client


def test_a_refused_node_is_left_out_and_the_others_continue():
    grid = federation([good(0), refusing(1, 3), good(2)], STATE)
    strategy = FedAvg(context=with_w())
    run_round(strategy, grid, STATE)
    assert strategy.round_log.sampled == [0, 2]


def test_if_every_node_is_refused_the_run_ends_with_the_reason():
    grid = federation([refusing(0, 2), refusing(1, 2)], STATE)
    with pytest.raises(FederationError, match=r"7\.5 is not a bit-width"):
        run_round(FedAvg(context=with_w()), grid, STATE)


@pytest.mark.parametrize(("bits", "reason"), [(17, "17 bits"), (1, "1 bits"), (64, "64 bits")])
def test_a_width_that_does_not_exist_is_refused_by_the_server_too(bits, reason):
    lying = good(0, 1)
    lying.declaration = Declaration(0, 1, bits, 10, "")
    with pytest.raises(FederationError, match=reason):
        run_round(
            FedAvg(context=with_w(node_wait=1.0)),
            federation([lying], STATE),
            STATE,
        )


def test_too_few_nodes_end_the_run_after_the_wait():
    with pytest.raises(FederationError, match="0 nodes can take part, min-nodes is 1"):
        run_round(
            FedAvg(context=with_w(node_wait=0.3)),
            InProcessGrid({}),
            STATE,
        )


def test_a_huge_weight_is_rejected_and_does_not_spoil_the_model():
    """Finite itself, it would overflow in the sum over clients."""
    huge = ScriptedClient(1, 3, 32, constant(3e38))
    strategy = FedAvg(context=with_w())
    new = run_round(strategy, federation([good(0), huge, good(2)], STATE), STATE)
    assert torch.equal(new["w"], torch.full((2, 3), 2.0))
    assert "exceeds" in strategy.round_log.rejected[1]


def test_a_combined_model_that_is_not_finite_is_never_sent():
    class Broken(FedAvg):
        def combine(self, server_round, start, updates):
            return {n: t / 0 for n, t in super().combine(server_round, start, updates).items()}

    assert run_round(Broken(), federation([good(0, 1)], STATE), STATE) is None


def test_a_variance_never_falls_below_zero():
    state = {"bn.running_var": torch.tensor([0.1, 2.0])}

    class Overshooting(FedAvg):
        def combine(self, server_round, start, updates):
            list(updates)
            return {n: t - 1 for n, t in start.items()}

    client = ScriptedClient(0, 1, 32, lambda s: s)
    new = run_round(Overshooting(), federation([client], state), state)
    assert new["bn.running_var"].tolist() == [0.0, 1.0]


def test_a_silent_node_delays_the_first_round_only():
    silent = good(1, 3)
    answering = federation([good(0, 3), silent, good(2, 3)], STATE)
    answering.nodes[101] = lambda message: None
    strategy = FedAvg(context=with_w(node_wait=0.5))
    for server_round in (1, 2, 3):
        run_round(strategy, answering, STATE, server_round)
        assert strategy.round_log.sampled == [0, 2]
    asked = [m.metadata.dst_node_id for m in answering.sent if m.metadata.message_type == "query"]
    assert asked.count(101) == 1


class SlowGrid(LateGrid):
    """From its third node on, nothing is there at the first look."""

    def has_answered(self, node_id):
        return node_id <= 101 or self.looks > 1


def test_refused_nodes_that_answer_first_do_not_end_the_run():
    """Two that are refused, for both of two partitions, and then the two good ones."""
    clients = [good(i, 2) for i in (0, 1, 0, 1)]
    for client in clients[:2]:
        partition = client.declaration.partition_id
        client.declaration = Declaration(partition, 2, 0, 0, "no width")
    grid = SlowGrid(federation(clients, STATE).nodes)
    strategy = FedAvg(context=with_w())
    run_round(strategy, grid, STATE)
    assert strategy.round_log.aggregated == [0, 1]


def test_a_query_that_failed_once_is_asked_again():
    client = good(1, 2)
    failures = [1]

    def flaky(message):
        if message.metadata.message_type == "query" and failures:
            failures.pop()
            return Message(Error(code=8, reason="it died"), reply_to=message)
        return client(message)

    grid = federation([good(0, 2), client], STATE)
    grid.nodes[101] = flaky
    strategy = FedAvg(context=with_w())
    run_round(strategy, grid, STATE)
    assert strategy.round_log.sampled == [0, 1]


def test_a_partition_belongs_to_its_first_node_until_that_is_gone():
    first, second = good(0, 2), good(0, 2, value=9.0, bits=2)
    other = good(1, 2)
    grid = federation([first, other], STATE)
    strategy = FedAvg(context=with_w())
    run_round(strategy, grid, STATE, 1)
    second.spec = first.spec
    grid.nodes[999] = second
    run_round(strategy, grid, STATE, 2)
    assert strategy.nodes.widths() == {32: 2}
    assert (len(first.instructions), len(second.instructions)) == (2, 0)
    # The holder goes, as the old connection of a device that died and came back: the node that
    # waited takes the place, and one that comes now does not.
    del grid.nodes[100]
    third = good(0, 2, value=4.0)
    third.spec = first.spec
    grid.nodes[1000] = third
    new = run_round(strategy, grid, STATE, 3)
    assert strategy.nodes.widths() == {2: 1, 32: 1}
    assert torch.equal(new["b"], torch.full((2,), 5.5))
    assert third.instructions == []


@pytest.mark.parametrize(
    ("declaration", "reason"),
    [
        (Declaration(0, 1, 32, 10**10, ""), "declares 10000000000 examples"),
        (Declaration(0, 1, 32, 0, ""), "declares 0 examples"),
        (Declaration(5, 1, 32, 10, ""), "declares partition 5 of 1"),
    ],
)
def test_a_declaration_that_cannot_be_true_is_refused(declaration, reason):
    client = good(0, 1)
    client.declaration = declaration
    with pytest.raises(FederationError, match=reason):
        run_round(
            FedAvg(context=with_w(node_wait=0.5)),
            federation([client], STATE),
            STATE,
        )


def test_training_and_evaluation_sample_apart():
    present = {p: declared(p) for p in range(10)}
    train = [tuple(sample_nodes(present, 0.3, 0, r, 0)) for r in range(6)]
    evaluate = [tuple(sample_nodes(present, 0.3, 0, r, 1)) for r in range(6)]
    assert train != evaluate


def test_a_calibrated_broadcast_without_what_calibrates_is_one_line():
    strategy = FedAvg(context=with_w(broadcast="calibrated"))
    with pytest.raises(ValueError, match="broadcast: 'calibrated' needs round_calibrated"):
        run_round(strategy, federation([good(0, of=1, bits=4)], STATE), STATE)
