"""Published pictures: a system looks the same in all of them, and what they say can be read."""

from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from prowd.publish.figures import draw
from prowd.report.charts import COLORS

KNOWN = ["ProWD", "FedAvg", "FedProx", "FedPAQ", "FedCOM", "FedCOMGATE", "GroupedAvg", "Local"]
KNOWN += ["all-Float32"]
PARTS = [f"part-{letter}" for letter in "abcdefghijkl"]


def result(scenario, system, average=0.5, bytes_a_round=5e6, rounds=10):
    return {
        "scenario": scenario,
        "system": system,
        "seed": 0,
        "accuracy": {"average": average},
        "curve": [
            {"round": 3 * r, "uplink_bytes": r * bytes_a_round, "accuracy": average * r / rounds}
            for r in range(1, rounds + 1)
        ],
    }


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a scenario; returns matplotlib's figure."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw_one(scenario, results):
        draw(scenario, results, tmp_path / "picture.svg")
        return figures[-1]

    return draw_one


def looks(figure):
    lines = figure.axes[0].get_lines()
    return {
        line.get_label(): (to_hex(line.get_color()), str(line._unscaled_dash_pattern))
        for line in lines
    }


def test_a_system_looks_the_same_whatever_its_rank_and_company(drawn):
    some = [result("half", s, rank / 20) for rank, s in enumerate(KNOWN, 1)]
    others = [result("few", s, 1 - rank / 20) for rank, s in enumerate(KNOWN[:5], 1)]
    ablation = [result("half", s) for s in ("ProWD", "FedCOM", *PARTS)]
    first, second = looks(drawn("half", some)), looks(drawn("few", [*some, *others]))
    third = looks(drawn("half", ablation))
    assert list(first) == KNOWN[::-1], "the best stands first in the legend"
    assert list(second) == KNOWN[:5]
    assert second.items() <= first.items()
    assert {s: third[s] for s in ("ProWD", "FedCOM")} == {s: first[s] for s in ("ProWD", "FedCOM")}


def test_systems_without_a_place_look_the_same_in_all_scenarios_in_any_order(drawn):
    results = [result("half", s) for s in PARTS]
    results += [result("few", s) for s in PARTS[5:]]
    half, few = looks(drawn("half", results)), looks(drawn("few", results[::-1]))
    assert few.items() <= half.items()


def test_no_two_systems_look_alike(drawn):
    systems = [*KNOWN, *PARTS]
    found = looks(drawn("half", [result("half", s) for s in systems]))
    assert len(found) == len(set(found.values())) == len(systems) > len(COLORS)


def test_where_nothing_is_sent_there_is_nothing_over_bytes(drawn):
    figure = drawn("half", [result("half", "Local", bytes_a_round=0)])
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 0]


def test_one_round_has_one_tick(drawn):
    figure = drawn("half", [result("half", "ProWD", rounds=1)])
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [3]


@pytest.mark.parametrize(
    ("smallest", "rounds"), [(5e6, 10), (2.6e6, 36), (1e6, 4), (5e3, 3), (9e6, 100), (1e5, 9000)]
)
def test_ticks_do_not_overlap(drawn, smallest, rounds):
    figure = drawn("half", [result("half", "ProWD", 0.5, smallest, rounds)])
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [t for w in (False, True) for t in axes.xaxis.get_ticklabels(minor=w)]
        boxes = sorted(
            (t.get_window_extent().x0, t.get_window_extent().x1)
            for t in ticks
            if t.get_text() and low <= t.get_position()[0] <= high
        )
        assert len(boxes) >= 2
        assert all(left[1] < right[0] for left, right in pairwise(boxes)), axes.get_xlabel()
