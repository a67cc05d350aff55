from dataclasses import FrozenInstanceError, fields

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from exchange.protocol import Declaration, Instruction, ProtocolError, Report

DECLARATION = Declaration(3, 10, 8, 143, "")
INSTRUCTION = Instruction(2, "difference", 4, 32, 0.01)
REPORT = Report(2, 143, 0.25, 0.9, 1.5)
RECORDS = [DECLARATION, INSTRUCTION, REPORT]


@pytest.mark.parametrize("record", RECORDS)
def test_round_trip_through_flowers_record(record):
    assert type(record).from_record(ConfigRecord(record.to_record())) == record


@given(
    st.integers(0, 2**31),
    st.floats(allow_nan=False),
    st.floats(0, 1),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_report_keeps_every_bit(num_examples, loss, accuracy, seconds):
    report = Report(7, num_examples, loss, accuracy, seconds)
    assert Report.from_record(ConfigRecord(report.to_record())) == report


def test_record_is_flat_and_plain():
    assert DECLARATION.to_record() == {
        "partition_id": 3,
        "num_partitions": 10,
        "bits": 8,
        "num_examples": 143,
        "refused": "",
    }


def test_instruction_defaults_ask_for_weights_at_the_clients_width_and_leave_the_downlink_open():
    assert Instruction(1).to_record() == {
        "server_round": 1,
        "uplink": "weights",
        "uplink_bits": 0,
        "downlink_bits": -1,  # as `broadcast` says
        "upload": "forward",
        "dither": 0,
        "number": 0,
        "proximal_mu": 0.0,
        "tracking_epoch": 0,
        "tracking_steps": 0,
        "server_learning_rate": 1.0,
        "coded": 0,
        "keep_in": "",
    }


@pytest.mark.parametrize("record", RECORDS)
def test_every_missing_field_is_refused_by_name(record):
    for field in fields(record):
        values = record.to_record()
        del values[field.name]
        with pytest.raises(ProtocolError) as caught:
            type(record).from_record(values)
        said = f"{type(record).__name__}: missing or unknown: {field.name}"
        assert str(caught.value) == said


@pytest.mark.parametrize("record", RECORDS)
def test_unknown_field_is_refused_by_name(record):
    with pytest.raises(ProtocolError, match="missing or unknown: extra"):
        type(record).from_record({**record.to_record(), "extra": 1})


@pytest.mark.parametrize(
    ("record", "field", "value", "kind"),
    [
        (DECLARATION, "bits", "8", "int"),
        (DECLARATION, "bits", 8.0, "int"),
        (DECLARATION, "bits", True, "int"),
        (DECLARATION, "bits", [8], "int"),
        (DECLARATION, "refused", b"no", "str"),
        (INSTRUCTION, "uplink", 1, "str"),
        (INSTRUCTION, "server_round", 1.0, "int"),
        (INSTRUCTION, "proximal_mu", "0.1", "float"),
        (INSTRUCTION, "proximal_mu", True, "float"),
        (REPORT, "loss", None, "float"),
        (REPORT, "num_examples", 1.5, "int"),
    ],
)
def test_wrong_type_is_refused_by_name_value_and_type(record, field, value, kind):
    with pytest.raises(ProtocolError) as caught:
        type(record).from_record({**record.to_record(), field: value})
    said = f"{type(record).__name__}: {field} is {value!r}; it must be {kind}"
    assert str(caught.value) == said


def test_whole_number_passes_for_a_float():
    assert Report.from_record({**REPORT.to_record(), "loss": 2}).loss == 2


@pytest.mark.parametrize("record", RECORDS)
def test_records_are_frozen(record):
    with pytest.raises(FrozenInstanceError):
        setattr(record, fields(record)[0].name, 5)
