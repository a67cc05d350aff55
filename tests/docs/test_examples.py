"""Every name that a library user calls has an example in its docstring, and the example runs."""

import doctest
import inspect
import sys

import numpy as np
import pytest
import torch
from federation import InProcessGrid, be_in_a_run
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

import prowd
from exchange.protocol import CONFIG, INSTRUCTION, MODEL, to_array

NAMES = {name: getattr(prowd, name) for name in dir(prowd)}
CALLABLE = sorted(
    name
    for name, value in NAMES.items()
    if (callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)))
    and hasattr(value, "__module__")
)


def a_message():
    """What a client is sent in round 1: the model is one bias, in float32."""
    instruction = prowd.Instruction(server_round=1, downlink_bits=32)
    model = prowd.encode(prowd.quantize_state({"bias": torch.ones(2)}, 32))
    content = {
        INSTRUCTION: ConfigRecord(instruction.to_record()),
        CONFIG: ConfigRecord({"epochs": 3}),
        MODEL: ArrayRecord({MODEL: to_array(model)}),
    }
    return Message(RecordDict(content), dst_node_id=1, message_type="train")


@pytest.mark.parametrize("name", CALLABLE)
def test_the_example_runs(name, tmp_path, monkeypatch):
    """With the public names, torch, nn and np, and a client's message and a server's grid."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    be_in_a_run()
    value = NAMES[name]
    module = vars(sys.modules[value.__module__])
    grid = InProcessGrid({1: lambda message: Message(RecordDict(), reply_to=message)})
    given = {"torch": torch, "nn": nn, "np": np, "message": a_message(), "grid": grid}
    test = doctest.DocTestParser().get_doctest(
        value.__doc__ or "", {**module, **NAMES, **given}, name, None, None
    )
    assert test.examples, "there is no example"
    assert not any(example.options.get(doctest.SKIP) for example in test.examples)
    said = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
