"""The published results: tables are those of the summaries kept beside them."""

import json
import re
from pathlib import Path

import pytest

from core.errors import SettingsError
from prowd.publish.command import block, publish, tables
from prowd.publish.margins import CONTROLS
from prowd.publish.table import accuracy_cell, make_table

DOCS = Path(__file__).parents[3] / "docs"
SUMMARIES = sorted((DOCS / "results").glob("*.json"))


def result(system, seed, average, sent):
    accuracy = {"4": average - 0.01, "32": average + 0.01, "average": average}
    curve = [{"round": r, "uplink_bytes": r * sent, "accuracy": average * r / 4} for r in (1, 2, 4)]
    return {
        "scenario": "50-50",
        "system": system,
        "seed": seed,
        "accuracy": accuracy,
        "uplink_bytes": 4 * sent,
        "downlink_bytes": 8_000_000,
        "seconds": 3,
        "curve": curve,
    }


RESULTS = [
    result("ProWD", 0, 0.75, 1_000_000),
    result("ProWD", 1, 0.77, 1_000_000),
    result("FedAvg", 0, 0.60, 2_000_000),
    result("Local", 0, 0.40, 0),
]


@pytest.fixture
def comparison(tmp_path):
    output = tmp_path / "int4"
    output.mkdir()
    (output / "table.json").write_text(json.dumps({"title": "T", "results": RESULTS}))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text("before\n<!-- int4 -->\nold\n<!-- end of int4 -->\nafter\n")
    return output, docs


@pytest.mark.parametrize("summary", SUMMARIES, ids=lambda path: path.stem)
def test_tables_in_the_documentation_are_those_of_the_summaries(summary):
    assert tables(summary) in (DOCS / "results.md").read_text()


def test_the_table_in_the_readme_is_that_of_the_summaries():
    chapter = (DOCS.parent / "README.md").read_text().split("## Measured\n")[1].split("\n## ")[0]
    lines = [line.replace("*", "") for line in chapter.splitlines() if line.startswith("|")]
    assert "mean of three seeds" in " ".join(chapter.split())
    (_, *columns), _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    for number, column in enumerate(columns, start=1):
        name, mix = column.lower().split(", ")
        results = json.loads((DOCS / "results" / f"{name}.json").read_text())["results"]
        table = make_table(r for r in results if r["scenario"] == mix.replace("/", "-"))
        assert {row["seeds"] for row in table} == {3}
        shown = {row[0].replace("all ", "all-"): row[number] for row in rows}
        averaged = {row["system"]: accuracy_cell(row["accuracy"]["average"]) for row in table}
        assert shown == {k: value for k, value in averaged.items() if k not in CONTROLS}


def test_publishing_fills_the_place_and_nothing_else(comparison):
    written = publish(*comparison)
    text = (comparison[1] / "results.md").read_text()
    assert text.startswith("before\n<!-- int4 -->\n\n### T: 50-50\n")
    assert text.endswith("\n<!-- end of int4 -->\nafter\n")
    assert "| ProWD | 75.00 ± 1.41 | 77.00 ± 1.41 | 76.00 ± 1.41 | 4.00 | 8.00 | 2 |" in text
    assert "old" not in text
    assert [path.name for path in written] == ["int4.json", "results.md", "int4-50-50.svg"]


def test_publishing_twice_gives_the_same_files(comparison):
    before = {path: path.read_bytes() for path in publish(*comparison)}
    assert {path: path.read_bytes() for path in publish(*comparison)} == before


def test_the_picture_shows_every_system_over_rounds_and_those_that_send_over_bytes(comparison):
    svg = publish(*comparison)[-1].read_text()
    # Text is drawn as paths; matplotlib leaves it in comments.
    for text in ("ProWD", "FedAvg", "Local", "round", "MB sent by all clients"):
        assert f"<!-- {text} -->" in svg
    lines = re.findall(r'<g id="line2d_\d+">\s*<path d="[^"]*" clip-path', svg)
    curves = [line for line in lines if line.count("L ") == 2]
    assert len(curves) == 5


def publish_also(comparison, title, results):
    output, docs = comparison
    publish(output, docs)
    (output / "table.json").write_text(json.dumps({"title": title, "results": results}))
    publish(output, docs)
    return json.loads((docs / "results" / "int4.json").read_text())["results"]


def test_other_seeds_join_those_that_are_published(comparison):
    more = [result("FedAvg", 1, 0.62, 2), result("ProWD", 2, 0.79, 1), result("Local", 0, 0.5, 0)]
    found = publish_also(comparison, "T", more)
    assert [(r["system"], r["seed"], r["accuracy"]["average"]) for r in found] == [
        *[("FedAvg", 0, 0.60), ("FedAvg", 1, 0.62)],
        *[("ProWD", 0, 0.75), ("ProWD", 1, 0.77), ("ProWD", 2, 0.79)],
        ("Local", 0, 0.5),
    ]


def test_what_was_evaluated_in_other_rounds_does_not_join(comparison):
    longer = result("ProWD", 2, 0.79, 1)
    longer["curve"].append({"round": 5, "uplink_bytes": 5, "accuracy": 0.8})
    with pytest.raises(SettingsError, match="evaluated in other rounds than"):
        publish_also(comparison, "T", [longer])


def test_what_has_another_title_takes_the_place(comparison):
    more = [result("ProWD", 2, 0.79, 1)]
    assert publish_also(comparison, "Another", more) == more


@pytest.mark.parametrize(
    ("missing", "message"), [("table.json", "run prowd compare first"), ("place", "has no lines")]
)
def test_what_is_missing_is_named(comparison, missing, message):
    output, docs = comparison
    if missing == "place":
        (docs / "results.md").write_text("nothing")
    else:
        (output / "table.json").unlink()
    with pytest.raises(SettingsError, match=message):
        publish(output, docs)


def test_the_place_of_one_experiment_is_not_anothers():
    assert not re.search(block("int"), "<!-- int4 -->\n<!-- end of int4 -->", re.DOTALL)
