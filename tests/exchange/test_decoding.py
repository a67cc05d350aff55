"""Replies decoded in turn: in order, each by what it is, whoever of two threads unfolded it."""

import struct
import threading
import time

import pytest
import torch
from exchange.decoding import decode_in_turn
from federation import assert_same_update, report
from specs import to_bits
from xxhash import xxh3_64_intdigest

from exchange.protocol import Declaration, Instruction, Report
from exchange.replies import Packed
from exchange.round_plan import Asked
from quant import FlatUpdate, OpenedUpdate, UpdateSpec, decode, encode

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
    asked = Asked(start, SPEC)
    packed = []
    for partition, bits in enumerate(widths):
        client = Declaration(partition, len(widths), bits, 10, "")
        asked.clients[100 + partition] = client
        asked.instructions[partition] = Instruction(1, downlink_bits=bits, uplink=uplink)
        sent = asked.models[partition] = FlatUpdate.of(to_bits(start, bits))
        noise = state_of(1 + partition)
        trained = {name: tensor + 0.05 * noise[name] for name, tensor in start.items()}
        update = to_bits(trained, bits, sent.scales)
        payload = encode(update, coded=coded, start=sent, stamp=1)
        numbers = Report.from_record(report(10))
        packed.append(Packed(client, payload if uplink != "nothing" else b"", numbers))
    return asked, packed


def decoded(asked, packed):
    rejected = {}
    return list(decode_in_turn(asked, packed, rejected)), rejected


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 23])
def test_each_reply_comes_in_its_turn_with_what_it_holds(count, coded):
    asked, packed = replies_of([(2, 4, 8, 32, 5)[i % 5] for i in range(count)], coded)
    assert all((item.payload[CODING] > 0) is (coded and item.client.bits < 32) for item in packed)
    pairs, rejected = decoded(asked, packed)
    assert [item for item, _ in pairs] == packed
    assert not rejected
    for item, update in pairs:
        bits, sent = item.client.bits, asked.models[item.client.partition_id]
        assert_same_update(update, decode(item.payload, SPEC, bits, start=sent, stamp=1))


def test_the_order_given_is_kept_and_not_that_of_partitions():
    asked, packed = replies_of([4] * 11)
    packed.reverse()
    pairs, _ = decoded(asked, packed)
    assert [item.client.partition_id for item, _ in pairs] == list(range(10, -1, -1))


def test_who_was_asked_for_nothing_brings_an_empty_update():
    pairs, rejected = decoded(*replies_of([4, 8, 32], uplink="nothing"))
    assert not rejected
    assert [(len(u.quantized), len(u.floats)) for _, u in pairs] == [(0, 0)] * 3


def altered(item, alter):
    return Packed(item.client, alter(item.payload), item.report)


def restamped(item, asked, change):
    """A payload that opens, with something wrong behind the checksum."""
    data = change(bytearray(item.payload))
    checksum = xxh3_64_intdigest(bytes(data[:12] + data[20:]), 1)
    return Packed(
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
        "checksum": lambda item, asked: altered(item, lambda d: d[:-1] + bytes([d[-1] ^ 1])),
        "cannot be read": lambda item, asked: restamped(item, asked, spoil_codes),
        "a scale is not finite": lambda item, asked: restamped(item, asked, spoil_scale),
    }
    for reason, spoil in cases.items():
        asked, packed = replies_of([4] * 11)
        packed[bad] = spoil(packed[bad], asked)
        pairs, rejected = decoded(asked, packed)
        assert list(rejected) == [bad]
        assert reason in rejected[bad]
        good = [i for i in range(11) if i != bad]
        assert [item.client.partition_id for item, _ in pairs] == good


def test_two_threads_unfold(monkeypatch):
    """The other thread begins while the first updates are read, and what is left is shared."""
    seen = set()
    unfold = OpenedUpdate.unfold

    def noting(self):
        mine = threading.current_thread() is threading.main_thread()
        seen.add(mine)
        if mine:
            time.sleep(0.01)  # The other one comes to its turn, however busy the machine is.
        return unfold(self)

    monkeypatch.setattr(OpenedUpdate, "unfold", noting)
    pairs, _ = decoded(*replies_of([4] * 30))
    assert len(pairs) == 30
    assert seen == {True, False}


def test_no_more_than_two_batches_are_unfolded_ahead(monkeypatch):
    unfolded = []
    unfold = OpenedUpdate.unfold
    monkeypatch.setattr(OpenedUpdate, "unfold", lambda self: unfolded.append(self) or unfold(self))
    asked, packed = replies_of([4] * 40)
    for taken, _ in enumerate(decode_in_turn(asked, packed, {}), 1):
        assert len(unfolded) <= taken + 7


def test_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    updates = decode_in_turn(*replies_of([4] * 30), {})
    next(updates)
    updates.close()
    assert threading.active_count() == before


def test_what_is_no_fault_of_the_payload_is_raised(monkeypatch):
    def out_of_memory(self):
        raise MemoryError

    monkeypatch.setattr(OpenedUpdate, "unfold", out_of_memory)
    with pytest.raises(MemoryError):
        decoded(*replies_of([4] * 9))
