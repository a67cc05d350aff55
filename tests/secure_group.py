"""A group of devices and its server, message by message, for the tests of `privacy`."""

import numpy as np

from privacy import Complaints, Device, GroupAggregation

CONTEXT = b"run 7, round 3, width 4"


class Group:
    """All devices of one secure aggregation; `gone` says after which step a device is silent.

    0: it never sends anything; 1: only keys; 2: keys and shares; 3: also its word on the shares of
    others; 4: also its masked vector.
    """

    def __init__(self, numbers=(3, 5, 8, 13), threshold=3, widths=((5, 9),), gone=None, seed=0):
        self.numbers, self.threshold, self.widths = list(numbers), threshold, list(widths)
        self.gone, self.without = gone or {}, []
        rng = np.random.default_rng(seed)
        self.vectors = {}
        for number in self.numbers:
            parts = []
            for count, bits in self.widths:
                half, devices = 1 << (bits - 1), len(self.numbers)
                least, most = -(half // devices), (half - 1) // devices
                parts.append((rng.integers(least, most, count, endpoint=True), bits))
            self.vectors[number] = parts
        self.server = GroupAggregation(CONTEXT, self.numbers, threshold, self.widths)
        self.devices = {number: Device.begin(CONTEXT) for number in self.numbers}

    def at(self, step):
        return [n for n in self.numbers if self.gone.get(n, 9) > step]

    def keys(self):
        for number in self.at(0):
            self.server.take_keys(number, self.devices[number].public_keys().to_record())
        self.roster = self.server.roster()
        return self

    def make_shares(self):
        return {n: self.devices[n].share(n, self.roster, self.threshold) for n in self.at(1)}

    def shares(self):
        for number, shares in self.make_shares().items():
            self.server.take_shares(number, shares.to_record())
        return self

    def opened(self):
        return [(n, self.devices[n].receive(self.server.handed_to(n))) for n in self.at(2)]

    def receive(self):
        for number, unopened in self.opened():
            complaints = Complaints(frozenset(unopened))
            self.server.take_complaints(number, complaints.to_record())
        self.without = self.server.without()
        return self

    def make_masked(self):
        masking = [number for number in self.at(3) if number not in self.without]
        return {n: self.devices[n].mask(self.vectors[n], self.without) for n in masking}

    def masked(self):
        for number, payload in self.receive().make_masked().items():
            self.server.take_masked(number, payload)
        return self

    def make_revealed(self):
        asked = self.server.to_reveal()
        return {n: self.devices[n].reveal(*asked) for n in self.at(4) if n in asked[0]}

    def revealed(self):
        for number, revealed in self.make_revealed().items():
            self.server.take_revealed(number, revealed.to_record())
        return self

    def run(self):
        return self.keys().shares().masked().revealed()

    def sum_of(self, numbers):
        return [
            sum((self.vectors[n][part][0] for n in numbers), np.zeros(count, np.int64))
            for part, (count, _) in enumerate(self.widths)
        ]

    def assert_exact(self, without=()):
        total = self.server.total()
        out = {*without, *self.without}
        expected = self.sum_of([n for n in self.at(3) if n not in out])
        assert len(total) == len(expected)
        for found, right in zip(total, expected, strict=True):
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, right)
