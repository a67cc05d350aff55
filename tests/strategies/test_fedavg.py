"""FedAvg against numbers worked by hand and against Flower's own FedAvg."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from quant import QuantizedTensor, Update
from strategies import FedAvg


def constant(value):
    return lambda state: {name: torch.full_like(t, value) for name, t in state.items()}


def test_mean_is_weighted_by_examples():
    state = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    clients = [
        ScriptedClient(0, 2, 32, constant(1.0), examples=10),
        ScriptedClient(1, 2, 32, constant(4.0), examples=30),
    ]
    new = run_round(FedAvg(context=with_w()), federation(clients, state), state)
    # (10 * 1 + 30 * 4) / 40 = 3.25
    assert new["w"].tolist() == [[3.25] * 3] * 2
    assert new["b"].tolist() == [3.25, 3.25]


def test_low_bit_codes_are_averaged_as_the_values_they_stand_for():
    state = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    codes = torch.tensor([[7, -7], [1, 0]], dtype=torch.int16)
    scale = torch.tensor([0.5, 0.25])
    floats = {"b": torch.tensor([1.0, -1.0])}
    four_bit = Update(4, "weights", {"w": QuantizedTensor(codes, scale)}, floats)
    clients = [
        ScriptedClient(0, 2, 4, lambda _: four_bit),
        ScriptedClient(1, 2, 32, constant(1.0)),
    ]
    new = run_round(FedAvg(context=with_w()), federation(clients, state), state)
    # 4-bit values: [[3.5, -3.5], [0.25, 0]]; mean with all ones.
    assert new["w"].tolist() == [[2.25, -1.25], [0.625, 0.5]]
    assert new["b"].tolist() == [1.0, 0.0]


def test_float32_clients_agree_with_flowers_fedavg():
    generator = torch.Generator().manual_seed(3)
    state = {"conv.weight": torch.randn(8, 3, 3, 3, generator=generator), "bias": torch.zeros(8)}
    sent = [
        {n: torch.randn(t.shape, generator=generator) for n, t in state.items()} for _ in range(5)
    ]
    examples = [7, 100, 31, 2, 60]
    clients = [ScriptedClient(i, 5, 32, lambda _, i=i: sent[i], examples[i]) for i in range(5)]
    ours = run_round(FedAvg(context=with_w()), federation(clients, state), state)

    replies = []
    for tensors, count in zip(sent, examples, strict=True):
        arrays = ArrayRecord({n: Array(t.numpy()) for n, t in tensors.items()})
        metrics = MetricRecord({"num-examples": count})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    theirs, _ = FlowerFedAvg().aggregate_train(1, replies)
    for name in state:
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("rounds", [2])
def test_flowers_own_start_drives_it(rounds):
    """The stock loop of Flower's Strategy works, so that other Flower apps can use ours."""
    state = {"w": torch.zeros(2, 2)}
    plus_one = lambda s: {n: t + 1 for n, t in s.items()}  # noqa: E731
    clients = [ScriptedClient(i, 2, 32, plus_one) for i in range(2)]
    grid = federation(clients, state)
    initial = ArrayRecord({n: Array(t.numpy()) for n, t in state.items()})
    result = FedAvg(context=with_w()).start(grid, initial, num_rounds=rounds)
    assert result.arrays["w"].numpy().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert result.train_metrics_clientapp[2]["train-loss"] == pytest.approx(0.5)
