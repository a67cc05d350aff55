"""Reading and averaging the updates of a hundred clients, against Flower on their float32."""

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.grid import AnsweringGrid
from benchmarks.measure import Figure, ratio, report, side_by_side
from quant import STYPE, encode_update, quantize_state
from strategies import FedAvg
from task.protocol import REPORT, UPDATE, Declaration, Report

_CLIENTS, _REPEATS, _GOAL = 100, 7, 0.2
_LAYERS = 46  # a weight and a bias each: 92 tensors, a million values


def main() -> None:
    """Time a round's aggregation, from the replies as they came to the next model."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for bits in (2, 4, 8):
        for coded in (False, True):
            figures.append(_figure(bits, coded))
    report("aggregation", figures)


def _model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = {}
    for layer in range(_LAYERS):
        model[f"{layer}.weight"] = torch.randn(48, 50, 3, 3, generator=generator)
        model[f"{layer}.bias"] = torch.randn(48, generator=generator)
    return model


def _figure(bits: int, coded: bool) -> Figure:
    model = _model()
    payload = encode_update(quantize_state(model, bits), coded=coded, stamp=1)
    declarations = {i + 1: Declaration(i, _CLIENTS, bits, 10, "") for i in range(_CLIENTS)}
    numbers = Report(server_round=1, num_examples=10, loss=1.0, accuracy=0.5, seconds=1.0)

    def answer(client: Declaration) -> RecordDict:
        # A copy for each, as from the network: in nobody's cache.
        update = Array("uint8", (len(payload),), STYPE, bytes(bytearray(payload)))
        return RecordDict(
            {UPDATE: ArrayRecord({UPDATE: update}), REPORT: MetricRecord(numbers.to_record())}
        )

    strategy = FedAvg()
    grid = AnsweringGrid(declarations, answer)
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in model.items()})
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(t.numpy()) for name, t in model.items()}),
                "metrics": MetricRecord({"num-examples": 10.0}),
            }
        )
        for _ in range(_CLIENTS)
    ]
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))

    def ours() -> None:
        strategy.round_log = type(strategy.round_log)()
        new, _ = strategy.aggregate_train(1, replies)
        assert new is not None
        assert len(strategy.round_log.aggregated) == _CLIENTS

    seconds = side_by_side(
        {"ours": ours, "flower": lambda: aggregate_arrayrecords(records, "num-examples")}, _REPEATS
    )
    how = "coded" if coded else "packed"
    label = f"{bits}-bit, {how}, against Flower's float32"
    return ratio(label, seconds["ours"], seconds["flower"], _GOAL)
