"""The library's constructors hold their arguments to what the app holds its settings to."""

import numpy as np
import pytest
import torch
from torch import nn
from wrong_values import wrong_values

from core.errors import SettingsError
from core.settings import Settings
from quant import (
    FineTuning,
    QuantConfig,
    StrictSGD,
    decode,
    encode,
    fit_scales,
    fixed_point,
    prepare,
    quantize_state,
    spec_of,
)
from server_app.build import choose_strategy, read_settings
from strategies import (
    STRATEGIES,
    FedAvg,
    FlowerStrategy,
    Local,
    ProWD,
    ProWDOptions,
    StrategyContext,
    receive,
)
from strategies.differences import DifferenceOptions, FedCOM
from task.hyperparameters import LocalTraining

NAN, INF = float("nan"), float("inf")
# Arguments by the setting that has their bounds.
WRONG = {
    "fraction-train": [0, 1.5, -0.1, NAN, INF, "1", True, None],
    "fraction-evaluate": [-0.1, 1.1, NAN, "0"],
    "seed": [-1, 2**63, 1.0, True, "0", None],
    "min-nodes": [0, -1, 1.5, True],
    "node-wait": [0, -1.0, NAN, INF, "60"],
    "weight-step": [-1.0, NAN, INF],
    "norm-bound": [-1.0, 0.5, NAN, INF],
    "lossless-coding": [1, "true"],
    "local-epochs": [0, 1.0],
    "batch-size": [0, -1, 2.0, True],
}
NAMES = {"lossless-coding": "coded"}
ONE = {"w": torch.ones(2, 2)}
STRICT = {"low-bit-training": "strict"}


def refusal(make):
    with pytest.raises(ValueError) as error:  # noqa: PT011 What it says is looked at below.
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [(setting, value) for setting, values in WRONG.items() for value in values],
)
def test_what_the_app_refuses_the_library_refuses_in_the_same_words(setting, value):
    argument = NAMES.get(setting, setting.replace("-", "_"))
    words = refusal(lambda: Settings.read({setting: value, **STRICT}))
    assert words.startswith(f"{setting}: {value!r} is not allowed")
    assert refusal(lambda: StrategyContext(**{argument: value})) == words


def test_a_broadcast_that_no_strategy_can_do_is_refused():
    assert "broadcast: 'nearst' is not allowed" in refusal(
        lambda: StrategyContext(broadcast="nearst")
    )
    assert "broadcast: 'auto' is not allowed" in refusal(lambda: StrategyContext(broadcast="auto"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_options_and_a_context_and_no_others(name):
    kind = STRATEGIES[name].named("FedAvg")
    context = StrategyContext(seed=3)
    assert kind(kind.Options(), context).context.seed == 3
    expected = kind.Options()
    # It is ProWD, by options of ProWD.
    assert kind().options == (expected.as_prowd() if name == "prowd-paper" else expected)
    assert refusal(lambda: kind(3)).startswith(f"options: {kind.__name__} has 3; allowed: ")
    refused = refusal(lambda: kind(context))
    assert refused.startswith(f"options: {kind.__name__} has StrategyContext(")
    assert refusal(lambda: kind(context=3)) == (
        f"context: {kind.__name__} has 3; allowed: StrategyContext"
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_refuses_its_own_settings_by_name(name):
    kind = STRATEGIES[name]
    for field, info in kind.Options.model_fields.items():
        for value, allowed in wrong_values(info):
            refused = refusal(lambda given={field: value}: kind.Options(**given))
            assert refused.startswith(f"{info.alias}: {value!r} is not allowed: ")
            assert allowed in refused


def test_a_strategy_without_settings_takes_no_others():
    assert refusal(lambda: FedAvg(ProWDOptions())).startswith("options: FedAvg has ")


@pytest.mark.parametrize("given", ["conv.weight", 3, b"ab", ["conv.weight", 3]])
def test_the_quantized_weights_are_names(given):
    """A single name would be taken for the names of its letters."""
    assert refusal(lambda: StrategyContext(quantized=given)).startswith("quantized: ")
    assert StrategyContext(quantized=iter(["a", "b"])).quantized == {"a", "b"}


@pytest.mark.parametrize("name", ["predict", "round_calibrated", "examples_of", "detailed"])
def test_what_is_called_is_a_function(name):
    words = f"{name}: 'f' is not allowed: it should be a function, or None"
    assert refusal(lambda: StrategyContext(**{name: "f"})) == words


def test_flowers_strategies_are_named():
    assert "strategy: 'flwr:3' is not one of" in refusal(FlowerStrategy.named("3"))
    assert "strategy: 'flwr:' is not one of flwr:Bulyan" in refusal(FlowerStrategy)


def test_numpys_numbers_are_numbers():
    context = StrategyContext(
        fraction_train=np.float32(0.5), seed=np.int64(3), coded=np.bool_(False), node_wait=1
    )
    values = context.fraction_train, context.seed, context.coded
    assert values == (0.5, 3, False)
    assert [type(value) for value in values] == [float, int, bool]
    assert ProWDOptions(mask_at_least=np.float64(0.5)).mask_at_least == 0.5
    assert "not allowed" in refusal(lambda: StrategyContext(seed=np.float32(3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ProWD({}), "options: ProWD has {}; allowed: ProWDOptions"),
        (lambda: FedCOM(DifferenceOptions()), "options: FedCOM has DifferenceOptions(bits=0)"),
        (
            lambda: StrategyContext(low_bit_training="strct"),
            "low-bit-training: 'strct' is not allowed",
        ),
        (lambda: StrategyContext(weight_step=0.5), "weight-step: 0.5 with low-bit-training qat"),
        (lambda: ProWDOptions(mask_at_most=2), "mask-at-most: 2 is not allowed: input should be"),
        (lambda: ProWDOptions(tau=0.5), "tau: there is no such setting (value 0.5)"),
        (lambda: ProWDOptions(mask_at_most=0.5), "prowd-mask-at-least: 1 is above prowd-mask-at"),
        (lambda: Settings(batch_size=0), "batch-size: 0 is not allowed"),
        (lambda: QuantConfig(1), "weight_bits: 1 is not allowed: it should be 2 to 16"),
        (lambda: QuantConfig(4, activation_bits=0), "activation_bits: 0 is not allowed"),
        (lambda: QuantConfig(4, gradient_bits=17), "gradient_bits: 17 is not allowed"),
        (
            lambda: prepare(nn.Linear(2, 2), 8),
            "config: 8 is not allowed: it should be a QuantConfig",
        ),
        (lambda: fit_scales(ONE, ["w"], None), "bits is None; allowed are the integers 2 to 16"),
        (
            lambda: quantize_state(ONE, 8, {"w": -torch.ones(2)}),
            "w: a scale is -1; allowed",
        ),
        (
            lambda: quantize_state(ONE, 8, {"w": torch.zeros(2)}),
            "w: a scale is 0; allowed",
        ),
        (lambda: decode(b"", spec_of(nn.Linear(2, 2)), "8"), "bits: '8' is not allowed"),
        (lambda: FineTuning(steps=0), "steps: 0 is not allowed: it should be a whole number >= 1"),
        (lambda: FineTuning(learning_rate=NAN), "learning_rate: nan is not allowed"),
        (lambda: FineTuning(distill_weight=-1), "distill_weight: -1 is not allowed"),
        (lambda: FineTuning(group_size=True), "group_size: True is not allowed"),
        (lambda: LocalTraining(33), "bits: 33 is not a bit-width"),
        (lambda: LocalTraining(4, epochs=0), "local-epochs: 0 is not allowed"),
        (lambda: LocalTraining(4, momentum=1.0), "momentum: 1.0 is not allowed"),
        (lambda: LocalTraining(4, gradient_bits=0), "gradient-bits: 0 is not allowed"),
        (lambda: LocalTraining(4, proximal_mu=NAN), "proximal-mu: nan is not allowed"),
        (lambda: LocalTraining(4, weight_step=0.5), "weight-step: 0.5 with low-bit-training qat"),
        (lambda: list(receive(None, [], NAN, 0)), "timeout: nan is not allowed"),
        (lambda: list(receive(None, [], "1", 0)), "timeout: '1' is not allowed"),
        (lambda: fixed_point({"w": torch.ones(2, 2)}, ["w"], 0.0), "step: 0.0 is not allowed"),
    ],
)
def test_a_constructor_refuses_in_one_line(make, words):
    assert refusal(make).startswith(words)


def test_widths_of_numpys_types_count_as_what_they_hold():
    bits = np.int64(8)
    assert QuantConfig(bits, bits, bits) == QuantConfig(8, 8, 8)
    assert type(QuantConfig(bits).weight_bits) is int
    update = quantize_state(ONE, bits, fit_scales(ONE, ["w"], bits))
    assert type(update.bits) is int
    assert encode(update) == encode(quantize_state(ONE, 8, update.scales))


@pytest.mark.parametrize("most", [0, -1, 1.5, NAN, "9", True])
def test_the_most_examples_of_a_node_are_a_whole_number(most):
    with pytest.raises(SettingsError, match=r"^most_examples: .* a whole number >= 1$"):
        StrategyContext(most_examples=most)
    assert StrategyContext(most_examples=np.int64(9)).most_examples == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 1}, "bits: 1 is not allowed"),
        ({"gradient_bits": 1}, "gradient_bits: 1 is not allowed"),
        ({"lr": 0.0}, "lr: 0.0 is not allowed: it should be a number > 0"),
        ({"lr": INF}, "lr: inf is not allowed"),
        ({"momentum": 1.0}, "momentum: 1.0 is not allowed: it should be a number >= 0, < 1"),
        ({"weight_decay": NAN}, "weight_decay: nan is not allowed"),
        ({"scales": {"v": torch.ones(2)}}, "scales: there is no parameter 'v'"),
    ],
)
def test_strict_sgd_refuses_in_one_line(changes, words):
    usual = {"bits": 4, "lr": 0.1, "scales": {}, "generator": torch.Generator()}
    named = [("w", nn.Parameter(torch.ones(2, 2)))]
    assert refusal(lambda: StrictSGD(named, **{**usual, **changes})).startswith(words)


def test_a_step_size_that_decayed_for_thousands_of_rounds_is_above_zero():
    settings = Settings(learning_rate_decay=0.5)
    assert LocalTraining.of(settings, 32, 5000, 0.0).learning_rate > 0


def test_a_share_of_evaluating_clients_is_not_dropped_silently(caplog):
    assert Local(context=StrategyContext(fraction_evaluate=0.25)).context.fraction_evaluate == 1
    assert "fraction-evaluate: 0.25, but in local training all clients evaluate" in caplog.text
    caplog.clear()
    Local()
    assert not caplog.text


@pytest.mark.parametrize("broadcast", ["nearest", "calibrated"])
def test_fedcomgate_refuses_coded_broadcasts(broadcast):
    """Its clients would take their corrections from rounding errors: of mean 0.7 at 4 bits."""
    words = (
        f"broadcast: {broadcast!r} with fedcomgate; its corrections need the exact model; "
        "allowed: float32"
    )
    context = StrategyContext(broadcast=broadcast)
    assert refusal(lambda: STRATEGIES["fedcomgate"](context=context)) == words
    settings = read_settings({"strategy": "fedcomgate", "broadcast": broadcast})
    with pytest.raises(SettingsError) as error:
        choose_strategy(*settings)
    assert str(error.value) == words
