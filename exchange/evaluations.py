"""What clients found when they evaluated: validated on receipt, and taken together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import stdev

from flwr.app import ConfigRecord, Message, MetricRecord

from core.run_record import LARGEST_FIGURE
from exchange.protocol import METRICS, MOST_IN_A_NAME, MOST_METRICS, Report
from exchange.replies import BadReply, Ranges, read_report


@dataclass(frozen=True)
class Evaluation:
    """What a client found when it evaluated: its report and, if it sent them, all metrics."""

    report: Report
    metrics: Mapping[str, float] = field(default_factory=dict)


def read_evaluation(reply: Message, server_round: int, ranges: Ranges) -> Evaluation:
    """Read and check what comes back from an evaluation.

    Parameters
    ----------
    reply, server_round, ranges
        As of `read_report`.

    Raises
    ------
    BadReply
        As `read_report` does, or if its metrics cannot be true.
    """
    report = read_report(reply, server_round, ranges)
    if METRICS not in reply.content:
        return Evaluation(report)
    metrics = _metrics_of(reply.content[METRICS])
    for name, value in metrics.items():
        if not (isnan(value) or abs(value) <= LARGEST_FIGURE):
            raise BadReply(f"it reports {value} of {name!r}; allowed: finite numbers")
    name, first = next(iter(metrics.items()))
    if first != report.accuracy:
        raise BadReply(f"it reports {first} of {name!r}, and {report.accuracy}; allowed: the same")
    return Evaluation(report, metrics)


def _metrics_of(record: object) -> dict[str, float]:
    """Return a reply's metrics by name, if they are that by form."""
    held = dict(record) if isinstance(record, ConfigRecord) else {}
    names, values = held.pop("names", None), held.pop("values", None)
    if held or not (isinstance(names, list) and isinstance(values, list)):
        raise BadReply("its metrics are not two lists, of names and of values")
    if not (1 <= len(names) == len(values) == len(set(names)) and len(names) <= MOST_METRICS):
        raise BadReply(
            f"it reports {len(values)} metrics under {len(set(names))} names; allowed: 1 to "
            f"{MOST_METRICS}, each once"
        )
    found: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        if not (isinstance(name, str) and name.isprintable() and 1 <= len(name) <= MOST_IN_A_NAME):
            raise BadReply(
                f"it reports a metric {str(name)[:40]!r}; allowed: printable names of up to "
                f"{MOST_IN_A_NAME} characters"
            )
        if not isinstance(value, float):
            raise BadReply("its metrics are not all floats")
        found[name] = value
    return found


def evaluation_metrics(
    found: Mapping[int, Sequence[Evaluation]], higher_is_better: bool = True
) -> MetricRecord:
    """Average metrics and loss over the clients of each width, and over all, each client alike.

    Parameters
    ----------
    found : mapping of int to sequence of Evaluation
        By width.
    higher_is_better : bool
        Which client is the worst.

    Returns
    -------
    MetricRecord
        ``accuracy-8``, ``loss-8``, ``spread-8`` (standard deviation over its clients, 0 of one) and
        ``worst-8`` for each width, and the same with ``average`` over all clients. Of a task with
        several metrics also ``<name>/mean-8``, and so ``spread``, ``least`` and ``most``, over the
        clients that counted something; of names that most clients have.
    """
    groups = {str(bits): group for bits, group in sorted(found.items())}
    everybody = groups["average"] = [one for group in found.values() for one in group]
    counts = Counter(name for one in everybody for name in one.metrics)
    names = [name for name, count in counts.items() if 2 * count > len(everybody)]
    record = MetricRecord()
    for width, group in groups.items():
        headline = [one.report.accuracy for one in group]
        record[f"accuracy-{width}"] = sum(headline) / len(group)
        record[f"loss-{width}"] = sum(one.report.loss for one in group) / len(group)
        record[f"spread-{width}"] = _spread(headline)
        record[f"worst-{width}"] = min(headline) if higher_is_better else max(headline)
        for name in names if len(names) > 1 else ():
            values = [v for one in group if not isnan(v := one.metrics.get(name, nan))]
            if values:
                record[f"{name}/mean-{width}"] = sum(values) / len(values)
                record[f"{name}/spread-{width}"] = _spread(values)
                record[f"{name}/least-{width}"] = min(values)
                record[f"{name}/most-{width}"] = max(values)
    return record


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
