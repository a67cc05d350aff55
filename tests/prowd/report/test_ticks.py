"""Ticks of the report's axes: whole rounds, and labels that do not touch."""

import json
import re

import pytest
from report_page import read
from run_records import entry, write_run

from prowd.report import write_page
from prowd.report.ticks import log_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (4.9, 110, [5, 10, 20, 50, 100]),
        # Four decades are 285 points long: 21 between 1 and 2, which is too little.
        (0.9, 11_000, [1, 10, 100, 1000, 10_000]),
        (1e-15, 1e15, [1e-12, 1e-6, 1, 1e6, 1e12]),
        # Too short for two of 1, 2 and 5.
        (91, 99, [92, 94, 96, 98]),
        (21.3, 21.4, [21.3, 21.32, 21.34, 21.36, 21.38, 21.4]),
    ],
)
def test_ticks_of_a_logarithmic_axis_stand_clear(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_one_round_has_one_tick(tmp_path):
    folder = write_run(tmp_path / "run", "fedavg", 0, rounds=0)
    (folder / "rounds.jsonl").write_text(json.dumps(entry("fedavg", 1, 0.5, accuracy={"32": 0.5})))
    write_page(tmp_path / "page", "T", read(folder))
    drawing = re.search(
        r'aria-label="Accuracy, 32-bit, over rounds.*?</svg>', (tmp_path / "page").read_text(), re.S
    )
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing.group())
    assert texts[: texts.index("round")] == ["1"]
