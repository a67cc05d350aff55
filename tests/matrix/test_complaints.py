"""Devices whose sealed shares do not open, or that say so of others, among real ClientApps."""

import pytest
from flwr.app import ConfigRecord, RecordDict
from matrix.cells import Cell
from matrix.running import run
from matrix.test_secure import PROWD, SECURE_RUN, model_of

from core.run_record import Round
from exchange.secure import OPEN, SECURE, SHARES
from privacy import Complaints, Shares

# Six of one width, of which four must be left.
CELL = Cell("fedavg", "nearest", "strict", (4,) * 6)
LIAR = 1
OTHERS = {0, 2, 3, 4, 5}


def lying(garbage=(), complaints=()):
    """Let a node seal garbage for some, and complain of some."""

    def on_grid(grid):
        whole = grid.nodes[50 + LIAR]

        def answer(message):
            reply, kind = whole(message), message.metadata.message_type
            if kind == SHARES and garbage:
                shares = Shares.from_record(reply.content[SECURE])
                sealed = {**shares.sealed, **{n: bytes(60) for n in garbage}}
                record = Shares(sealed, shares.digests).to_record()
                reply.content = RecordDict({SECURE: ConfigRecord(record)})
            if kind == OPEN and complaints:
                record = Complaints(frozenset(complaints)).to_record()
                reply.content = RecordDict({SECURE: ConfigRecord(record)})
            return reply

        grid.nodes[50 + LIAR] = answer

    return on_grid


@pytest.mark.parametrize(
    ("lies", "reason", "said"),
    [
        (
            {"garbage": OTHERS},
            "its shares do not open, as said by 0, 2, 3, 4, 5",
            {"1": [0, 2, 3, 4, 5]},
        ),
        ({"garbage": {0}}, "", {"1": [0]}),
        (
            {"complaints": OTHERS},
            "device 1: holds shares of 1 devices, as it says; allowed are 4 or more",
            {},
        ),
        ({"complaints": {0, 5}}, "", {"0": [1], "5": [1]}),
        (
            {"garbage": {0, 2}, "complaints": {0, 2}},
            "its shares do not open, as said by 0, 2",
            {"0": [1], "1": [0, 2], "2": [1]},
        ),
    ],
    ids=["garbage-to-all", "garbage-to-one", "complains-of-all", "complains-of-two", "both"],
)
def test_a_liar_costs_nobody_else_the_round(lies, reason, said, tmp_path, without_masks):
    settings = {**SECURE_RUN, "rounds": 2}
    masked = run(CELL, tmp_path / "masked", on_grid=lying(**lies), **settings)
    for entry in masked.entries:
        assert entry["left_out"] == ({str(LIAR): reason} if reason else {})
        assert entry["clients"]["aggregated"] == entry["secure"]["4"]["devices"] == 6 - bool(reason)
        assert Round.model_validate(entry).complaints == said
    without_masks()
    bare = run(CELL, tmp_path / "bare", on_grid=lying(**lies), **settings)
    assert model_of(masked) == model_of(bare)


def test_a_group_too_small_without_the_liar_is_left_out_by_name(tmp_path):
    settings = {**SECURE_RUN, "rounds": 1, "on_grid": lying(garbage={0, 2})}
    [entry] = run(PROWD, tmp_path / "run", **settings).entries
    small = "secure-min-group: 2 devices of 4 bits are left; allowed: 3 or more"
    named = "its shares do not open, as said by 0, 2"
    assert entry["left_out"] == {"0": small, "1": named, "2": small}
    assert entry["complaints"] == {"1": [0, 2]}
    assert list(entry["secure"]) == ["32"]
