"""From Flower's flat run configuration to settings and a strategy."""

import tomllib
from pathlib import Path

import pytest

from server_app.build import build_strategy, read_settings
from strategies import STRATEGIES, FedAvg, ProWD
from task.errors import SettingsError

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
RUN_CONFIG = PYPROJECT["tool"]["flwr"]["app"]["config"]


def test_pyproject_holds_every_setting_with_its_default():
    from task.settings import Settings

    expected = Settings().to_settings()
    for name, strategy in STRATEGIES.items():
        if hasattr(strategy, "Options"):
            expected |= strategy.Options().to_settings(f"{name}-")
    assert expected == RUN_CONFIG
    assert {k: type(v) for k, v in expected.items()} == {k: type(v) for k, v in RUN_CONFIG.items()}


def test_defaults_build_prowd():
    settings, own = read_settings(RUN_CONFIG)
    assert own["prowd-low-bit-weight"] == 1.0
    strategy = build_strategy(settings, own)
    assert isinstance(strategy, ProWD)
    assert strategy.low_bit_training == "qat"


def test_a_strategys_own_settings_reach_it():
    changed = {**RUN_CONFIG, "prowd-mask-at-least": 0.5, "low-bit-training": "strict", "seed": 9}
    changed |= {"local-epochs": 3, "batch-size": 7}
    strategy = build_strategy(*read_settings(changed))
    assert strategy.options.mask_at_least == 0.5
    assert (strategy.low_bit_training, strategy.seed) == ("strict", 9)
    assert (strategy.local_epochs, strategy.batch_size) == (3, 7)


def test_another_strategy_takes_the_common_settings():
    settings, own = read_settings({**RUN_CONFIG, "strategy": "fedavg", "fraction-train": 0.5})
    strategy = build_strategy(settings, own)
    assert type(strategy) is FedAvg
    assert strategy.fraction_train == 0.5
    assert own == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "fedsgd"}, "strategy: there is no 'fedsgd'; allowed: prowd, fedavg"),
        ({"prowd-low-bit-weight": 2.0}, "prowd-low-bit-weight: 2.0 is not allowed"),
        ({"strategy": "fedavg", "prowd-ladder": "x"}, "prowd-ladder: 'x' is not allowed"),
        ({"lr": 0.1}, "lr: there is no such setting"),
        ({"prowd-tau": 0.1}, "prowd-tau: there is no such setting"),
        ({"bit-mix": "17:0.5,32:0.5"}, "17 is not a bit-width"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(change, message):
    with pytest.raises(SettingsError) as error:
        read_settings({**RUN_CONFIG, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
