"""Which runs are one line of the report, what they are called, and what they were set to."""

from report_page import Page, read
from run_records import write_run

from prowd.records import read_record
from prowd.report.page import write_page
from prowd.report.series import arrange, by_settings
from prowd.report.settings import common_settings, disagreements, scenario_settings


def test_seeds_of_equal_settings_are_one_system(runs):
    [scenario] = by_settings([record for record in read(runs) if record.rounds])
    assert {s.name: [r.folder.name for r in s.records] for s in scenario.series} == {
        "fedavg": ["FedAvg-0", "FedAvg-1", "FedAvg-2"],
        "local": ["Local-0"],
        "prowd": ["ProWD-0", "ProWD-1"],
    }
    assert scenario.widths() == ["3", "32"]


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


def test_titles_leave_out_what_is_empty(tmp_path):
    """A folder of images has settings that a data set of its own name leaves empty."""
    plain = {"data-dir": "", "image-size": 0, "partitioner": "iid", "partition-file": ""}
    images = {"dataset": "image-folder", "data-dir": "/d", "image-size": 16}
    from_file = {"partitioner": "file", "partition-file": "/p"}
    for name, changes in (("a", {}), ("b", images), ("c", from_file)):
        write_run(tmp_path / name, "fedavg", 0, **{**plain, **changes})
    assert [scenario.name for scenario in by_settings(read(tmp_path))] == [
        "dataset digits, partitioner iid",
        "dataset image-folder, partitioner iid, data-dir /d, image-size 16",
        "dataset digits, partitioner file, partition-file /p",
    ]


def test_titles_say_what_is_empty_where_nothing_else_tells(tmp_path):
    for name, size in (("a", 0), ("b", 16)):
        write_run(tmp_path / name, "fedavg", 0, **{"image-size": size})
    names = [scenario.name for scenario in by_settings(read(tmp_path))]
    assert names == ["image-size 0", "image-size 16"]
    # Nor do two federations come to one title: a record of before has no such setting.
    for name, more in (("c", {}), ("d", {"image-size": 0})):
        write_run(tmp_path / "old" / name, "fedavg", 0, **{"bit-mix": "3:1.0", **more})
    assert len(by_settings(read(tmp_path, tmp_path / "old"))) == 4


def test_a_system_is_named_by_what_it_lacks(tmp_path):
    for name, options in (("a", "x=1"), ("b", "x=1"), ("c", "")):
        more = {"learning-rate": 0.2} if name == "b" else {}
        write_run(tmp_path / name, "prowd", 0, **{"strategy-options": options, **more})
    [scenario] = by_settings(read(tmp_path))
    assert [s.name for s in scenario.series][2] == "prowd, no strategy-options"


def test_differences_are_those_of_settings_that_both_have(runs):
    scenarios = by_settings(read(runs / "ProWD-0", runs / "FedAvg-0"))
    [found] = scenario_settings(scenarios)
    assert found.shared.rows == []
    assert found.different.head == ["setting", "prowd", "fedavg"]
    assert found.different.rows == [["strategy", "prowd", "fedavg"]]
    common = common_settings(scenarios)
    assert common["prowd-align"] is True
    assert common["learning-rate"] == 0.1
    assert "seed" not in common


def test_settings_are_shown_of_each_scenario(tmp_path):
    """FedAvg's learning rate and every bit-mix differ by scenario alone."""
    named = []
    for scenario, mix, rate in (("half", "3:0.5,32:0.5", 0.1), ("most", "3:0.8,32:0.2", 0.2)):
        for system, changes in (("Local", {}), ("FedAvg", {"learning-rate": rate})):
            folder = tmp_path / f"{scenario}-{system}"
            write_run(folder, system.lower(), 0, **{"bit-mix": mix, **changes})
            named.append((scenario, system, read_record(folder)))
    write_page(tmp_path / "page", "T", [record for *_, record in named], named)
    tables = Page((tmp_path / "page").read_text()).tables
    assert tables["Settings of half"][1:] == [["bit-mix", "3:0.5,32:0.5"], ["learning-rate", "0.1"]]
    assert tables["Settings of most"][1:] == [["bit-mix", "3:0.8,32:0.2"]]
    assert tables["Settings in which systems of half differ"][1:] == [
        ["strategy", "local", "fedavg"]
    ]
    assert tables["Settings in which systems of most differ"] == [
        ["setting", "Local", "FedAvg"],
        ["learning-rate", "0.1", "0.2"],
        ["strategy", "local", "fedavg"],
    ]
    same = dict(tables["Settings that are the same for all"])
    assert same["dataset"] == "digits"
    assert not {"bit-mix", "learning-rate", "strategy"} & same.keys()


def test_seeds_that_ran_with_different_settings_are_told(tmp_path):
    for seed, rate in enumerate((0.1, 0.1, 0.2)):
        write_run(tmp_path / str(seed), "fedavg", seed, **{"learning-rate": rate})
    named = [("digits", "FedAvg", record) for record in read(tmp_path)]
    [scenario] = arrange(named)
    told = "The runs of FedAvg differ in more than their seed: learning-rate."
    assert disagreements(scenario) == [told]
    [found] = scenario_settings([scenario])
    assert found.different.rows == [["learning-rate", "0.1 (seed 0, 1); 0.2 (seed 2)"]]
    write_page(tmp_path / "page", "T", [record for *_, record in named], named)
    assert told in Page((tmp_path / "page").read_text()).said
