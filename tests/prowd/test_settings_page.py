"""docs/settings.md is what `prowd settings` prints, and holds every setting there is."""

import re
import tomllib
from pathlib import Path

import pytest

from core.errors import SettingsError
from prowd.cli import main
from prowd.settings_page import settings_page
from server_app.build import read_settings
from strategies import STRATEGIES

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
    assert "| `momentum` | `0.9` | number ≥ 0, < 1 | Momentum of the local optimizer; " in page
    assert '| `low-bit-training` | `"qat"` | `"qat"`, `"strict"`, `"integer"` | ' in page
    assert "| `lossless-coding` | `true` | `true`, `false` | " in page
    assert "| `fedprox-mu` | `0.01` | number ≥ 0 | " in page
    assert "| `image-size` | `0` | whole number ≥ 0, ≤ 1024 | " in page
    assert "| `seed` | `0` | whole number ≥ 0, < 2^63 | " in page
    assert "| `activation-bits` | `0` | 0, 2 to 16, and 32 | " in page
    assert "| `gradient-bits` | `0` | 0, 2 to 16, and 32 | " in page
    mix = "bits:share,...; bits 2 to 16, or 32, each once; shares above 0, 1 in all"
    assert f'| `bit-mix` | `"8:0.5,32:0.5"` | {mix} | ' in page


def allowed(key):
    [row] = [line for line in settings_page().splitlines() if line.startswith(f"| `{key}` |")]
    return row.split(" | ")[2]


def test_no_bound_is_said_twice():
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    cells = [row.split(" | ")[2] for row in rows]
    assert [cell for cell in cells if "≤" in cell and "<" in cell] == []
    assert [cell for cell in cells if "≥" in cell and ">" in cell] == []


def test_each_strategy_that_is_named_is_allowed_and_no_other():
    names = re.findall(r'`"([^"]*)"`', allowed("strategy"))
    *named, of_flower, own = names
    assert (of_flower, own) == ("flwr:NAME", "package.module:Class")
    assert named == [name for name in STRATEGIES if name != "flwr"]
    for name in (*named, "flwr:FedAdam"):
        read_settings({"strategy": name})
    with pytest.raises(SettingsError, match="strategy: there is no 'flwr'"):
        read_settings({"strategy": "flwr"})
