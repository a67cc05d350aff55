"""Forty thousand mutated payloads; `python -m tests.fuzz` runs a million."""

import numpy as np
import pytest
from fuzz import MOST_BYTES, MOST_GROWTH, check, fuzz, targets

import quant.codec.decode

COUNT = 40_000


def test_no_mutated_payload_does_anything_but_be_refused_or_be_sane():
    seen = fuzz(COUNT)
    assert seen["accepted"] + seen["rejected"] == COUNT
    # Enough gets through the checksum for the checks behind it to have been tried.
    assert seen["accepted"] > COUNT / 50
    assert seen["rejected"] > COUNT / 2
    assert 0 < seen["peak"] < MOST_BYTES
    assert seen["grown"] < MOST_GROWTH


def test_every_target_is_accepted_unmutated():
    assert all(check(target.data.tobytes(), target) for target in targets())


def unchecked_floats(values):
    pass


def unchecked_codes(data, bits, count, start=None):
    return np.resize(np.frombuffer(data, np.int8).astype(np.int16) * 300, count)


@pytest.mark.parametrize(
    ("function", "careless"),
    [
        ("_check_floats", unchecked_floats),
        ("unpack", unchecked_codes),
        ("read_codes", unchecked_codes),
    ],
)
def test_the_fuzz_finds_a_decoder_that_checks_less(monkeypatch, function, careless):
    monkeypatch.setattr(quant.codec.decode, function, careless)
    with pytest.raises(AssertionError, match="seed 0, payload"):
        fuzz(20_000)
