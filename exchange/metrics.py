"""What the clients of a round report, averaged into Flower's records."""

from collections.abc import Mapping, Sequence

from flwr.app import MetricRecord

from exchange.protocol import Report


def training_metrics(reports: Sequence[Report]) -> MetricRecord:
    """Average what clients saw in training, weighted by examples."""
    total = sum(r.num_examples for r in reports)
    return MetricRecord(
        {
            "num-examples": total,
            "train-loss": sum(r.loss * r.num_examples for r in reports) / total,
            "train-accuracy": sum(r.accuracy * r.num_examples for r in reports) / total,
            "train-seconds": sum(r.seconds for r in reports),
        }
    )


def evaluation_metrics(reports: Mapping[int, Sequence[Report]]) -> MetricRecord:
    """Average accuracy and loss over the clients of each width, and over all, each client alike."""
    groups = {str(bits): group for bits, group in sorted(reports.items())}
    groups["average"] = [report for group in reports.values() for report in group]
    record = MetricRecord()
    for name, group in groups.items():
        record[f"accuracy-{name}"] = sum(r.accuracy for r in group) / len(group)
        record[f"loss-{name}"] = sum(r.loss for r in group) / len(group)
    return record
