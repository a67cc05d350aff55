"""The rounds of a run: train, aggregate, evaluate, record, one line each."""

import time
from collections.abc import Mapping
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from server_app.evaluation import Evaluator
from server_app.record import RunRecord
from strategies import MixedPrecisionStrategy, RoundLog, receive
from strategies.base import State, to_arrays, to_state
from task.settings import Settings


def run_rounds(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    state: State,
    evaluator: Evaluator,
    record: RunRecord,
) -> State:
    """Run all rounds from an initial model and return the last.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    strategy : MixedPrecisionStrategy
        Aggregation.
    settings : Settings
        Number of rounds, timeout, how often to evaluate.
    state : dict of str to Tensor
        Initial float32 model.
    evaluator : Evaluator
        Evaluates the model at each width.
    record : RunRecord
        Written after every round.
    """
    arrays = to_arrays(state)
    # Before the clock starts: waiting for nodes says nothing about the rounds.
    strategy.nodes.gather(grid)
    began = time.monotonic()
    for server_round in range(1, settings.num_server_rounds + 1):
        entry, arrays = _run_round(grid, strategy, settings, server_round, arrays, evaluator)
        record.append_round(entry)
        done = server_round / settings.num_server_rounds
        left = (time.monotonic() - began) * (1 / done - 1)
        log(INFO, "%s", format_round(entry, settings.num_server_rounds, left))
    return to_state(arrays)


def _run_round(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    server_round: int,
    arrays: ArrayRecord,
    evaluator: Evaluator,
) -> tuple[dict[str, object], ArrayRecord]:
    started = time.monotonic()
    messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    # All replies first, so that waiting for clients and working on updates are timed apart.
    replies = list(receive(grid, messages, settings.round_timeout))
    trained = time.monotonic()
    aggregated, metrics = strategy.aggregate_train(server_round, replies)
    del replies
    arrays = arrays if aggregated is None else aggregated
    combined = time.monotonic()
    train_log = strategy.round_log
    last = server_round == settings.num_server_rounds
    accuracy: dict[str, float] = {}
    loss: dict[str, float] = {}
    by_clients: dict[str, float] = {}
    if last or server_round % settings.evaluate_every == 0:
        by_clients = _evaluate_on_clients(grid, strategy, settings, server_round, arrays)
        if strategy.evaluates_on_server:
            accuracy, loss = _evaluate_on_server(strategy, to_state(arrays), evaluator)
        else:
            accuracy = _part(by_clients, "accuracy-")
            loss = _part(by_clients, "loss-")
    ended = time.monotonic()
    entry = {
        "round": server_round,
        "accuracy": accuracy,
        "loss": loss,
        "train_loss": metrics["train-loss"] if metrics else None,
        "uplink_bytes": _by_width(train_log.uplink_bytes),
        "downlink_bytes": _by_width(train_log.downlink_bytes),
        "seconds": {
            "round": ended - started,
            "train": trained - started,
            "aggregate": combined - trained,
            "evaluate": ended - combined,
        },
        "clients": _clients(train_log),
        "left_out": {str(p): r for p, r in (train_log.rejected | train_log.failed).items()},
        settings.strategy: train_log.own,
    }
    if by_clients and strategy.evaluates_on_server:
        entry["evaluated_by_clients"] = by_clients
    return entry, arrays


def _evaluate_on_clients(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    server_round: int,
    arrays: ArrayRecord,
) -> dict[str, float]:
    messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
    replies = receive(grid, messages, settings.round_timeout)
    return dict(strategy.aggregate_evaluate(server_round, replies) or {})


def _evaluate_on_server(
    strategy: MixedPrecisionStrategy, state: State, evaluator: Evaluator
) -> tuple[dict[str, float], dict[str, float]]:
    widths = strategy.nodes.widths()
    scores = {b: evaluator.score(strategy.state_for(b, state), b) for b in widths}
    accuracy = {str(b): score.accuracy for b, score in scores.items()}
    loss = {str(b): score.loss for b, score in scores.items()}
    clients = sum(widths.values())
    accuracy["average"] = sum(scores[b].accuracy * n for b, n in widths.items()) / clients
    loss["average"] = sum(scores[b].loss * n for b, n in widths.items()) / clients
    return accuracy, loss


def format_round(entry: Mapping[str, object], num_rounds: int, left: float) -> str:
    """Return the line that a round shows in the terminal; `left` is the estimate in seconds."""
    accuracy = " ".join(
        f"{width if width == 'average' else width + '-bit'} {value:.2%}"
        for width, value in entry["accuracy"].items()
    )
    clients, seconds = entry["clients"], entry["seconds"]
    up, down = (sum(entry[key].values()) for key in ("uplink_bytes", "downlink_bytes"))
    return (
        f"round {entry['round']}/{num_rounds} | {accuracy or 'not evaluated'} | "
        f"up {format_bytes(up)}, down {format_bytes(down)} | "
        f"clients {clients['aggregated']} of {clients['sampled']} | "
        f"{seconds['round']:.1f} s, {int(left // 60)}:{int(left % 60):02d} left"
    )


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, as in ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _clients(log_: RoundLog) -> dict[str, int]:
    return {
        "sampled": len(log_.sampled),
        "aggregated": len(log_.aggregated),
        "rejected": len(log_.rejected),
        "failed": len(log_.failed),
    }


def _by_width(table: Mapping[int, int]) -> dict[str, int]:
    return {str(bits): size for bits, size in sorted(table.items())}


def _part(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
