"""docs/settings.md is what `prowd settings` prints, and holds every setting there is."""

import tomllib
from pathlib import Path

from experiments.cli import main
from experiments.settings_page import settings_page

PROJECT = Path(__file__).parents[2]


def test_the_page_in_the_documentation_is_not_stale():
    assert (PROJECT / "docs" / "settings.md").read_text() == settings_page()


def test_the_command_prints_it(capsys):
    assert main(["settings"]) == 0
    assert capsys.readouterr().out == settings_page()


def test_every_setting_is_there_with_its_default():
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(config)
    assert {row.split("`")[1] for row in rows} == config.keys()


def test_rows_by_hand():
    page = settings_page()
    assert "| `num-server-rounds` | `8` | whole number ≥ 1 | Rounds of training. |" in page
    assert "| `momentum` | `0.9` | number ≥ 0, ≤ 1, < 1 | Momentum of local SGD. |" in page
    assert '| `low-bit-training` | `"qat"` | `"qat"`, `"strict"` | ' in page
    assert "| `lossless-coding` | `true` | `true`, `false` | " in page
    assert "| `fedprox-mu` | `0.01` | number ≥ 0 | " in page
