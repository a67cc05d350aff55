"""Replies decoded in order, each by what it is, whichever of two threads decompressed it."""

import struct
import threading
import time

import pytest
import torch
from federation import assert_same_update, report
from specs import to_bits
from xxhash import xxh3_64_intdigest

import quant.codec.decode
from exchange.protocol import Declaration, Instruction, Report
from exchange.replies import Reply, decode_in_order
from exchange.round_plan import RoundPlan
from quant import FlatUpdate, UpdateSpec, decode, encode

# Where the layout in quant/codec/encode.py says how the codes were coded.
CODING = 7
SPEC = UpdateSpec({"w": (16, 400), "b": (16,)}, {"w"})


def state_of(seed):
    generator = torch.Generator().manual_seed(seed)
    # Many small values: their codes are worth being coded.
    w = torch.randn(SPEC.shapes["w"], generator=generator) ** 3
    return {"w": w, "b": torch.randn(SPEC.shapes["b"], generator=generator)}


def replies_of(widths, coded=True, uplink="weights"):
    """One reply for each width, all of other values, coded from the start where they can be."""
    start = state_of(0)
    plan = RoundPlan(start, SPEC)
    replies = []
    for partition, bits in enumerate(widths):
        client = Declaration(partition, len(widths), bits, 10, "")
        plan.clients[100 + partition] = client
        plan.ask(client, Instruction(1, downlink_bits=bits, uplink=uplink))
        plan.sent(client, sent := FlatUpdate.of(to_bits(start, bits)))
        noise = state_of(1 + partition)
        trained = {name: tensor + 0.05 * noise[name] for name, tensor in start.items()}
        update = to_bits(trained, bits, sent.scales)
        payload = encode(update, coded=coded, start=sent, stamp=1)
        numbers = Report.from_record(report(10))
        replies.append(Reply(client, payload if uplink != "nothing" else b"", numbers))
    return plan, replies


def decoded(plan, replies):
    rejected = {}
    return list(decode_in_order(plan, replies, rejected)), rejected


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 23])
def test_each_reply_comes_in_its_turn_with_what_it_holds(count, coded):
    plan, replies = replies_of([(2, 4, 8, 32, 5)[i % 5] for i in range(count)], coded)
    assert all((item.payload[CODING] > 0) is (coded and item.client.bits < 32) for item in replies)
    found, rejected = decoded(plan, replies)
    assert [item.client for item in found] == [item.client for item in replies]
    assert not rejected
    for item, reply in zip(found, replies, strict=True):
        bits, sent = item.client.bits, plan.expected[item.client.partition_id].start
        assert_same_update(item.update, decode(reply.payload, SPEC, bits, start=sent, stamp=1))


def test_the_order_given_is_kept_and_not_that_of_partitions():
    plan, replies = replies_of([4] * 11)
    replies.reverse()
    found, _ = decoded(plan, replies)
    assert [item.client.partition_id for item in found] == list(range(10, -1, -1))


def test_who_was_plan_for_nothing_brings_an_empty_update():
    found, rejected = decoded(*replies_of([4, 8, 32], uplink="nothing"))
    assert not rejected
    assert [(len(i.update.quantized), len(i.update.floats)) for i in found] == [(0, 0)] * 3


def altered(item, alter):
    return Reply(item.client, alter(item.payload), item.report)


def restamped(item, plan, change):
    """A payload that opens, with something wrong behind the checksum."""
    data = change(bytearray(item.payload))
    checksum = xxh3_64_intdigest(bytes(data[:12] + data[20:]), 1)
    return Reply(
        item.client, bytes(data[:12] + struct.pack("<Q", checksum) + data[20:]), item.report
    )


def spoil_codes(data):
    data[-40:] = bytes(40)
    return data


def spoil_scale(data):
    table = int.from_bytes(data[8:12], "little")
    data[20 + table : 24 + table] = b"\0\0\x80\xff"  # -inf
    return data


@pytest.mark.parametrize("bad", [0, 3, 4, 6, 10])
def test_what_is_malformed_is_rejected_where_it_is_found_and_the_others_come(bad):
    cases = {
        "checksum": lambda item, plan: altered(item, lambda d: d[:-1] + bytes([d[-1] ^ 1])),
        "cannot be read": lambda item, plan: restamped(item, plan, spoil_codes),
        "a scale is not finite": lambda item, plan: restamped(item, plan, spoil_scale),
    }
    for reason, spoil in cases.items():
        plan, replies = replies_of([4] * 11)
        replies[bad] = spoil(replies[bad], plan)
        found, rejected = decoded(plan, replies)
        assert list(rejected) == [bad]
        assert reason in rejected[bad]
        good = [i for i in range(11) if i != bad]
        assert [item.client.partition_id for item in found] == good


def test_two_threads_decompress(monkeypatch):
    """The other thread begins while the first updates are read, and what is left is shared."""
    seen = set()
    decompress = quant.codec.decode.decompress

    def noting(*coded):
        mine = threading.current_thread() is threading.main_thread()
        seen.add(mine)
        if mine:
            time.sleep(0.01)  # The other one comes to its turn, however busy the machine is.
        return decompress(*coded)

    monkeypatch.setattr("quant.codec.decode.decompress", noting)
    found, _ = decoded(*replies_of([4] * 30))
    assert len(found) == 30
    assert seen == {True, False}


def test_no_more_than_two_batches_are_decompressed_ahead(monkeypatch):
    decompressed = []
    decompress = quant.codec.decode.decompress
    done = lambda *coded: decompressed.append(1) or decompress(*coded)  # noqa: E731
    monkeypatch.setattr("quant.codec.decode.decompress", done)
    plan, replies = replies_of([4] * 40)
    for taken, _ in enumerate(decode_in_order(plan, replies, {}), 1):
        assert len(decompressed) <= taken + 7


def test_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    updates = decode_in_order(*replies_of([4] * 30), {})
    next(updates)
    updates.close()
    assert threading.active_count() == before


def test_what_is_no_fault_of_the_payload_is_raised(monkeypatch):
    def out_of_memory(*coded):
        raise MemoryError

    monkeypatch.setattr("quant.codec.decode.decompress", out_of_memory)
    with pytest.raises(MemoryError):
        decoded(*replies_of([4] * 9))
