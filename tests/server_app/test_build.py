"""From Flower's flat run configuration to settings and a strategy."""

import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import Field

from core.errors import SettingsError
from core.options import Options
from core.settings import Settings
from server_app.build import choose_strategy, read_settings
from strategies import STRATEGIES, FedAvg, MixedPrecisionStrategy, ProWD, StrategyContext

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
RUN_CONFIG = PYPROJECT["tool"]["flwr"]["app"]["config"]


def test_pyproject_holds_every_setting_with_its_default():
    expected = Settings().to_settings()
    for name, strategy in STRATEGIES.items():
        expected |= strategy.Options().to_settings(f"{name}-")
    assert expected == RUN_CONFIG
    assert {k: type(v) for k, v in expected.items()} == {k: type(v) for k, v in RUN_CONFIG.items()}


def test_defaults_build_prowd():
    settings, own = read_settings(RUN_CONFIG)
    assert own["prowd-low-bit-weight"] == 1.0
    strategy = choose_strategy(settings, own).make()
    assert isinstance(strategy, ProWD)
    assert strategy.context.low_bit_training == "qat"


def test_a_strategys_own_settings_reach_it():
    changed = {**RUN_CONFIG, "prowd-mask-at-least": 0.5, "low-bit-training": "strict", "seed": 9}
    changed |= {"local-epochs": 3, "batch-size": 7}
    strategy = choose_strategy(*read_settings(changed)).make()
    assert strategy.options.mask_at_least == 0.5
    context = strategy.context
    assert (context.low_bit_training, context.seed) == ("strict", 9)
    assert (context.local_epochs, context.batch_size) == (3, 7)


def test_another_strategy_takes_the_common_settings():
    settings, own = read_settings({**RUN_CONFIG, "strategy": "fedavg", "fraction-train": 0.5})
    strategy = choose_strategy(settings, own).make()
    assert type(strategy) is FedAvg
    assert strategy.context.fraction_train == 0.5
    assert own == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"strategy": "fedsgd"},
            "strategy: there is no 'fedsgd'; allowed: prowd, prowd-paper, fedavg",
        ),
        ({"prowd-low-bit-weight": 2.0}, "prowd-low-bit-weight: 2.0 is not allowed"),
        ({"strategy": "fedavg", "prowd-ladder": "x"}, "prowd-ladder: 'x' is not allowed"),
        ({"strategy": "fedavg:FedAvg"}, "strategy: there is no 'fedavg:FedAvg'; allowed: prowd"),
        ({"strategy": "flwr"}, "strategy: there is no 'flwr'; allowed: prowd"),
        ({"strategy": "no_such:Class"}, "strategy: 'no_such:Class' cannot be imported"),
        ({"strategy": "strategies:RoundLog"}, "'strategies:RoundLog' is no subclass of strategies"),
        ({"strategy": "strategies:receive"}, "'strategies:receive' is no subclass of strategies"),
        ({"strategy-options": "mu = 1.0"}, "strategy-options: 'mu = 1.0' with strategy prowd"),
        ({"strategy-options": "mu"}, "strategy-options: 'mu' is not allowed: value error, write"),
        (
            {"strategy": "strategies:FedProx", "strategy-options": "mu = -1.0"},
            "strategy-options: mu: -1.0 is not allowed: input should be greater than or equal to 0",
        ),
        (
            {"strategy": "strategies:FedAvg", "strategy-options": "mu = 0.1"},
            "strategy-options: mu: there is no such setting (value 0.1)",
        ),
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


class Kinds(Options):
    """One setting of each kind that TOML has."""

    server_rate: float = 0.5
    name: str = "plain"
    layers: list[int] = Field(default_factory=lambda: [1, 2])
    by_bits: dict[str, float] = Field(default_factory=lambda: {"4 bits": 0.1})
    exact: bool = True
    limit: int | None = None


class Own(FedAvg):
    Options = Kinds


class Abstract(MixedPrecisionStrategy):
    pass


class Narrow(FedAvg):
    def __init__(self, seed):
        super().__init__(context=StrategyContext(seed=seed))


class Foreign(FedAvg):
    Options = dict


@pytest.fixture
def own(monkeypatch):
    """The notation of a class of this file."""
    monkeypatch.setitem(sys.modules, "own_strategies", sys.modules[__name__])
    return lambda name: f"own_strategies:{name}"


def test_a_class_of_the_users_own_takes_the_common_settings_and_its_own(own):
    text = "server-rate = 2.5, name = 'a \"b\" = c', layers = [3], exact = false"
    changes = {"strategy": own("Own"), "strategy-options": text, "fraction-train": 0.5}
    settings, options = read_settings({**RUN_CONFIG, **changes})
    strategy = choose_strategy(settings, options).make()
    assert type(strategy) is Own
    assert strategy.context.fraction_train == 0.5
    expected = Kinds(server_rate=2.5, name='a "b" = c', layers=[3], exact=False)
    assert strategy.options == expected
    # What is recorded holds the defaults too, and is read as the same when the run is resumed.
    recorded = options["strategy-options"]
    assert tomllib.loads(f"x = {{{recorded}}}")["x"] == {
        "server-rate": 2.5,
        "name": 'a "b" = c',
        "layers": [3],
        "by-bits": {"4 bits": 0.1},
        "exact": False,
    }
    again = read_settings({**RUN_CONFIG, **changes, **options})
    assert again[1] == options
    assert choose_strategy(*again).make().options == expected


def test_a_class_of_the_users_own_over_prowd_is_prowd():
    changes = {"strategy": "strategies:ProWD", "low-bit-training": "strict"}
    changes |= {"strategy-options": "mask-at-least = 0.5"}
    strategy = choose_strategy(*read_settings({**RUN_CONFIG, **changes})).make()
    assert (strategy.options.mask_at_least, strategy.context.low_bit_training) == (0.5, "strict")
    assert strategy.context.broadcast == "calibrated"


def test_a_class_without_settings_needs_none():
    settings, options = read_settings({**RUN_CONFIG, "strategy": "strategies:FedAvg"})
    assert options == {"strategy-options": ""}
    assert type(choose_strategy(settings, options).make()) is FedAvg


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Abstract", "'own_strategies:Abstract' cannot be made (TypeError: Can't instantiate"),
        ("Narrow", "'own_strategies:Narrow' cannot be made (TypeError: Narrow.__init__() got an"),
        ("Foreign", "Foreign.Options is no subclass of core.options.Options"),
    ],
)
def test_a_class_that_cannot_be_made_is_named(own, name, reason):
    with pytest.raises(SettingsError) as error:
        choose_strategy(*read_settings({**RUN_CONFIG, "strategy": own(name)})).make()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_are_validated_without_the_users_code():
    changes = {"strategy": "no_such:Class", "model": "no_such:net", "strategy-options": "a = 1"}
    assert Settings.of_run({**RUN_CONFIG, **changes}).model == "no_such:net"
