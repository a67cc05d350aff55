"""Reading run records: what is whole comes back, the rest is named, nothing is a traceback."""

import json
import random
from math import isnan

import pytest

from core.errors import SettingsError
from prowd.records import KILLED, find_runs, read_record
from server_app.folder import locked


def test_a_whole_record_is_read_as_it_was_written(runs):
    record = read_record(runs / "ProWD-1")
    assert record.damage == ()
    assert (record.summary.status, record.num_rounds) == ("completed", 4)
    assert [entry.round for entry in record.rounds] == [1, 2, 3, 4]
    assert record.rounds[1].accuracy == pytest.approx({"3": 0.61, "32": 0.8, "average": 0.705})
    assert record.rounds[3].figure("reconstruction-loss") == 0.125
    assert record.rounds[3].figures("mask-density-by-layer-3")["head.weight"] == 0.5
    assert record.rounds[3].figure("mask-density-by-layer-3") is None
    assert [w.round for w in record.weights] == [2, 4]
    assert sum(record.weights[0].counts.before["3"]["conv.weight"]) == 72


def test_a_killed_run_is_read_up_to_its_torn_line(runs):
    record = read_record(runs / "FedAvg-2")
    assert (record.summary.status, record.summary.reason) == ("running", KILLED)
    assert [entry.round for entry in record.rounds] == [1, 2, 3]
    [damage] = record.damage
    assert damage.startswith("rounds.jsonl line 4 is damaged: ")


def test_a_run_that_a_process_writes_is_running(runs):
    with locked(runs / "FedAvg-2"):
        summary = read_record(runs / "FedAvg-2").summary
    assert (summary.status, summary.reason) == ("running", "")


def test_a_refused_run_is_not_damaged(runs):
    record = read_record(runs / "refused")
    assert (record.summary.status, record.rounds, record.damage) == ("failed", (), ())


@pytest.fixture
def copy(runs, tmp_path):
    def copy(name="ProWD-0"):
        folder = tmp_path / "run"
        folder.mkdir()
        for file in (runs / name).iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "rounds.jsonl line 2 is damaged: Expecting value"),
        (b"\xff\xfe", "rounds.jsonl line 2 is damaged: "),
        (b"[1]", "rounds.jsonl line 2 is damaged: no JSON object"),
        (b"[" * 100_000, "rounds.jsonl line 2 is damaged: "),
        (b'{"round": "two"}', "rounds.jsonl line 2 is damaged: round: "),
        (b'{"round": 2, "accuracy": {"x": 1}}', "line 2 is damaged: accuracy.x"),
        (b'{"round": 2, "uplink_bytes": {"3": -1}}', "line 2 is damaged: uplink_bytes.3: "),
        (b'{"round": 1}', "rounds.jsonl line 2 holds round 1 out of turn"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_read(copy, line, reason):
    folder = copy()
    lines = (folder / "rounds.jsonl").read_bytes().splitlines()
    lines[1] = line
    (folder / "rounds.jsonl").write_bytes(b"\n".join(lines))
    record = read_record(folder)
    assert [entry.round for entry in record.rounds] == [1, 3, 4]
    assert reason in record.damage[0]
    assert record.damage[1] == "rounds.jsonl lacks round 2"


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "config.json is damaged: Expecting property name"),
        ("config.json", '{"settings": [1]}', "config.json is damaged: settings: "),
        ("rounds.jsonl", None, "rounds.jsonl lacks rounds 1 to 4"),
        ("weights.jsonl", '{"round": 2}', "weights.jsonl line 1 is damaged: reach: "),
        ("weights.jsonl", '{"round": 2, "reach": 1e308}', "weights.jsonl line 1 is damaged: reach"),
    ],
)
def test_a_damaged_file_is_named(copy, name, content, damage):
    folder = copy()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert read_record(folder).damage[0].startswith(damage)


def test_without_a_summary_the_rounds_are_read(copy):
    folder = copy()
    (folder / "summary.json").unlink()
    record = read_record(folder)
    assert record.damage == ("summary.json is missing",)
    assert len(record.rounds) == 4


def test_weights_of_other_shapes_are_refused(copy):
    folder = copy()
    content = json.loads((folder / "weights.jsonl").read_text().splitlines()[0])
    content["counts"]["after"]["3"]["conv.weight"].pop()
    (folder / "weights.jsonl").write_text(json.dumps(content))
    record = read_record(folder)
    assert record.weights == ()
    assert "numbers of bins differ" in record.damage[0]


def test_null_is_a_number_that_is_not_finite(copy):
    folder = copy()
    (folder / "rounds.jsonl").write_text('{"round": 1, "accuracy": {"32": null, "3": 1e999}}')
    assert all(isnan(value) for value in read_record(folder).rounds[0].accuracy.values())


@pytest.mark.parametrize("absurd", ["1e308", "-1e308", "1e101"])
def test_numbers_that_nothing_comes_to_are_not_known(copy, absurd):
    folder = copy()
    (folder / "rounds.jsonl").write_text(
        f'{{"round": 1, "accuracy": {{"3": {absurd}}}, "seconds": {{"round": {absurd}}},'
        f' "prowd": {{"distill-loss": {absurd}, "mask-density-by-layer-3": {{"a": {absurd}}}}}}}'
    )
    [line] = read_record(folder).rounds
    assert isnan(line.accuracy["3"])
    assert line.seconds == {"round": 0.0}
    assert isnan(line.figure("distill-loss"))
    assert isnan(line.figures("mask-density-by-layer-3")["a"])


def test_a_whole_number_too_large_for_a_float_is_not_known(copy):
    folder = copy()
    content = {"round": 1, "prowd": {"distill-loss": 10**400}}
    (folder / "rounds.jsonl").write_text(json.dumps(content))
    assert isnan(read_record(folder).rounds[0].figure("distill-loss"))


def test_large_losses_and_times_are_read(copy):
    folder = copy()
    (folder / "rounds.jsonl").write_text(
        '{"round": 1, "seconds": {"round": 1e9, "train": 1e11}, "prowd": {"distill-loss": -3e38}}'
    )
    [line] = read_record(folder).rounds
    assert line.seconds == {"round": 1e9, "train": 0.0}
    assert line.figure("distill-loss") == -3e38


def test_no_damage_is_a_traceback(copy):
    """Bytes of a real record changed at random."""
    folder, rng = copy(), random.Random(0)
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    for _ in range(300):
        for file, data in whole.items():
            changed = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                changed[rng.randrange(len(changed))] = rng.choice(b'0"{}[],:-eE.x\x00\xff')
            file.write_bytes(changed[: rng.randint(0, len(changed))])
        read_record(folder)


def test_a_folder_of_runs_counts_as_its_runs(runs):
    names = [folder.name for folder in find_runs([runs])]
    assert names == sorted(names)
    assert set(names) == {
        *(f"{name}-{seed}" for name in ("ProWD", "FedAvg") for seed in (0, 1)),
        *("FedAvg-2", "Local-0", "refused"),
    }
    assert [f.name for f in find_runs([runs / "ProWD-0", runs / "ProWD-0"])] == ["ProWD-0"]
    # What was moved aside is shown where it is asked for by name.
    assert len(find_runs([runs / "FedAvg-9.broken1"])) == 1


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"holds no run; one has config\.json"):
        find_runs([tmp_path])
    with pytest.raises(SettingsError, match="there is no such folder"):
        find_runs([tmp_path / "nowhere"])
