"""The run record: what a run leaves behind, whatever happens to it."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.errors import SettingsError
from server_app.folder import locked
from server_app.record import RunRecord, open_record


def entry(server_round, average):
    return {
        "round": server_round,
        "accuracy": {"8": average - 0.1, "32": average + 0.1, "average": average},
        "loss": {"average": 1 - average},
        "uplink_bytes": {"8": 10, "32": 40},
        "downlink_bytes": {"8": 40, "32": 40},
        "seconds": {"round": 1.5},
        "clients": {"sampled": 2, "aggregated": 2, "rejected": 0, "failed": 0},
        "prowd": {"cosine-8": 0.25},
    }


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_run_leaves_config_rounds_summary_model_and_scalars(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_config({"seed": 3})
    for server_round, average in ((1, 0.5), (2, 0.75), (3, 0.625)):
        record.append_round(entry(server_round, average))
    record.write_model({"w": torch.arange(6.0).reshape(2, 3)})
    assert read(record.folder, "summary.json")["status"] == "running"
    record.write_summary("completed")

    assert read(record.folder, "config.json")["settings"] == {"seed": 3}
    assert (
        read(record.folder, "config.json")["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    rounds = [
        json.loads(line) for line in (record.folder / "rounds.jsonl").read_text().splitlines()
    ]
    assert [r["round"] for r in rounds] == [1, 2, 3]
    summary = read(record.folder, "summary.json")
    assert summary["status"] == "completed"
    assert summary["accuracy"]["final"]["average"] == 0.625
    assert summary["accuracy"]["best"]["average"] == 0.75
    # Three rounds of 10 + 40 up and 40 + 40 down.
    assert (summary["uplink_bytes"], summary["downlink_bytes"]) == (150, 240)
    loaded = load_file(record.folder / "model.safetensors")
    assert torch.equal(loaded["w"], torch.arange(6.0).reshape(2, 3))
    board = EventAccumulator(str(record.folder / "tensorboard")).Reload()
    assert [s.value for s in board.Scalars("accuracy/average")] == [0.5, 0.75, 0.625]
    assert [s.step for s in board.Scalars("prowd/cosine-8")] == [1, 2, 3]


def weights(server_round):
    counts = {"w": [1, 0, server_round, 2]}
    return {
        "reach": 4.0,
        "unit": {"w": 0.5},
        "high": 32,
        "counts": {"high": counts, "before": {"8": counts}, "after": {"8": counts}},
    }


def test_weights_have_a_file_of_their_own_and_histograms_in_tensorboard(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.append_round(entry(1, 0.5))
    record.append_round(entry(2, 0.5), weights(2))
    record.close()
    lines = (record.folder / "weights.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 2, **weights(2)}]
    assert "unit" not in (record.folder / "rounds.jsonl").read_text()
    board = EventAccumulator(str(record.folder / "tensorboard")).Reload()
    tags = ["weights/high/w", "weights/before/8/w", "weights/after/8/w"]
    assert board.Tags()["histograms"] == tags
    [shown] = board.Histograms("weights/before/8/w")
    value = shown.histogram_value
    # Bins of width 2 with their middles at -3, -1, 1, 3, of which 1, 0, 2, 2 weights.
    assert (shown.step, value.num, value.sum, value.sum_squares) == (2, 5, 5, 29)
    assert (value.bucket_limit, value.bucket) == ([-2, 0, 2, 4], [1, 0, 2, 2])


def test_a_resumed_record_holds_the_weights_of_every_round_once(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_config({})
    for server_round in (1, 2, 3):
        record.append_round(entry(server_round, 0.5), weights(server_round))
    record.close()
    with open(record.folder / "weights.jsonl", "a") as file:
        file.write('{"round": 4, "rea')
    record = RunRecord(record.folder, resumed_after=2)
    record.append_round(entry(3, 0.6), weights(30))
    record.close()
    lines = (record.folder / "weights.jsonl").read_text().splitlines()
    assert [json.loads(line)["counts"]["high"]["w"][2] for line in lines] == [1, 2, 30]


def test_rounds_without_a_client_are_counted_also_those_before_a_resume(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_config({})
    record.append_round({**entry(1, 0.5), "left_out": {"0": "no reply in time"}})
    record.append_round({**entry(2, 0.5), "left_out": {}})
    record.close()
    record = RunRecord(record.folder, resumed_after=2)
    record.append_round({**entry(3, 0.5), "left_out": {"0": "no reply in time", "1": "no power"}})
    assert record.short_rounds == 2
    record.close()


def test_a_failed_run_says_why(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_summary("failed", "batch-size: 0 is not allowed")
    summary = read(record.folder, "summary.json")
    assert (summary["status"], summary["rounds"]) == ("failed", 0)
    assert summary["reason"] == "batch-size: 0 is not allowed"


def test_no_run_is_overwritten(tmp_path):
    RunRecord(tmp_path / "run").write_summary("completed")
    with pytest.raises(SettingsError, match=r"run-name: .*exists already"):
        open_record(str(tmp_path), "run", "prowd", "digits")
    assert read(tmp_path / "run", "summary.json")["status"] == "completed"


def test_unnamed_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = {open_record(str(tmp_path), "", "prowd", "digits").folder for _ in range(4)}
    assert len(folders) == 4


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"output-dir: .*file"):
        open_record(str(tmp_path / "file"), "run", "prowd", "digits")


HELD = [
    ([1.0, float("nan")], [1.0, None]),
    ((float("-inf"), {"a": (np.float32("inf"),)}), [None, {"a": [None]}]),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.float16(0.5), 0.5),
    (np.array([[1.0, np.nan]]), [[1.0, None]]),
    (torch.tensor(2), 2),
    (torch.tensor(float("nan")), None),
    (torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True), [0.5, 1.0]),
    ("text\nof two lines", "text\nof two lines"),
    (None, None),
    ({}, {}),
    (10**300, 10**300),
    (1e300, 1e300),
]


@pytest.mark.parametrize(("own", "written"), HELD)
def test_what_a_strategy_reports_is_written_whatever_number_it_is(tmp_path, own, written):
    record = RunRecord(tmp_path / "run")
    record.append_round({**entry(1, 0.5), "prowd": {"x": own, "deep": {"y": [own]}}})
    record.close()
    [line] = (record.folder / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["prowd"] == {"x": written, "deep": {"y": [written]}}
    board = EventAccumulator(str(record.folder / "tensorboard")).Reload()
    assert "accuracy/average" in board.Tags()["scalars"]


ITSELF: dict = {}
ITSELF["x"] = ITSELF


@pytest.mark.parametrize(
    ("own", "where"),
    [
        ({"x": {1, 2}}, "strategy: my.module:Own/x is {1, 2}, a set"),
        ({"x": [0, {"y": b"z"}]}, "strategy: my.module:Own/x/1/y is b'z', a bytes"),
        ({"x": 1j}, "strategy: my.module:Own/x is 1j, a complex"),
        ({"x": object}, "strategy: my.module:Own/x is <class 'object'>, a type"),
        ({"x": 10**5000}, "strategy: my.module:Own/x is too large, a int"),
        ({4: 0.5}, "strategy: my.module:Own has the key 4"),
        ({"x": {("a", 1): 0.5}}, "strategy: my.module:Own/x has the key ('a', 1)"),
        (ITSELF, "strategy: my.module:Own/x holds itself"),
    ],
)
def test_what_no_file_can_hold_is_one_line_and_leaves_no_half_a_round(tmp_path, own, where):
    record = RunRecord(tmp_path / "run")
    with pytest.raises(SettingsError) as error:
        record.append_round({**entry(1, 0.5), "my.module:Own": own}, weights(1))
    record.close()
    assert str(error.value).startswith(where)
    assert "which JSON cannot" in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in record.folder.iterdir()] == ["summary.json"]


def test_a_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        pass
    assert f"prowd: {tmp_path} cannot be locked (No locks available): two processes" in caplog.text


def test_dropped_results_are_counted_also_those_before_a_resume(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_config({})
    record.append_round({**entry(1, 0.5), "dropped": "its model is not finite", "asked": [0]})
    record.close()
    record = RunRecord(record.folder, resumed_after=1)
    record.append_round(entry(2, 0.5))
    record.close()
    assert record.dropped_rounds == 1
