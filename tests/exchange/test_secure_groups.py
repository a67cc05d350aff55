"""Who sums with whom, and whether in codes or in fixed point."""

import pytest

from core.errors import FederationError
from exchange.protocol import Declaration, Instruction
from exchange.round_plan import RoundPlan
from exchange.secure_groups import SecureSettings, group_of
from quant import UpdateSpec

SPEC = UpdateSpec({"w": (2, 3), "b": (2,)}, {"w"})


def group(asked, widths=(4, 4, 4), training="qat"):
    """A group of devices that are asked these uplinks and widths."""
    plan = RoundPlan(spec=SPEC)
    clients = [Declaration(i, len(widths), bits, 10, "") for i, bits in enumerate(widths)]
    for client, (uplink, bits) in zip(clients, asked, strict=True):
        plan.ask(client, Instruction(1, uplink=uplink, uplink_bits=bits))
    settings = SecureSettings(0.66, 3, 20, training=training)
    return group_of(clients, plan, settings, lambda client: client.num_examples)


@pytest.mark.parametrize(
    ("asked", "training", "bits"),
    [
        ([("weights", 0)] * 3, "qat", 4),
        ([("weights", 2)] * 3, "integer", 2),
        ([("difference", 0)] * 3, "strict", 4),
        ([("difference", 0)] * 3, "qat", 32),
        ([("difference", 4)] * 3, "strict", 32),
        ([("difference", 3), ("difference", 5), ("difference", 0)], "qat", 32),
    ],
)
def test_codes_are_summed_where_all_have_one_grid(asked, training, bits):
    made = group(asked, training=training)
    assert made.code_bits == bits
    (codes, _), (floats, _) = made.parts
    assert (codes, floats) == ((0, 8) if bits == 32 else (6, 2))


def test_devices_of_several_widths_have_none():
    made = group([("weights", 0)] * 3, widths=(4, 8, 8))
    assert (made.code_bits, made.widths, made.bits, made.is_merged) == (32, [4, 8], 8, True)


def test_weights_of_several_widths_have_no_sum_of_codes():
    line = r"clients of 4 bits are asked for updates of \[4, 8\] bits; allowed: one width for all"
    with pytest.raises(FederationError, match=line):
        group([("weights", 4), ("weights", 8), ("weights", 4)])
