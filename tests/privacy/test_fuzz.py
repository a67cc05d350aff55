"""Mutated messages: each is rejected with `MessageError`, or the sum is still exact.

The suite tries 100,000. More, from the project's root::

    PYTHONPATH=.:tests python -m tests.privacy.test_fuzz 1000000
"""

import pickle
import random
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from secure_group import Group

from privacy import (
    Complaints,
    Device,
    MessageError,
    Revealed,
    Shares,
    UnmaskingError,
    unpack_by_number,
)
from privacy.words import packed_size, to_signed, unpack

NUMBERS = (1, 2, 3, 2**64 - 1, 5)
WIDTHS = [(5, 9), (3, 27)]
EXTREMES = (b"", b"\0" * 8, b"\xff" * 8, b"\0" * 60, (2**255 - 19).to_bytes(32, "little"))
# Of those that are accepted, one in so many is followed to the sum.
FOLLOWED = 500


def mutated(data, rng):
    """Change some bytes, cut, repeat, insert or replace: never the same."""
    while True:
        new = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            start = rng.randrange(len(new) + 1)
            end = min(len(new), start + rng.choice((1, 2, 8, 16, 32, 68)))
            kind = rng.randrange(6)
            if kind < 2 and start < len(new):
                new[start] ^= 1 << rng.randrange(8)
            elif kind == 2:
                new[start:end] = rng.randbytes(end - start)
            elif kind == 3:
                del new[start:end]
            elif kind == 4:
                new[start:start] = new[start:end]
            else:
                new[start:end] = rng.choice(EXTREMES)
        if bytes(new) != data:
            return bytes(new)


def mutated_record(record, rng):
    """Change one value of a record, or swap, remove or retype it."""
    name, kind = rng.choice(sorted(record)), rng.randrange(40)
    if kind == 0:
        return {each: value for each, value in record.items() if each != name}
    if kind == 1:
        return {**record, name: rng.choice((None, 3, "x", [b""], 1.5))}
    if kind == 2 and len(record) > 1:
        return {**record, name: record[rng.choice(sorted(set(record) - {name}))]}
    return {**record, name: mutated(record[name], rng)}


class Target:
    """A group of which device 2 is hostile, and 5 sends no masked vector."""

    def __init__(self, seed):
        self.rng, self.found = random.Random(seed), Counter()
        self.group = group = Group(NUMBERS, 3, WIDTHS, gone={5: 3}, seed=seed)
        self.states = {0: self.snapshot()}
        for place, step in enumerate((group.keys, group.shares, group.masked), start=1):
            step()
            self.states[place] = self.snapshot()
        group.revealed()
        group.assert_exact()

    def snapshot(self):
        devices = {n: device.to_bytes() for n, device in self.group.devices.items()}
        return pickle.dumps(self.group.server), devices

    def restored(self, step):
        """Return the group as it was before a step, its server and devices new."""
        group = object.__new__(Group)
        group.__dict__.update(self.group.__dict__, server=pickle.loads(self.states[step][0]))
        group.gone = {5: 3}
        states = self.states[step][1]
        group.devices = {number: Device.from_bytes(state) for number, state in states.items()}
        return group

    def accepts(self, step, take, message):
        """Say whether the server, as it was at that step, takes a message of device 2."""
        server = pickle.loads(self.states[step][0])
        try:
            getattr(server, take)(2, message)
        except MessageError as raised:
            error = str(raised)
        else:
            self.found["accepted"] += 1
            return self.rng.randrange(FOLLOWED) == 0
        assert error.startswith("device 2: ")
        assert "\n" not in error
        assert set(server.left_out) | set(server.ignored) in ({2}, {2, 5})
        self.found["rejected"] += 1
        return False

    def keys(self):
        record = self.group.devices[2].public_keys().to_record()
        changed = mutated_record(record, self.rng)
        if self.accepts(0, "take_keys", changed):
            # Whatever keys it advertised, it cannot go on under them: the others do without it.
            group = self.restored(0)
            group.server.take_keys(2, changed)
            for number in (1, 3, 2**64 - 1, 5):
                group.server.take_keys(number, group.devices[number].public_keys().to_record())
            group.roster = group.server.roster()
            with pytest.raises(MessageError):
                group.devices[2].share(2, group.roster, 3)
            group.gone = {5: 3, 2: 1}
            group.shares().masked().revealed().assert_exact()

    def shares(self):
        record = mutated_record(self.made_shares, self.rng)
        if self.accepts(1, "take_shares", record):
            group = self.restored(1)
            for number, shares in group.make_shares().items():
                taken = record if number == 2 else shares.to_record()
                group.server.take_shares(number, taken)
            self.finish(group.masked())

    def complaints(self):
        record = mutated_record(self.made_complaints, self.rng)
        if self.accepts("opening", "take_complaints", record):
            group = self.restored(2)
            for number, unopened in group.opened():
                taken = Complaints(frozenset(unopened)).to_record()
                group.server.take_complaints(number, record if number == 2 else taken)
            group.without = group.server.without()
            for number, payload in group.make_masked().items():
                group.server.take_masked(number, payload)
            # It may say what it likes of one or two: nobody is out for that.
            assert group.without == []
            group.revealed().assert_exact()

    def masked(self):
        payload = mutated(self.made_masked, self.rng)
        if self.accepts("masking", "take_masked", payload):
            group = self.restored(3)
            changes, start = [], 0
            for count, bits in WIDTHS:
                end = start + packed_size(count, bits)
                new, old = (unpack(d[start:end], bits, count) for d in (payload, self.made_masked))
                changes.append((new - old, bits))
                start = end
            group.server._sum = [
                words + change
                for words, (change, _) in zip(group.server._sum, changes, strict=True)
            ]
            group.revealed()
            # It may say what it likes of its own: the sum moves by that, and nothing else.
            expected = group.sum_of(group.at(3))
            for found, right, (change, bits) in zip(
                group.server.total(), expected, changes, strict=True
            ):
                moved = to_signed(right.astype(change.dtype) + change, bits)
                np.testing.assert_array_equal(found, moved)

    def revealed(self):
        record = mutated_record(self.made_revealed, self.rng)
        if self.accepts("revealing", "take_revealed", record):
            group = self.restored(3)
            for number, revealed in group.make_revealed().items():
                taken = record if number == 2 else revealed.to_record()
                group.server.take_revealed(number, taken)
            group.assert_exact()

    def sealed(self):
        sender = self.rng.choice(sorted(self.made_sealed))
        sealed = {**self.made_sealed, sender: mutated(self.made_sealed[sender], self.rng)}
        device = Device.from_bytes(self.made_state)
        assert list(device.receive(sealed)) == [sender]
        self.found["rejected"] += 1

    def state(self):
        with pytest.raises(MessageError):
            Device.from_bytes(mutated(self.made_state, self.rng))
        self.found["rejected"] += 1

    def parsed(self):
        kind, record = self.rng.choice(self.made_records)
        try:
            message = kind.from_record(mutated_record(record, self.rng))
        except MessageError:
            self.found["rejected"] += 1
        else:
            assert kind.from_record(message.to_record()) == message
            self.found["accepted"] += 1

    def finish(self, group):
        for number, revealed in group.make_revealed().items():
            try:
                group.server.take_revealed(number, revealed.to_record())
            except MessageError:
                assert number == 2
        try:
            group.server.total()
        except UnmaskingError as error:
            # Digests and shares that do not match are the fault of the one that sent them.
            blamed = error.number
        else:
            group.assert_exact()
            return
        assert blamed == 2
        self.found["blamed"] += 1

    def prepare(self):
        group = self.restored(1)
        shares = group.devices[2].share(2, group.roster, 3)
        self.made_shares = shares.to_record()
        group = self.restored(2)
        self.made_state = group.devices[2].to_bytes()
        self.made_sealed = group.server.handed_to(2)
        self.made_complaints = Complaints(frozenset({1})).to_record()
        self.states["opening"] = pickle.dumps(group.server), {}
        group.receive()
        self.made_masked = group.devices[2].mask(group.vectors[2])
        self.states["masking"] = pickle.dumps(group.server), {}
        group = self.restored(3)
        asked = group.server.to_reveal()
        self.states["revealing"] = pickle.dumps(group.server), {}
        revealed = group.devices[2].reveal(*asked)
        self.made_revealed = revealed.to_record()
        self.made_records = [(Shares, self.made_shares), (Revealed, self.made_revealed)]
        self.made_records.append((Complaints, self.made_complaints))
        return self


# Out of 100: cheap ones more often.
SHARE = {"keys": 4, "shares": 8, "complaints": 8, "masked": 10, "revealed": 8, "sealed": 0.5}
SHARE |= {"state": 30, "parsed": 31.5}


def fuzz(kind, count, seed):
    target = Target(seed).prepare()
    for _ in range(count):
        getattr(target, kind)()
    return target.found


@pytest.mark.parametrize("kind", SHARE)
def test_mutated_messages_are_rejected_or_harmless(kind):
    count = int(SHARE[kind] * 1000)
    found = fuzz(kind, count, seed=zlib.crc32(kind.encode()))
    assert found["rejected"] + found["accepted"] == count
    assert found["rejected"] > count // 10


def test_random_bytes_are_entries_or_rejected():
    rng = random.Random(1)
    for _ in range(2000):
        try:
            values = unpack_by_number(rng.randbytes(rng.choice((0, 24, 25, 48))), 16)
        except MessageError:
            continue
        assert list(values) == sorted(values)


if __name__ == "__main__":
    for each in SHARE:
        print(each, dict(fuzz(each, int(int(sys.argv[1]) * SHARE[each] / 100), seed=None)))
