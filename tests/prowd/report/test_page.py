"""The report from records: what the page says and in which order, and the command."""

import re

import pytest
from report_page import Page, read
from run_records import write_run

from prowd.cli import main
from prowd.publish.curves import mean_points
from prowd.report.page import write_page


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "Digits <3", read(runs))
    return Page(path.read_text())


def test_a_run_that_stopped_early_does_not_enter_the_mean(runs, tmp_path):
    """FedAvg's third seed was killed after 3 of the others' 6 rounds."""
    path = tmp_path / "report.html"
    write_page(path, "Digits", read(runs))
    row = r'<tr><th scope="row">fedavg</th>(?:<td>[^<]*</td>\s*)+</tr>'
    [accuracies] = re.findall(row, path.read_text())
    assert re.findall("<td>(.*?)</td>", accuracies)[-1] == "2"


def test_mean_and_spread_are_of_the_seeds_that_came_so_far():
    first = [{"round": 1, "y": 1.0}, {"round": 2, "y": 4.0}]
    second = [{"round": 1, "y": 3.0}]
    one, two = mean_points([first, second], "round", "y")
    # Sample deviation of 1 and 3: the root of 2.
    assert (one.x, one.mean, one.spread) == (1, 2.0, pytest.approx(2**0.5))
    assert (two.x, two.mean, two.spread) == (2, 4.0, None)


EXPECTED = [
    *(
        f"Accuracy, {of}, over {x}"
        for of in ("averaged", "3-bit", "32-bit")
        for x in ("rounds", "bytes sent")
    ),
    "Bytes up a round, by width",
    "Bytes down a round, by width",
    "Seconds of a round, by part",
    "Weights of the 3-bit group, round 2: prowd",
    "Weights of the 3-bit group, round 4: prowd",
    "Mask of the 3-bit group over rounds",
    "Mask of each layer: prowd",
    "Dequantizer, reconstruction loss",
    "Dequantizer, distillation loss",
]


def test_every_figure_is_there_and_told_in_words(page):
    assert sorted(page.figures) == sorted(EXPECTED)
    # Round 4: 0.6 + 0.05 * 4 = 0.8, and half a hundredth more for seed 1; 0.7 and 0.705.
    averaged = page.figures["Accuracy, averaged, over rounds"]
    assert averaged.startswith("accuracy (%) against round; at the end: ")
    assert "prowd 80.25" in averaged
    assert "fedavg 70.25" in averaged
    assert "local" not in page.figures["Accuracy, averaged, over bytes sent"]
    # Means of 100,000 and 1,500,000 bytes; of 2 s, 0.25 s and 0.75 s.
    assert "prowd: 3-bit 0.1, 32-bit 1.5." in page.figures["Bytes up a round, by width"]
    assert (
        "local: train 2, aggregate 0.25, evaluate 0.75."
        in page.figures["Seconds of a round, by part"]
    )
    assert page.figures["Mask of each layer: prowd"] == "3-bit: conv.weight 90 %, head.weight 50 %."
    # Every layer comes back to what the 32-bit group has, and so do all of them.
    weights = page.figures["Weights of the 3-bit group, round 4: prowd"]
    for rows in ("all layers", "conv", "head"):
        assert re.search(rf"{rows} before [1-9][0-9.]* %, after 0 %", weights)
    assert "all layers before" in page.figures["Weights of the 3-bit group, round 2: prowd"]
    assert "prowd 0.125" in page.figures["Dequantizer, reconstruction loss"]


def test_a_system_that_is_not_finished_is_marked(tmp_path):
    write_run(tmp_path / "ProWD-0", "prowd", 0, rounds=2, ends=None)
    write_run(tmp_path / "FedAvg-0", "fedavg", 0)
    write_run(tmp_path / "Local-0", "local", 0, rounds=3, ends="failed")
    write_page(tmp_path / "page", "T", read(tmp_path))
    page = Page((tmp_path / "page").read_text())
    head, *rows = page.tables["Accuracy, all runs"]
    assert {row[0]: row[head.index("rounds")].replace("\xa0", " ") for row in rows} == {
        "prowd (not finished)": "2 of 4",
        "fedavg": "4 of 4",
        "local (failed)": "3 of 4",
    }
    assert "cannot be compared" in page.said
    assert "prowd (1 seed, not finished: 2 of 4 rounds)" in page.said


def test_results_come_before_the_runs(page):
    tables = list(page.tables)
    assert tables[0] == "Accuracy, all runs"
    assert tables[-1] == "Runs"
    assert "7 runs: 5 completed, 1 not finished, 1 failed." in page.said
    assert "1 with damaged or unfinished records." in page.said


def test_the_page_stands_alone(page):
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert len(set(page.ids)) == len(page.ids)


def test_strings_of_records_are_text(page):
    assert "b" not in page.tags
    assert "failed: batch-size: 0 is not allowed <script>alert(1)</script>" in page.said
    assert "RuntimeError: <b>no power</b> & more" in page.said


def test_what_is_not_whole_is_named(page):
    assert "not finished: ended without a word (killed?)" in page.said
    assert "rounds.jsonl line 4 is damaged" in page.said
    assert "fedavg (3 seeds, 3 to 4 rounds)" in page.said
    # Left out in rounds 1, 2 and 3.
    assert "1 to 3" in page.said


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, "T", read(runs / "Local-0"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_command_writes_beside_the_runs_or_where_it_is_told(runs, tmp_path, capsys):
    assert main(["report", str(runs / "Local-0")]) == 0
    assert (runs / "Local-0" / "report.html").is_file()
    assert capsys.readouterr().out.strip() == str(runs / "Local-0" / "report.html")
    assert main(["report", str(runs / "Local-0"), "--output", str(tmp_path / "page.html")]) == 0
    assert "<title>Local-0</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["{run}", "--output", "/proc/nowhere/page.html"], "/proc/nowhere/page.html cannot be"),
    ],
)
def test_what_cannot_be_done_is_one_line(runs, capsys, arguments, reason):
    assert main(["report", *(a.format(run=runs / "Local-0") for a in arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prowd: {reason}")
