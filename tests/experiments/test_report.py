"""The report from records: which runs are one line, what the page says and what it escapes."""

import json
import random
import re
import sys
from html.parser import HTMLParser

import pytest
from run_records import entry, write_run

from experiments.cli import main
from experiments.curves import mean_points
from experiments.records import find_runs, read_record
from experiments.report import write_page
from experiments.report.series import by_settings, common_settings, different_settings


def read(*folders):
    return [read_record(folder) for folder in find_runs(folders)]


class Page(HTMLParser):
    """What a page holds: figures by title, text, elements, names."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.ids, self.tags, self.text = {}, [], set(), []
        self.feed(text)
        self.said = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if attributes.get("role") == "img":
            title, _, text = attributes["aria-label"].partition(". ")
            self.figures[title] = text

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "Digits <3", read(runs))
    return Page(path.read_text())


def test_seeds_of_equal_settings_are_one_system(runs):
    [scenario] = by_settings([record for record in read(runs) if record.rounds])
    assert {s.name: [r.folder.name for r in s.records] for s in scenario.series} == {
        "fedavg": ["FedAvg-0", "FedAvg-1", "FedAvg-2"],
        "local": ["Local-0"],
        "prowd": ["ProWD-0", "ProWD-1"],
    }
    assert scenario.widths() == ["3", "32"]


def test_a_run_that_stopped_early_does_not_enter_the_mean(runs, tmp_path):
    """FedAvg's third seed was killed after 3 of the others' 6 rounds."""
    path = tmp_path / "report.html"
    write_page(path, "Digits", read(runs))
    row = r'<tr><th scope="row">fedavg</th>(?:<td>[^<]*</td>\s*)+</tr>'
    [accuracies] = re.findall(row, path.read_text())
    assert re.findall("<td>(.*?)</td>", accuracies)[-1] == "2"


def test_times_that_are_not_known_do_not_keep_the_page_from_being_written(tmp_path):
    folder = write_run(tmp_path / "ProWD-0", "prowd", 0)
    text = (folder / "rounds.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line["seconds"] = dict.fromkeys(line["seconds"])
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_page(tmp_path / "report.html", "Digits", read(tmp_path))
    assert "Seconds of a round, by part" in Page((tmp_path / "report.html").read_text()).figures


def test_systems_are_named_by_what_tells_them_apart(tmp_path):
    for name, align in (("a", True), ("b", True), ("c", False)):
        changes = {"learning-rate": 0.2} if name == "b" else {}
        write_run(tmp_path / name, "prowd", 0, **{"prowd-align": align}, **changes)
    [scenario] = by_settings(read(tmp_path))
    assert [s.name for s in scenario.series] == [
        "prowd",
        "prowd, learning-rate 0.2",
        "prowd, align false",
    ]


def test_repetitions_of_one_seed_are_not_taken_for_seeds(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "fedavg", 0)
    [scenario] = by_settings(read(tmp_path))
    assert [s.name for s in scenario.series] == ["fedavg (a)", "fedavg (b)"]


def test_federations_stand_apart_and_one_of_float32_alone_stands_in_all(tmp_path):
    for mix in ("3:0.5,32:0.5", "3:0.8,32:0.2", "32:1.0"):
        write_run(tmp_path / mix, "fedavg", 0, **{"bit-mix": mix})
    half, most = by_settings(read(tmp_path))
    assert (half.name, most.name) == ("bit-mix 3:0.5,32:0.5", "bit-mix 3:0.8,32:0.2")
    for scenario in (half, most):
        assert [s.name for s in scenario.series] == ["fedavg", "fedavg, bit-mix 32:1.0"]
        assert scenario.series[1].style == half.series[1].style


def test_differences_are_those_of_settings_that_both_have(runs):
    series = by_settings(read(runs / "ProWD-0", runs / "FedAvg-0"))[0].series
    assert different_settings(series) == {"strategy": ["prowd", "fedavg"]}
    common = common_settings(series)
    assert common["prowd-align"] is True
    assert common["learning-rate"] == 0.1
    assert "seed" not in common


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
    "Layer by layer, 3-bit group, round 4: prowd",
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
    assert "after 0 %" in page.figures["Weights of the 3-bit group, round 4: prowd"]
    assert "prowd 0.125" in page.figures["Dequantizer, reconstruction loss"]


def test_the_page_stands_alone(page):
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert len(set(page.ids)) == len(page.ids)


def test_strings_of_records_are_text(page):
    assert "b" not in page.tags
    assert "failed: batch-size: 0 is not allowed <script>alert(1)</script>" in page.said
    assert "RuntimeError: <b>no power</b> & more" in page.said


def test_what_is_not_whole_is_named(page):
    assert "not finished: still running, or killed" in page.said
    assert "rounds.jsonl line 4 is damaged" in page.said
    assert "fedavg (3 seeds, 3 to 4 rounds)" in page.said
    # Left out in rounds 1, 2 and 3.
    assert "1 to 3" in page.said


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, "T", read(runs / "Local-0"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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
        (["{run}", "--output", "/nowhere/page.html"], "--output: /nowhere/page.html cannot be"),
    ],
)
def test_what_cannot_be_done_is_one_line(runs, capsys, arguments, reason):
    assert main(["report", *(a.format(run=runs / "Local-0") for a in arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prowd: {reason}")


def test_without_matplotlib_the_extra_is_named(runs, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith(("experiments.report", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "experiments.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(runs / "Local-0")]) == 2
    assert "pip install -e '.[figures]'" in capsys.readouterr().err
