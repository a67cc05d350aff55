"""What is asked is what is sent: widths of the downlink, and what `start` is given for clients."""

from dataclasses import replace

import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w
from flwr.app import ConfigRecord
from specs import spec_of_state, to_bits

from core.errors import SettingsError
from exchange.protocol import INSTRUCTION, MODEL, Instruction
from exchange.states import to_arrays
from quant import decode
from strategies import FedAvg, FedCOMGATE, FlowerStrategy, Local

GENERATOR = torch.Generator().manual_seed(1)
STATE = {"w": torch.randn(3, 5, generator=GENERATOR), "b": torch.randn(3, generator=GENERATOR)}
WIDTHS = (4, 8, 32)


def half(state, bits):
    """Rounded on half the scale: what calibration gives differs from rounding to nearest."""
    scales = {"w": to_bits(state, bits).quantized["w"].scale / 2}
    return to_bits(state, bits, scales)


def asking(base=FedAvg, **asked):
    class Asking(base):
        def instruct(self, server_round, client):
            return replace(super().instruct(server_round, client), **asked)

    return Asking


def nodes():
    clients = [ScriptedClient(i, 3, bits, lambda state: state) for i, bits in enumerate(WIDTHS)]
    return clients, federation(clients, STATE)


def sent(grid, kind="train"):
    """Payload and width that each client was sent, in the order of their widths."""
    found = {}
    for message in grid.sent:
        if message.metadata.message_type == kind:
            instruction = Instruction.from_record(message.content[INSTRUCTION])
            data = message.content[MODEL][MODEL].data if MODEL in message.content else None
            found[message.metadata.dst_node_id] = (data, instruction.downlink_bits)
    return [found[node_id] for node_id in sorted(found)]


@pytest.mark.parametrize("broadcast", ["float32", "nearest", "calibrated"])
@pytest.mark.parametrize("asked", [2, 4, 8, 16, 32])
def test_a_model_has_the_width_that_was_asked_for(asked, broadcast):
    """Whatever the client's own; the codes are those of that width."""
    _, grid = nodes()
    strategy = asking(downlink_bits=asked)(
        context=with_w(broadcast=broadcast, round_calibrated=half)
    )
    new = run_round(strategy, grid, STATE)
    assert strategy.round_log.aggregated == [0, 1, 2]
    assert new is not None
    rounded = half if broadcast == "calibrated" and asked != 32 else to_bits
    expected = rounded(STATE, asked).dequantize()
    for data, labelled in sent(grid):
        assert labelled == asked == data[5]
        model = decode(data, spec_of_state(STATE), asked).dequantize()
        assert all(torch.equal(model[name], expected[name]) for name in STATE)


@pytest.mark.parametrize("broadcast", ["float32", "nearest"])
def test_by_default_broadcast_says_the_width(broadcast):
    _, grid = nodes()
    run_round(FedAvg(context=with_w(broadcast=broadcast)), grid, STATE)
    widths = [32, 32, 32] if broadcast == "float32" else [4, 8, 32]
    assert [labelled for _, labelled in sent(grid)] == widths


def test_a_fixed_point_step_is_for_a_clients_own_width():
    """At another, the step would not span the weights."""
    _, grid = nodes()
    context = with_w(broadcast="nearest", low_bit_training="strict", weight_step=0.125)
    run_round(asking(downlink_bits=8)(context=context), grid, STATE)
    updates = [decode(data, spec_of_state(STATE), 8) for data, _ in sent(grid)]
    fitted = to_bits(STATE, 8).quantized["w"].scale
    assert torch.equal(updates[0].quantized["w"].scale, fitted)
    assert torch.equal(updates[1].quantized["w"].scale, torch.full((3,), 0.125))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"downlink_bits": 17}, "downlink-bits: Asking.instruct asks for 17; allowed: 0, 2 to 16"),
        ({"downlink_bits": 1}, "downlink-bits: Asking.instruct asks for 1; allowed"),
        ({"downlink_bits": 8.0}, "downlink-bits: Asking.instruct asks for 8.0; allowed"),
        ({"downlink_bits": True}, "downlink-bits: Asking.instruct asks for True; allowed"),
        ({"uplink_bits": 64}, "uplink-bits: Asking.instruct asks for 64; allowed"),
        ({"uplink": "gradient"}, "uplink: Asking.instruct asks for 'gradient'; allowed: weights"),
    ],
)
def test_a_width_that_does_not_exist_is_refused_by_name(asked, words):
    with pytest.raises(SettingsError) as error:
        run_round(asking(**asked)(context=with_w()), nodes()[1], STATE)
    assert str(error.value).startswith(words)


def test_an_instruction_that_is_none_is_refused():
    class Silent(FedAvg):
        def instruct(self, server_round, client):
            return None

    with pytest.raises(SettingsError, match=r"Silent\.instruct returns no Instruction: None"):
        run_round(Silent(context=with_w()), nodes()[1], STATE)


def test_tracking_needs_the_exact_model():
    """Also where a class over FedCOMGATE asks for codes itself."""
    strategy = asking(FedCOMGATE, downlink_bits=8)(context=with_w())
    with pytest.raises(SettingsError, match="asks for 8 beside tracking, whose corrections need"):
        run_round(strategy, nodes()[1], STATE)


def test_a_model_for_of_another_width_is_not_sent_under_a_wrong_one():
    class Wrong(FedAvg):
        def model_for(self, bits, state):
            return to_bits(state, 4)

    with pytest.raises(SettingsError, match=r"Wrong\.model_for returns a model of 4 bits; a"):
        run_round(Wrong(context=with_w(broadcast="nearest")), nodes()[1], STATE)


@pytest.mark.parametrize(
    "make",
    [FedAvg, Local, FlowerStrategy.named("FedAvg")],
    ids=["own", "local", "flwr"],
)
def test_what_start_is_given_reaches_the_clients(make, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    _, grid = nodes()
    strategy = make(context=with_w(fraction_evaluate=1.0))
    given = {"train": ConfigRecord({"lr": 0.1}), "evaluate": ConfigRecord({"k": 5, "name": "x"})}
    strategy.start(
        grid,
        to_arrays(STATE),
        num_rounds=2,
        train_config=given["train"],
        evaluate_config=given["evaluate"],
    )
    for kind, config in given.items():
        got = [m.content["config"] for m in grid.sent if m.metadata.message_type == kind]
        assert len(got) == 6
        assert all(record == config and record is not config for record in got)
    assert given == {"train": {"lr": 0.1}, "evaluate": {"k": 5, "name": "x"}}


def test_nothing_that_start_was_not_given_is_sent():
    _, grid = nodes()
    FedAvg(context=with_w(fraction_evaluate=1.0)).start(grid, to_arrays(STATE), num_rounds=1)
    assert not any("config" in m.content for m in grid.sent)
