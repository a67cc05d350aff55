"""The next model by each strategy's rule: in float64 with NumPy, or by Flower's own class."""

import numpy as np
from federation import InProcessGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from matrix.cells import OWN_SETTINGS, SERVER_STEP
from matrix.payloads import Values, float64, returned_by
from matrix.running import Trace

# Server's step sizes on a mean difference; other rules take the mean of weights.
STEPS = {"fedpaq": 1.0, "fedcom": SERVER_STEP, "fedcomgate": SERVER_STEP}
GROUPED = ("grouped-avg", "grouped-avg-asymmetric")
MEANS = ("fedavg", "fedprox", *GROUPED)


def next_models(trace: Trace, strategy: str) -> list[Values]:
    """Return the models that a strategy ought to make of a trace's updates, round by round.

    Each begins with the model that the trace's round began with, so that no deviation hides behind
    one of the round before.
    """
    if strategy.startswith("flwr:"):
        return _by_flower(trace, strategy)
    return [_by_rule(trace, strategy, server_round) for server_round in trace.rounds]


def _by_rule(trace: Trace, strategy: str, server_round: int) -> Values:
    start = float64(trace.starts[server_round])
    if strategy == "local":
        return start
    updates = _updates(trace, server_round)
    if strategy in GROUPED:
        # The model that a run passes on is that of the widest clients.
        widest = max(bits for bits, _, _ in updates)
        updates = [update for update in updates if update[0] == widest]
    total = sum(examples for _, examples, _ in updates)
    mean = {n: sum(u[n] * (count / total) for _, count, u in updates) for n in start}
    if strategy in MEANS:
        return mean
    # BatchNorm's statistics are no weights: no step size applies to them.
    steps = {n: 1.0 if "running" in n else STEPS[strategy] for n in start}
    moved = {n: start[n] + steps[n] * mean[n] for n in start}
    return {n: np.maximum(v, 0) if n.endswith("running_var") else v for n, v in moved.items()}


def _by_flower(trace: Trace, strategy: str) -> list[Values]:
    """Run Flower's class by hand over what the clients sent, from the first round on."""
    arguments = str(OWN_SETTINGS[strategy].get("flwr-arguments", ""))
    pairs = [pair.split(" = ") for pair in arguments.split(", ") if pair]
    rule = getattr(flower, strategy.removeprefix("flwr:"))(**{k: float(v) for k, v in pairs})
    # It learns the round's model when it configures the training of its nodes.
    nodes = InProcessGrid(dict.fromkeys(range(2), lambda message: message))
    models = []
    for server_round in trace.rounds:
        start = trace.starts[server_round]
        record = ArrayRecord({n: Array(t.numpy()) for n, t in start.items()})
        list(rule.configure_train(server_round, record, ConfigRecord(), nodes))
        made, _ = rule.aggregate_train(
            server_round,
            [_as_reply(u, n, list(start)) for _, n, u in _updates(trace, server_round)],
        )
        values = {name: array.numpy().astype(np.float64) for name, array in made.items()}
        models.append(
            {n: np.maximum(v, 0) if n.endswith("running_var") else v for n, v in values.items()}
        )
    return models


def _updates(trace: Trace, server_round: int) -> list[tuple[int, int, Values]]:
    """Width, examples and values of the updates of a round."""
    found = []
    for exchange in trace.trained(server_round):
        update = returned_by(trace, exchange)
        if update is not None:
            bits, count = trace.cell.widths[exchange.partition], exchange.num_examples
            found.append((bits, count, float64(update.dequantize())))
    return found


def _as_reply(values: Values, examples: int, names: list[str]) -> Message:
    arrays = ArrayRecord({name: Array(values[name].astype(np.float32)) for name in names})
    metrics = MetricRecord({"num-examples": examples, "loss": 0.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 1, "train")
