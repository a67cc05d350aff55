"""What a strategy of the user's own has for the checkpoint: kept as it is, or refused by name."""

import math

import numpy as np
import pytest
import torch

from core.errors import SettingsError
from server_app.checkpoint import Checkpoints, Identity, read_checkpoint

IDENTITY = Identity({"strategy": "my.module:Own"}, {}, "data", {}, 2, "1f")


def write(folder, tensors, values):
    Checkpoints(folder, IDENTITY).write(1, 2.0, {"w": torch.ones(2)}, tensors, values)
    return read_checkpoint(folder)


def test_a_model_comes_back_whatever_the_order_of_its_memory(tmp_path):
    """A model of the user's own may begin with weights that lie channels last."""
    weight = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    Checkpoints(tmp_path, IDENTITY).write(0, 0.0, {"w": weight}, {}, {})
    assert torch.equal(read_checkpoint(tmp_path).model["w"], weight)


def test_numbers_of_numpy_and_what_is_not_finite_come_back(tmp_path):
    values = {"best": float("inf"), "seen": np.int64(3), "by": {"4": (1, float("nan"))}}
    tensors = {"m": torch.ones(2, requires_grad=True), "n": torch.arange(6.0).reshape(2, 3).T}
    kept = write(tmp_path, tensors, values)
    assert kept.values["best"] == math.inf
    assert kept.values["seen"] == 3
    assert kept.values["by"]["4"][0] == 1
    assert math.isnan(kept.values["by"]["4"][1])
    assert all(torch.equal(kept.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("tensors", "values", "words"),
    [
        ({}, {"seen": {1, 2}}, "strategy: my.module:Own/checkpoint/seen is {1, 2}, a set"),
        # Python would write it as text, and not read it back as a number.
        ({}, {"by": {4: 0.5}}, "strategy: my.module:Own/checkpoint/by has the key 4"),
        (
            {"m": 3.0},
            {},
            "strategy: the checkpoint of my.module:Own has m, which cannot be wri",
        ),
        (
            {"m": torch.ones(2, dtype=torch.bfloat16)},
            {},
            "strategy: the checkpoint of my.module:Own has m, which cannot be written: TypeError",
        ),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, tensors, values, words):
    write(tmp_path, {}, {"good": 1})
    with pytest.raises(SettingsError) as error:
        write(tmp_path, tensors, values)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
    assert read_checkpoint(tmp_path).values == {"good": 1}
