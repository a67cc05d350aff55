"""Records that are damaged, absurd or hostile: the page is written all the same."""

import json
import os
import random

import pytest
from report_page import Page, read
from run_records import entry, write_run

from prowd.report.page import write_page


def test_times_that_are_not_known_do_not_keep_the_page_from_being_written(tmp_path):
    folder = write_run(tmp_path / "ProWD-0", "prowd", 0)
    text = (folder / "rounds.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line["seconds"] = dict.fromkeys(line["seconds"])
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_page(tmp_path / "report.html", "Digits", read(tmp_path))
    assert "Seconds of a round, by part" in Page((tmp_path / "report.html").read_text()).figures


def test_hostile_names_neither_break_the_drawing_nor_the_page(tmp_path):
    layer = '$x_{$<svg onload="x">\x00\ud800'
    own = {"mask-density-3": 0.5, "mask-density-by-layer-3": {layer: 0.5}}
    folder = write_run(tmp_path / "<i>run", "fedavg", 0, rounds=0, dataset="<u>$^&\x01")
    (folder / "rounds.jsonl").write_text(json.dumps(entry("fedavg", 2, 0.5, own=own)))
    write_page(tmp_path / "page", "$<s>", read(folder))
    page = Page((tmp_path / "page").read_text())
    assert not page.tags & {"i", "u", "s", "script"}
    assert "Mask of each layer: fedavg" in page.figures


def test_no_damage_keeps_the_page_from_being_written(runs, tmp_path):
    rng = random.Random(1)
    whole = {f.name: f.read_bytes() for f in (runs / "ProWD-0").iterdir() if f.is_file()}
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(3):
        for name, data in whole.items():
            changed = bytearray(data)
            for _ in range(2):
                changed[rng.randrange(len(changed))] = rng.choice(b'0"{}[],:-eE.x\x00\xff')
            (folder / name).write_bytes(changed)
        write_page(tmp_path / "page", "T", read(folder))
    assert "</html>" in (tmp_path / "page").read_text()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    folder = write_run(tmp_path / "ProWD-0", "prowd", 0)
    for name in ("rounds.jsonl", "summary.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    write_page(tmp_path / "page", "T", read(folder))
    assert (tmp_path / "page").read_text().count("it is no regular file") == 2


@pytest.mark.parametrize("absurd", [1e308, 10**400])
def test_absurd_numbers_do_not_keep_the_page_from_being_written(tmp_path, absurd):
    folder = write_run(tmp_path / "ProWD-0", "prowd", 0)
    for name in ("rounds.jsonl", "weights.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            line.update(reach=absurd, high=absurd)
            line["seconds"] = dict.fromkeys(("round", "train", "aggregate", "evaluate"), absurd)
            line["prowd"] = {"reconstruction-loss": absurd, "distill-loss": absurd}
            line["accuracy"] = dict.fromkeys(("3", "32", "average"), absurd)
            line["prowd"] |= {"mask-density-3": absurd, "mask-density-by-layer-3": {"a": absurd}}
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    write_page(tmp_path / "page", "T", read(folder))
    assert "</html>" in (tmp_path / "page").read_text()


@pytest.mark.parametrize("reach", [1e308, 5e-324])
def test_no_reach_keeps_the_page_from_being_written(tmp_path, reach):
    folder = write_run(tmp_path / "ProWD-0", "prowd", 0)
    lines = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    (folder / "weights.jsonl").write_text(
        "\n".join(json.dumps({**line, "reach": reach}) for line in lines)
    )
    write_page(tmp_path / "page", "T", read(folder))
    said = Page((tmp_path / "page").read_text()).said
    assert ("weights.jsonl line 1 is damaged: reach" in said) == (reach == 1e308)
