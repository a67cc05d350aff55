"""The rounds of a run: train, aggregate, evaluate, record, one line each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from math import isfinite
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from core.clock import clock
from core.errors import SettingsError
from core.mix import width_name
from core.settings import Settings
from exchange.states import State, to_arrays, to_state
from server_app.account import Account
from server_app.evaluation import Evaluator
from server_app.record import RunRecord
from strategies import FederationError, MixedPrecisionStrategy, RoundLog, receive
from task.evaluation import Score


def run_rounds(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    state: State,
    evaluator: Evaluator,
    record: RunRecord,
    keep: Callable[[int, State], None],
    done: int = 0,
) -> None:
    """Run all rounds from an initial model, with nodes that have been gathered.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    strategy : MixedPrecisionStrategy
        Aggregation.
    settings : Settings
        Number of rounds, timeout, how often to evaluate.
    state : dict of str to Tensor
        Initial float32 model, or that of the last round done.
    evaluator : Evaluator
        Evaluates the model at each width.
    record : RunRecord
        Written after every round.
    keep : callable
        Called with the number of rounds done and their model, after every one.
    done : int
        Rounds that need not be run again.

    Raises
    ------
    FederationError
        If no client could be used in the first round, or by `server_app.unused`.
    """
    arrays = to_arrays(state)
    account = Account(settings, record.spent) if settings.is_private else None
    began = time.monotonic()
    for server_round in range(done + 1, settings.num_server_rounds + 1):
        if account is not None and (reason := account.refusal()):
            if server_round == 1:
                raise SettingsError(reason)
            log(WARNING, "prowd: the run ends after round %d: %s", server_round - 1, reason)
            break
        record.round_begun = server_round
        entry, arrays = _run_round(
            grid, strategy, settings, server_round, arrays, evaluator, account
        )
        seconds_a_round = (time.monotonic() - began) / (server_round - done)
        left = seconds_a_round * (settings.num_server_rounds - server_round)
        record.append_round(entry, strategy.round_log.weights, totals(entry, left))
        # Of few that are drawn each alone, there may be too few.
        by_chance = settings.is_private and settings.fraction_train < 1
        if server_round == 1 and not entry["clients"]["aggregated"] and not by_chance:
            raise FederationError(f"no client could be used in the first round: {_why(entry)}")
        keep(server_round, to_state(arrays))
        log(INFO, "%s", format_round(entry, settings.num_server_rounds, left))
        _end_if_nothing_is_used(strategy, record, is_last=False)
    # Also where no round was left to run.
    _end_if_nothing_is_used(strategy, record, is_last=True)


def is_evaluated(settings: Settings, server_round: int) -> bool:
    """Return whether the model is evaluated after this round."""
    last = server_round == settings.num_server_rounds
    return last or server_round % settings.evaluate_every == 0


def _why(entry: Mapping[str, Any]) -> str:
    """Return why no update was used, though clients were asked."""
    unread = "the strategy has read no update that it was given"
    return str(next(iter(entry["left_out"].values()), entry.get("dropped", unread)))


def _end_if_nothing_is_used(
    strategy: MixedPrecisionStrategy, record: RunRecord, is_last: bool
) -> None:
    if reason := record.unused.fatal(strategy.nodes.partitions(), is_last):
        raise FederationError(reason)


def _run_round(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    server_round: int,
    arrays: ArrayRecord,
    evaluator: Evaluator,
    account: Account | None,
) -> tuple[dict[str, Any], ArrayRecord]:
    started = time.monotonic()
    batches = strategy.training_messages(server_round, arrays, grid)
    replies = receive(grid, batches, settings.round_timeout, strategy.largest_payload)
    aggregated, metrics = strategy.aggregate_train(server_round, replies)
    arrays = arrays if aggregated is None else aggregated
    combined = time.monotonic()
    scores, spent = _Scores(), _spend(account, strategy.round_log)
    is_last = account is not None and bool(account.refusal())
    if is_last or is_evaluated(settings, server_round):
        scores = _evaluate(grid, strategy, settings, server_round, arrays, evaluator)
    ended = time.monotonic()
    trained, evaluated = strategy.round_log, strategy.evaluate_log
    # An aggregate_train of the user's own may not note it.
    received = trained.received or combined
    entry = {
        "round": server_round,
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "train_loss": metrics["train-loss"] if metrics else None,
        "uplink_bytes": _by_width(trained.uplink_bytes),
        "downlink_bytes": _by_width(trained.downlink_bytes + evaluated.downlink_bytes),
        "seconds": {
            "round": ended - started,
            "train": received - started,
            "aggregate": combined - received,
            "evaluate": ended - combined,
        },
        "clients": _clients(trained),
        "left_out": _left_out(trained),
        "left_out_of_evaluation": _left_out(evaluated),
        settings.strategy: trained.own,
    }
    if spent:
        entry["privacy"] = spent
    if trained.dropped:
        # The clients that were asked, to be counted again when the run is resumed.
        entry |= {"dropped": trained.dropped, "asked": sorted(trained.sampled)}
    if trained.secure:
        entry["secure"] = trained.secure
    if trained.complaints:
        entry["complaints"] = trained.complaints
    if trained.unchanged:
        entry["unchanged"] = trained.unchanged
    if scores.by_clients:
        entry["evaluated_by_clients"] = scores.by_clients
    if scores.metrics:
        entry["metrics"] = scores.metrics
    return entry, arrays


def _spend(account: Account | None, trained: RoundLog) -> dict[str, float]:
    """Account a round whose sums were seen; return what its line says, empty if none was."""
    if account is None or trained.noise_multiplier is None:
        return {}
    return account.add(trained.noise_multiplier)


@dataclass(frozen=True)
class _Scores:
    """Accuracy and loss by width and averaged; what clients found, if they evaluated.

    And where the task has several metrics, all of them by width.
    """

    accuracy: Mapping[str, float] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)
    by_clients: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def _evaluate(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    server_round: int,
    arrays: ArrayRecord,
    evaluator: Evaluator,
) -> _Scores:
    by_clients = _evaluate_on_clients(grid, strategy, settings, server_round, arrays)
    if not (strategy.evaluates_on_server and evaluator.has_examples):
        accuracy, loss = _part(by_clients, "accuracy-"), _part(by_clients, "loss-")
        return _Scores(accuracy, loss, by_clients, _metrics_in(by_clients))
    state = to_state(arrays)
    scores = _evaluate_on_server(strategy, server_round, state, evaluator)
    accuracy, loss = _averaged(strategy, scores)
    several = {str(b): dict(s.metrics) for b, s in scores.items() if len(s.metrics) > 1}
    return _Scores(accuracy, loss, by_clients, several)


def _evaluate_on_clients(
    grid: Grid,
    strategy: MixedPrecisionStrategy,
    settings: Settings,
    server_round: int,
    arrays: ArrayRecord,
) -> dict[str, Any]:
    messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
    # Reports only: no client is asked for arrays.
    replies = receive(grid, [lambda: messages], settings.round_timeout, most_bytes=0)
    metrics = strategy.aggregate_evaluate(server_round, replies)
    return dict(metrics.items()) if metrics is not None else {}


def _evaluate_on_server(
    strategy: MixedPrecisionStrategy, server_round: int, state: State, evaluator: Evaluator
) -> dict[int, Score]:
    widths = strategy.nodes.widths()
    scores = {b: evaluator.score(strategy.model_for(b, state), server_round) for b in widths}
    for bits, score in scores.items():
        if not isfinite(score.loss):
            log(WARNING, "prowd: the loss of the model at %d bits is %s", bits, score.loss)
    return scores


def _averaged(
    strategy: MixedPrecisionStrategy, scores: Mapping[int, Score]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return accuracy and loss by width, and over all clients, each counted alike."""
    widths = strategy.nodes.widths()
    accuracy = {str(b): score.accuracy for b, score in scores.items()}
    loss = {str(b): score.loss for b, score in scores.items()}
    clients = sum(widths.values())
    accuracy["average"] = sum(scores[b].accuracy * n for b, n in widths.items()) / clients
    loss["average"] = sum(scores[b].loss * n for b, n in widths.items()) / clients
    return accuracy, loss


def totals(entry: Mapping[str, Any], left: float) -> dict[str, float]:
    """Return what a round's line has besides the entry's own figures, by TensorBoard's tag.

    TensorBoard shows it beside those figures, and so all that the line shows.
    """
    return {
        "uplink_bytes/all": sum(entry["uplink_bytes"].values()),
        "downlink_bytes/all": sum(entry["downlink_bytes"].values()),
        "clients/not_in_the_evaluation": len(entry["left_out_of_evaluation"]),
        "dropped": float("dropped" in entry),
        "unchanged": float("unchanged" in entry),
        "seconds/left": left,
    }


def format_round(entry: Mapping[str, Any], num_rounds: int, left: float) -> str:
    """Return the line that a round shows in the terminal; `left` is the estimate in seconds."""
    also = totals(entry, left)
    accuracy = " ".join(
        f"{width_name(width)} {value:.2%}" for width, value in entry["accuracy"].items()
    )
    accuracy += _of_devices(entry.get("evaluated_by_clients", {}))
    clients, seconds = entry["clients"], entry["seconds"]
    up, down = also["uplink_bytes/all"], also["downlink_bytes/all"]
    missing = _missing(clients, also["clients/not_in_the_evaluation"])
    not_used = "".join(f" | {w}: {entry[w]}" for w in ("dropped", "unchanged") if w in entry)
    return (
        f"round {entry['round']}/{num_rounds} | {accuracy or 'not evaluated'} | "
        f"up {format_bytes(up)}, down {format_bytes(down)} | "
        f"clients {clients['aggregated']} of {clients['sampled']}{missing}{not_used} | "
        f"{_privacy_of(entry)}"
        f"{seconds['round']:.1f} s, {clock(also['seconds/left'])} left"
    )


def _privacy_of(entry: Mapping[str, Any]) -> str:
    """Return what has been spent of differential privacy."""
    spent = entry.get("privacy")
    return f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} | " if spent else ""


def _of_devices(found: Mapping[str, float]) -> str:
    """Return what devices found, each on its own examples: mean, spread and worst, by width."""
    widths = _part(found, "worst-")
    parts = [
        f"{width_name(w)} {found[f'accuracy-{w}']:.2%} ± {found[f'spread-{w}']:.2%}, "
        f"worst {worst:.2%}"
        for w, worst in widths.items()
        if w != "average"
    ]
    return f" | devices: {'; '.join(parts)}" if parts else ""


def _missing(clients: Mapping[str, int], not_evaluated: float) -> str:
    counts = {
        "rejected": clients["rejected"],
        "failed": clients["failed"],
        "not in the evaluation": not_evaluated,
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f" ({named})" if named else ""


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, as in ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _clients(round_log: RoundLog) -> dict[str, int]:
    return {
        "sampled": len(round_log.sampled),
        "aggregated": len(round_log.aggregated),
        "rejected": len(round_log.rejected),
        "failed": len(round_log.failed),
    }


def _left_out(round_log: RoundLog) -> dict[str, str]:
    return {str(partition): reason for partition, reason in round_log.left_out.items()}


def _by_width(table: Mapping[int, int]) -> dict[str, int]:
    return {str(bits): size for bits, size in sorted(table.items())}


def _metrics_in(found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the means of all metrics that clients found, by width and name."""
    by_width: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        name, _, width = key.rpartition("/mean-")
        if name and width != "average":
            by_width.setdefault(width, {})[name] = value
    return by_width


def _part(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
