"""Settings that were given and have no effect are told of."""

import tomllib
from pathlib import Path

import pytest

from core.settings import Settings
from server_app.idle import idle_settings, idle_with_model
from task.models import build_model

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
DEFAULTS = PYPROJECT["tool"]["flwr"]["app"]["config"]


def test_the_defaults_are_no_news():
    assert idle_settings(DEFAULTS) == []
    assert idle_settings({}) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fedprox-mu": 0.5}, "fedprox-mu: 0.5 has no effect with strategy=prowd"),
        (
            {"strategy": "flwr:FedProx", "fedprox-mu": 0.5},
            "fedprox-mu: 0.5 has no effect with strategy=flwr:FedProx",
        ),
        ({"dirichlet-alpha": 1.0}, "dirichlet-alpha: 1.0 has no effect with partitioner=iid"),
        ({"data-dir": "/x"}, "data-dir: '/x' has no effect with dataset=digits"),
        (
            {"integer-learning-rate": 4.0},
            "integer-learning-rate: 4.0 has no effect with low-bit-training=qat",
        ),
        (
            {
                "strategy": "fedavg",
                "bit-mix": "32:1.0",
                "low-bit-training": "integer",
                "integer-learning-rate": 4.0,
            },
            "integer-learning-rate: 4.0 has no effect with bit-mix=32:1.0",
        ),
        (
            {"prowd-finetune-steps": 5},
            "prowd-finetune-steps: 5 has no effect with prowd-finetune-every=0",
        ),
        (
            {"prowd-mask": "random"},
            "prowd-mask: 'random' has no effect with prowd-mask-at-least=1.0",
        ),
        (
            {"prowd-ladder": "8,32"},
            "prowd-ladder: '8,32' has no effect with prowd-finetune-every=0",
        ),
        (
            {"strategy": "local", "norm-bound": 2.0},
            "norm-bound: 2.0 has no effect with strategy=local",
        ),
        (
            {"strategy": "local", "server-device": "cpu"},
            "server-device: 'cpu' has no effect with strategy=local",
        ),
        (
            {"strategy": "local", "lossless-coding": False},
            "lossless-coding: False has no effect with strategy=local",
        ),
        (
            {"strategy": "fedpaq", "bit-mix": "32:1.0", "lossless-coding": False},
            "lossless-coding: False has no effect with bit-mix=32:1.0",
        ),
        (
            {"strategy": "fedavg", "bit-mix": "32:1.0", "activation-bits": 4},
            "activation-bits: 4 has no effect with bit-mix=32:1.0",
        ),
        (
            {"bit-mix": "8:1.0", "prowd-align": "off"},
            "prowd-align: 'off' has no effect with bit-mix=8:1.0",
        ),
        (
            {"prowd-finetune-every": 1, "server-buffer": 0, "calibrate-normalization": False},
            "prowd-distill-weight: 0.1 has no effect with server-buffer=0",
        ),
        (
            {"secure-threshold": 0.8},
            "secure-threshold: 0.8 has no effect with secure-aggregation=False",
        ),
        (
            {"secure-min-group": 5},
            "secure-min-group: 5 has no effect with secure-aggregation=False",
        ),
        (
            {"secure-small-groups": "merge"},
            "secure-small-groups: 'merge' has no effect with secure-aggregation=False",
        ),
        (
            {"secure-float-bits": 24},
            "secure-float-bits: 24 has no effect with secure-aggregation=False",
        ),
        ({"dp-clip": 1.0, "norm-bound": 2.0}, "norm-bound: 2.0 has no effect with dp-clip=1.0"),
        (
            {"secure-aggregation": True, "broadcast": "float32", "lossless-coding": False},
            "lossless-coding: False has no effect with secure-aggregation and a model in float32",
        ),
        (
            {"secure-aggregation": True, "strategy": "fedavg", "lossless-coding": False},
            "lossless-coding: False has no effect with secure-aggregation and a model in float32",
        ),
        (
            {"resume": "/runs/a", "output-dir": "/runs", "run-name": "b"},
            "run-name: 'b' has no effect with resume, which continues that run's record",
        ),
        (
            {"resume": "/runs/a", "output-dir": "/other"},
            "output-dir: '/other' has no effect with resume, which continues that run's record",
        ),
    ],
)
def test_what_has_no_effect_is_named(changes, line):
    assert idle_settings({**DEFAULTS, **changes}) == [line]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedprox", "fedprox-mu": 0.5},
        {"strategy": "flwr:FedAdam", "flwr-arguments": "eta = 0.1"},
        {"partitioner": "dirichlet", "dirichlet-alpha": 1.0},
        {"dataset": "cifar10", "data-dir": "/x"},
        {"prowd-finetune-every": 2, "prowd-finetune-steps": 5},
        {"low-bit-training": "integer", "integer-learning-rate": 4.0},
        {"prowd-mask": "random", "prowd-mask-at-least": 0.5},
        {"strategy": "package.module:Class", "strategy-options": "a = 1"},
        {"bit-mix": "8:1.0", "activation-bits": 4, "prowd-reference": "global"},
        {"resume": "/runs/a", "output-dir": "/runs", "run-name": "a"},
        {"strategy": "package.module:Class", "bit-mix": "32:1.0", "broadcast": "nearest"},
        {"prowd-finetune-every": 1, "prowd-ladder": "8,32"},
        {"lossless-coding": False, "server-device": "cpu"},
        {"secure-aggregation": True, "secure-threshold": 0.8, "secure-float-bits": 24},
        {"secure-aggregation": True, "broadcast": "nearest", "lossless-coding": False},
        {"strategy": "package.module:Class", "secure-aggregation": True, "secure-min-group": 5},
        {"secure-aggregation": True, "secure-small-groups": "merge"},
        {"strategy": "local", "broadcast": "calibrated", "server-device": "cpu"},
        {"strategy": "local", "broadcast": "nearest", "lossless-coding": False},
        {"strategy": "local", "server-device": "cpu", "resume": "/runs/a"},
        {
            "strategy": "fedcom",
            "bit-mix": "32:1.0",
            "fedcom-bits": 4,
            "lossless-coding": False,
        },
    ],
)
def test_what_has_an_effect_is_not(changes):
    assert idle_settings({**DEFAULTS, **changes}) == []


def test_networked_nodes_have_their_own_widths():
    changes = {**DEFAULTS, "bit-mix": "32:1.0", "activation-bits": 4}
    assert idle_settings(changes, simulated=False) == [
        "bit-mix: '32:1.0' has no effect with networked nodes, which declare their own"
    ]


@pytest.mark.parametrize(
    ("model", "calibrates", "told"),
    [("cnn", False, True), ("cnn", True, False), ("resnet8", False, False)],
)
def test_calibration_of_no_normalization_is_told(model, calibrates, told):
    settings = Settings(model=model, calibrate_normalization=calibrates)
    lines = idle_with_model(settings, build_model(model, 1, 8, 10, 0))
    line = "calibrate-normalization: False has no effect with model=cnn, which has no BatchNorm"
    assert lines == ([line] if told else [])
