"""Experiment files: the published ones are valid, a wrong one is one clear line."""

from pathlib import Path

import pytest

from core.errors import SettingsError
from prowd.compare.plan import read_experiment
from prowd.compare.runs import planned_runs, unique
from server_app.build import choose_strategy, read_settings

FILES = sorted((Path(__file__).parents[3] / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_run_of_a_published_experiment_has_settings_that_exist(path, tmp_path):
    experiment = read_experiment(path)
    runs = planned_runs(experiment, tmp_path, {"data-dir": str(tmp_path)})
    scenarios, systems = len(experiment.scenarios), len(experiment.systems)
    assert len(runs) == scenarios * systems * len(experiment.seeds)
    assert experiment.about.split()[0] == str(len(unique(runs)))
    by_folder = {run.folder: run.settings for run in runs}
    assert all(by_folder[run.folder] == run.settings for run in runs)
    for run in runs:
        settings, own = read_settings(run.settings)
        assert choose_strategy(settings, own).make()
        assert settings.seed == run.seed


GOOD = """
title = "t"
seeds = [0]
[scenarios.half]
[systems.a]
strategy = "fedavg"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "file.toml"),
        (GOOD.replace("seeds = [0]", "seeds = []"), "file.toml: seeds"),
        (GOOD.replace("seeds = [0]", "seeds = 0"), "file.toml: seeds"),
        (GOOD.replace("[systems.a]", "[systems.'a/b']"), "'a/b': letters, digits"),
        (
            GOOD.replace("[systems.a]", "[systems.a-0.1]"),
            'a name with a dot is quoted: [systems."a-0.1"]',
        ),
        (GOOD + "seed = 3", "seed is left to prowd compare"),
        (GOOD + "[settings]\nrun-name = 'x'", "run-name is left to prowd compare"),
        (GOOD.replace("title", "titel"), "file.toml: titel: there is no such setting"),
        (GOOD.replace("[scenarios.half]", ""), "file.toml: scenarios"),
        ("title = 't'\nseeds = [1]\n[scenarios.s]\n[systems]", "file.toml: systems"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "file.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_experiment(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"absent\.toml: No such file"):
        read_experiment(tmp_path / "absent.toml")
