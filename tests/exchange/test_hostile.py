"""What a hostile or broken client may send: it is rejected by name, and the round continues."""

import logging
import math
import struct
from dataclasses import replace

import pytest
import torch
from federation import ScriptedClient, federation, payload_record, report, run_round, with_w
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from measuring import peak_memory
from specs import to_bits
from xxhash import xxh3_64_intdigest

from client_app.tracking import effective_steps
from exchange.protocol import METRICS, REPORT, UPDATE
from quant import encode
from strategies import STRATEGIES, FedAvg, FedCOMGATE

STATE = {
    "w": torch.linspace(-1, 1, 24).reshape(4, 6),
    "b": torch.zeros(4),
    "bn.running_mean": torch.zeros(4),
    "bn.running_var": torch.ones(4),
}
# Of quant/codec/encode.py: the checksum stands 12 bytes in, the table begins after it.
CHECKSUM, TABLE, BITS = 12, 20, 5
TABLE_SIZE = struct.unpack_from("<I", encode(to_bits(STATE, 4)), 8)[0]
SCALES = TABLE + TABLE_SIZE
# Behind one scale for each of four channels: `b`, means and variances, four of each.
FLOATS = SCALES + 4 * 4
LAST_VARIANCE = FLOATS + 11 * 4


def moved(state, by=0.01):
    return {name: tensor + by for name, tensor in state.items()}


def honest(partition, of=3, bits=8, train=moved):
    return ScriptedClient(partition, of, bits, train)


class Hostile(ScriptedClient):
    """Declares 4 bits, trains as the others do, and alters the payload before it is sent."""

    def __init__(self, partition, of, alter):
        super().__init__(partition, of, 4, moved)
        self.alter = alter

    def __call__(self, message):
        reply = super().__call__(message)
        if UPDATE in reply.content:
            data = self.alter(reply.content[UPDATE][UPDATE].data)
            reply.content[UPDATE] = payload_record(with_checksum(data))
        return reply


def sends(factor, difference):
    """What was received, or a step away from it, so many times."""

    def train(state):
        values = {n: t * 0 + 0.01 for n, t in state.items()} if difference else moved(state)
        update = to_bits({n: t * factor for n, t in values.items()}, 8)
        return replace(update, content="difference") if difference else update

    return train


def with_checksum(data):
    """The payload with the checksum that fits it in round 1."""
    checksum = xxh3_64_intdigest(data[:CHECKSUM] + data[TABLE:], 1)
    return data[:CHECKSUM] + struct.pack("<Q", checksum) + data[TABLE:]


def at(position, value):
    return lambda data: data[:position] + value + data[position + len(value) :]


def scale(value):
    return at(SCALES, struct.pack("<f", value))


def last_variance(value):
    return at(LAST_VARIANCE, struct.pack("<f", value))


ALTERATIONS = {
    "NaN scale": (scale(float("nan")), "a scale is not finite"),
    "infinite scale": (scale(float("inf")), "a scale is not finite"),
    "negative scale": (scale(-1.0), "a scale is not positive"),
    "scale of zero": (scale(0.0), "a scale is not positive"),
    "scale beyond all networks": (scale(1e30), "a scale is so large"),
    "huge scale": (
        scale(1e6),
        "its parameters have a norm of 1.41e+07; norm-bound 10 allows",
    ),
    "NaN float": (last_variance(float("nan")), "not finite"),
    "huge float": (last_variance(1e20), "a value exceeds"),
    "huge statistic": (last_variance(1e5), "its statistics have a norm"),
    "negative variance": (last_variance(-1.0), "is a variance"),
    "another width in the header": (at(BITS, bytes([8])), "8 bits; the client declared 4"),
    "another width throughout": (
        lambda d: encode(to_bits(STATE, 8)),
        "bytes; this model takes",
    ),
    "other shape": (at(TABLE + 5, struct.pack("<II", 6, 4)), "the table of tensors"),
    "table of terabytes": (at(8, struct.pack("<I", 2**32 - 1)), "the table of tensors"),
    "tensor of terabytes": (at(TABLE + 5, struct.pack("<II", 2**32 - 1, 2**32 - 1)), "the table"),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_a_hostile_payload_is_rejected_by_name_and_the_round_continues(kind):
    alter, reason = ALTERATIONS[kind]
    strategy, without = (
        FedAvg(context=with_w()),
        FedAvg(context=with_w(node_wait=0.01)),
    )
    grid = federation([honest(0), Hostile(1, 3, alter), honest(2)], STATE)
    new = run_round(strategy, grid, STATE)
    assert list(strategy.round_log.rejected) == [1]
    assert reason in strategy.round_log.rejected[1]
    expected = run_round(without, federation([honest(0), honest(2)], STATE), STATE)
    assert all(torch.equal(new[name], tensor) for name, tensor in expected.items())


def test_the_log_names_the_node(caplog):
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        clients = [honest(0, 2), Hostile(1, 2, scale(float("nan")))]
        run_round(FedAvg(context=with_w()), federation(clients, STATE), STATE)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    line = "Round 1 continues without node 101 (partition 1): a scale is not finite"
    assert line in caplog.messages


def test_the_unaltered_payload_of_that_client_is_used():
    strategy = FedAvg(context=with_w())
    run_round(strategy, federation([honest(0, 2), Hostile(1, 2, lambda d: d)], STATE), STATE)
    assert strategy.round_log.aggregated == [0, 1]


@pytest.mark.parametrize(
    "reported",
    [
        {"loss": float("inf")},
        {"loss": -0.1},
        {"loss": 1.01e4},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"steps": -1},
        {"num_examples": 2**62},
        {"accuracy": float("nan")},
    ],
)
def test_a_report_that_cannot_be_true_is_rejected(reported):
    strategy = FedAvg(context=with_w())
    client = honest(1, 2)
    client.reported = reported
    run_round(strategy, federation([honest(0, 2), client], STATE), STATE)
    assert strategy.round_log.aggregated == [0]
    assert "it reports" in strategy.round_log.rejected[1]


@pytest.mark.parametrize(
    ("loss", "used"), [(-5.0, True), (1e9, True), (float("nan"), False), (float("inf"), False)]
)
def test_a_loss_of_another_kind_is_any_finite_number(loss, used):
    """As a negative log-likelihood of a density is."""
    strategy = FedAvg(context=with_w(loss_range=(-math.inf, math.inf)))
    client = honest(1, 2)
    client.reported = {"loss": loss}
    run_round(strategy, federation([honest(0, 2), client], STATE), STATE)
    assert strategy.round_log.aggregated == ([0, 1] if used else [0])


# All metrics of an evaluation, the first of which is the report's accuracy of 0.5.
NAMES, VALUES = ["accuracy", "f1"], [0.5, 0.25]
TOO_MANY = [f"m{i}" for i in range(65)]


def evaluate_with(records, **given):
    """Evaluate on nodes 0, 1, ... that send these; the strategy, and what it made of them."""
    strategy = FedAvg(context=with_w(fraction_evaluate=1.0, **given))
    grid = federation([honest(i, len(records)) for i in range(len(records))], STATE)

    def sending(client, record):
        def answer(message):
            reply = client(message)
            if message.metadata.message_type == "evaluate" and record is not None:
                reply.content[METRICS] = record
            return reply

        return answer

    for place, record in enumerate(records):
        grid.nodes[100 + place] = sending(grid.nodes[100 + place], record)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    messages = strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)
    found = strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    return strategy, dict(found)


def sent(names, values):
    return ConfigRecord({"names": names, "values": values})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (sent(NAMES, [0.5, math.inf]), "it reports inf of 'f1'; allowed: finite numbers"),
        (sent(NAMES, [0.5, -1.1e100]), "it reports -1.1e+100 of 'f1'"),
        (sent(NAMES, [0.6, 0.25]), "it reports 0.6 of 'accuracy', and 0.5; allowed: the same"),
        (sent(NAMES, [math.nan, 0.25]), "it reports nan of 'accuracy', and 0.5"),
        (sent(NAMES, [0.5]), "it reports 1 metrics under 2 names; allowed: 1 to 64, each once"),
        (sent(["f1", "f1"], VALUES), "it reports 2 metrics under 1 names"),
        (sent([], []), "it reports 0 metrics under 0 names"),
        (sent(TOO_MANY, [0.5] * 65), "it reports 65 metrics under 65 names; allowed: 1 to 64"),
        (sent(["accuracy", "x" * 101], VALUES), "it reports a metric 'xxxxxxxx"),
        (sent(["accuracy", "f1\n"], VALUES), "it reports a metric 'f1"),
        (sent(["accuracy", ""], VALUES), "it reports a metric ''; allowed: printable names"),
        (sent(NAMES, [1, 2]), "its metrics are not all floats"),
        (sent(NAMES, ["0.5", "0.25"]), "its metrics are not all floats"),
        (sent([1, 2], VALUES), "it reports a metric '1'"),
        (sent("ab", VALUES), "its metrics are not two lists"),
        (ConfigRecord({"names": NAMES}), "its metrics are not two lists"),
        (ConfigRecord({"names": NAMES, "values": VALUES, "x": 1}), "its metrics are not two lists"),
        (MetricRecord({"f1": 0.25}), "its metrics are not two lists"),
    ],
)
def test_metrics_that_cannot_be_true_are_rejected(record, reason):
    strategy, found = evaluate_with([sent(NAMES, VALUES), record, sent(NAMES, [0.5, 0.75])])
    assert strategy.evaluate_log.rejected.keys() == {1}
    assert strategy.evaluate_log.rejected[1].startswith(reason)
    assert found["f1/mean-8"] == 0.5


def test_all_metrics_are_shown_with_their_spread():
    """0.25 and 0.75: a mean of 0.5, a standard deviation of the square root of 0.125."""
    _, found = evaluate_with(
        [sent(NAMES, VALUES), sent(NAMES, [0.5, math.nan]), sent(NAMES, [0.5, 0.75])]
    )
    for width in ("8", "average"):
        assert found[f"f1/mean-{width}"] == 0.5
        assert found[f"f1/spread-{width}"] == pytest.approx(math.sqrt(0.125))
        assert (found[f"f1/least-{width}"], found[f"f1/most-{width}"]) == (0.25, 0.75)
        assert found[f"accuracy/mean-{width}"] == found[f"accuracy-{width}"] == 0.5


def test_a_name_that_few_clients_have_is_not_recorded():
    """One that makes up names would fill the record."""
    made_up = sent(["accuracy", "f1", "evil"], [0.5, 0.5, 0.5])
    _, found = evaluate_with([sent(NAMES, VALUES), made_up, None])
    assert "f1/mean-8" in found
    assert not [key for key in found if "evil" in key]


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "local"])
def test_one_client_cannot_blow_up_the_model(name):
    """Ten million times the weights: finite, and within what a payload may hold."""
    kind = STRATEGIES[name].named("FedAvgM")
    difference = "com" in name or "paq" in name

    usual, huge = sends(1, difference), sends(1e7, difference)
    clients = [honest(0, train=usual), honest(1, train=huge), honest(2, train=usual)]
    strategy = kind(context=with_w())
    new = run_round(strategy, federation(clients, STATE), STATE)
    assert list(strategy.round_log.rejected) == [1]
    assert max(float(t.abs().max()) for t in new.values()) < 1.1
    loose = kind(context=with_w(norm_bound=0))
    ruined = run_round(loose, federation(clients, STATE), STATE)
    assert max(float(t.abs().max()) for t in ruined.values()) > 1e3


@pytest.mark.parametrize("broadcast", ["float32", "calibrated"])
def test_a_difference_that_ends_below_a_variance_of_zero_is_rejected(broadcast):
    """Where the start is as it was sent: to the 8-bit clients, rounded with a variance of 0.5."""

    def moves_variance(by, bits=8):
        moved = {n: t * 0 + (by if n.endswith("var") else 0.01) for n, t in STATE.items()}
        return replace(to_bits(moved, bits), content="difference")

    def rounded(state, bits):
        return to_bits(state | {"bn.running_var": torch.full((4,), 0.5)}, bits)

    lowest = -1.0 if broadcast == "float32" else -0.5
    clients = [honest(0), honest(1), honest(2, bits=32)]
    clients[0].train = lambda state: moves_variance(lowest)
    clients[1].train = lambda state: moves_variance(lowest - 1e-6)
    clients[2].train = lambda state: moves_variance(-1.0, 32)
    strategy = STRATEGIES["fedcom"](context=with_w(broadcast=broadcast, round_calibrated=rounded))
    run_round(strategy, federation(clients, STATE), STATE)
    assert strategy.round_log.aggregated == [0, 2]
    reason = "bn.running_var is a variance and would become negative"
    assert strategy.round_log.rejected == {1: reason}


@pytest.mark.parametrize("name", ["fedavg", "fedcom"])
def test_a_client_that_comes_alone_cannot_blow_up_the_model(name):
    """Its update would be the next model, whatever its size."""
    clients = [honest(0, 2, train=sends(1e7, name == "fedcom")), honest(1, 2)]
    strategy, grid = STRATEGIES[name](context=with_w()), federation(clients, STATE)
    grid.nodes[101] = lambda m: clients[1](m) if m.metadata.message_type == "query" else None
    assert run_round(strategy, grid, STATE) is None
    assert "norm-bound 10 allows" in strategy.round_log.rejected[0]


@pytest.mark.parametrize("name", ["fedavg", "fedcom"])
@pytest.mark.parametrize("start", [STATE, {n: t * 0 for n, t in STATE.items()}])
def test_an_honest_client_that_comes_alone_is_used_from_the_first_round(name, start):
    """Also on a model of zeros."""
    client = honest(0, 1, train=sends(1, name == "fedcom"))
    strategy = STRATEGIES[name](context=with_w())
    run_round(strategy, federation([client], start), start)
    assert strategy.round_log.aggregated == [0]


def test_a_reply_that_comes_twice_counts_once():
    strategy = FedAvg(context=with_w())
    grid = federation([honest(0, 2), honest(1, 2)], STATE)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    strategy.aggregate_train(1, [replies[0], replies[0], replies[1], replies[0]])
    assert strategy.round_log.aggregated == [0, 1]
    assert strategy.round_log.left_out == {}


@pytest.mark.parametrize("kept", ["reply", "payload"])
def test_what_was_sent_in_one_round_is_refused_in_the_next(kept):
    """A client that answers with the content of its first reply, or with its payload alone."""
    grid = federation([honest(0, 2), honest(1, 2)], STATE)
    strategy, client, first = FedAvg(context=with_w()), grid.nodes[101], []

    def replaying(message):
        reply = client(message)
        if message.metadata.message_type == "train":
            first.append(reply.content)
            if kept == "reply":
                return Message(first[0], reply_to=message)
            reply.content[UPDATE] = first[0][UPDATE]
        return reply

    grid.nodes[101] = replaying
    run_round(strategy, grid, STATE, 1)
    assert strategy.round_log.aggregated == [0, 1]
    reasons = {
        "reply": "it reports on round 1; this is round {}",
        "payload": "checksum does not match: the payload was altered, or is of another round",
    }
    for server_round in (2, 3):
        run_round(strategy, grid, STATE, server_round)
        assert strategy.round_log.aggregated == [0]
        assert strategy.round_log.rejected == {1: reasons[kept].format(server_round)}


def test_an_evaluation_of_another_round_is_rejected():
    strategy = FedAvg(context=with_w(fraction_evaluate=1.0))
    clients = [honest(0, 2), honest(1, 2)]
    clients[1].reported = {"server_round": 1}
    grid = federation(clients, STATE)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    for server_round in (1, 2):
        messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
        strategy.aggregate_evaluate(server_round, grid.send_and_receive(messages))
    assert strategy.evaluate_log.rejected == {1: "it reports on round 1; this is round 2"}


def test_a_reply_to_another_clients_message_leaves_its_own_unanswered():
    """Node 101 sends again what answers node 100's message; Flower's SuperLink refuses that too."""
    strategy = FedAvg(context=with_w())
    grid = federation([honest(0, 2), honest(1, 2)], STATE)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    first, _ = grid.send_and_receive(messages)
    again = Message(first.content, reply_to=messages[0])
    strategy.aggregate_train(1, [first, again])
    assert strategy.round_log.aggregated == [0]
    assert strategy.round_log.failed == {1: "no reply in time"}


@pytest.mark.parametrize("size", [None, 1_000_000])
def test_memory_stays_bounded_however_much_comes(size):
    """200 replies of up to 8 MB, made as they are read: what is unusable is not kept."""
    clients = [honest(i, 200) for i in range(200)]
    strategy = FedAvg(context=with_w())
    grid = federation(clients, STATE)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in STATE.items()})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    grid.push_messages(messages)

    def replies():
        for message in messages:
            content = RecordDict({REPORT: report(10)})
            content[UPDATE] = payload_record(bytes(size or 8_000_000))
            if size:
                # A payload that is right, beside much that was not asked for.
                content[UPDATE] = payload_record(encode(to_bits(STATE, 8), stamp=1))
                content["more"] = ArrayRecord({"x": Array("uint8", (size,), "own", bytes(size))})
            yield Message(content, reply_to=message)

    peak = peak_memory(lambda: strategy.aggregate_train(1, replies()))
    assert len(strategy.round_log.aggregated) == (200 if size else 0)
    assert len(strategy.round_log.rejected) == (0 if size else 200)
    assert peak < 30_000_000


def test_an_array_that_claims_terabytes_is_never_made():
    """The shape that Flower carries beside the bytes is not read."""

    def claim(message):
        record = ArrayRecord({UPDATE: Array("float64", (2**20, 2**30), "prowd.update/9", b"PRWD")})
        return Message(RecordDict({UPDATE: record, REPORT: report(10)}), reply_to=message)

    strategy = FedAvg(context=with_w())
    grid = federation([honest(0, 2), honest(1, 2)], STATE)
    client = grid.nodes[101]
    grid.nodes[101] = lambda m: claim(m) if m.metadata.message_type == "train" else client(m)
    run_round(strategy, grid, STATE)
    assert strategy.round_log.aggregated == [0]
    assert "payload of 4 bytes is shorter" in strategy.round_log.rejected[1]


@pytest.mark.parametrize(("steps", "used"), [(6, True), (7, False), (2**62, False)])
def test_more_steps_than_the_examples_allow_are_rejected(steps, used):
    """FedCOMGATE divides every client's correction by the largest number of steps."""
    clients = [honest(i, 2, train=sends(1, difference=True)) for i in range(2)]
    clients[0].reported = {"steps": 3}
    clients[1].reported = {"steps": steps}
    # 10 examples in batches of 4, twice: 3 steps each time.
    strategy = FedCOMGATE(context=with_w(local_epochs=2, batch_size=4))
    grid = federation(clients, STATE)
    run_round(strategy, grid, STATE, 1)
    assert strategy.round_log.aggregated == ([0, 1] if used else [0])
    if not used:
        reason = f"it reports {steps} steps; its examples allow 6"
        assert strategy.round_log.rejected == {1: reason}
    run_round(strategy, grid, STATE, 2)
    assert clients[0].instructions[1].tracking_steps == (6 if used else 0)


def test_a_number_of_steps_beyond_all_training_does_not_stop_the_others():
    """Where the number of epochs is not known, the report is accepted."""
    assert effective_steps(2**62, 0.9) == pytest.approx(10 * 2**62)
    assert effective_steps(3, 0.5) == pytest.approx(1 + 1.5 + 1.75)
    clients = [honest(i, 2, train=sends(1, difference=True)) for i in range(2)]
    clients[1].reported = {"steps": 2**62}
    strategy = FedCOMGATE(context=with_w())
    grid = federation(clients, STATE)
    for server_round in (1, 2):
        assert run_round(strategy, grid, STATE, server_round) is not None
    assert clients[0].instructions[1].tracking_steps == 2**62
