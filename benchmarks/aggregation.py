"""Reading and averaging the updates of a hundred clients, against Flower on their float32."""

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.grid import quietly, reporting_grid, weights_of
from benchmarks.measure import Figure, ratio, report, side_by_side
from core.constructors import Broadcast
from exchange.states import to_arrays
from strategies import FedAvg, StrategyContext

_CLIENTS, _REPEATS, _GOAL = 100, 7, 0.2
# Whether codes are entropy-coded, and from codes that the client was sent.
_FORMS = {
    "packed": (False, False),
    "coded": (True, False),
    "coded from the start": (True, True),
}
_LAYERS = 46  # a weight and a bias each: 92 tensors, a million values


def main() -> None:
    """Time a round's aggregation, from the replies as they came to the next model."""
    quietly()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for bits in (2, 4, 8):
        figures += [_figure(bits, form) for form in _FORMS]
    report("aggregation", figures)


def _model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = {}
    for layer in range(_LAYERS):
        model[f"{layer}.weight"] = torch.randn(48, 50, 3, 3, generator=generator)
        model[f"{layer}.bias"] = torch.randn(48, generator=generator)
    return model


def _figure(bits: int, form: str) -> Figure:
    model = _model()
    arrays = to_arrays(model)
    records = [
        RecordDict({"arrays": to_arrays(model), "metrics": MetricRecord({"num-examples": 10.0})})
        for _ in range(_CLIENTS)
    ]
    coded, from_start = _FORMS[form]
    broadcast: Broadcast = "nearest" if from_start else "float32"
    context = StrategyContext(broadcast=broadcast, quantized=weights_of(model))
    strategy = FedAvg(context=context)
    grid = reporting_grid(model, [bits] * _CLIENTS, coded, from_start)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))

    def ours() -> None:
        strategy.round_log.aggregated.clear()
        strategy.aggregate_train(1, replies)
        assert len(strategy.round_log.aggregated) == _CLIENTS

    seconds = side_by_side(
        {"ours": ours, "flower": lambda: aggregate_arrayrecords(records, "num-examples")}, _REPEATS
    )
    label = f"{bits}-bit, {form}, against Flower's float32"
    return ratio(label, seconds["ours"], seconds["flower"], _GOAL)
