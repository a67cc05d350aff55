"""ProWD's lead, worked by hand."""

import pytest

from prowd.publish.margins import margins, to_markdown


def runs(system, accuracies, per_round=1_000_000, scenario="50-50"):
    """One run a seed: its result is the mean of the last three accuracies."""
    for seed, curve in enumerate(accuracies):
        points = [
            {"round": r, "uplink_bytes": r * per_round, "accuracy": a}
            for r, a in enumerate(curve, start=1)
        ]
        yield {
            "scenario": scenario,
            "system": system,
            "seed": seed,
            "accuracy": {"average": sum(curve[-3:]) / 3},
            "uplink_bytes": len(curve) * per_round,
            "curve": points,
        }


RESULTS = [
    *runs("ProWD", [[0.3, 0.53, 0.55, 0.57, 0.59], [0.3, 0.55, 0.57, 0.59, 0.61]], 900_000),
    *runs("FedAvg", [[0.2, 0.3, 0.38, 0.40, 0.42], [0.2, 0.3, 0.40, 0.42, 0.44]]),
    *runs("GroupedAvg", [[0.2, 0.3, 0.45, 0.45, 0.45]] * 2),
    *runs("FedCOM", [[0.2, 0.4, 0.52, 0.54, 0.56]] * 2),
    *runs("all-Float32", [[0.3, 0.6, 0.62, 0.62, 0.62]] * 2),
]


def test_margins_by_hand():
    found = margins(RESULTS, "50-50")
    assert found.best_baseline == "FedCOM"
    assert found.ours == pytest.approx(0.58)
    # 0.62 - 0.58 over 0.62 - 0.54.
    assert found.distance_share == pytest.approx(0.5)
    assert found.naive == {"FedAvg": pytest.approx(0.41), "GroupedAvg": pytest.approx(0.45)}
    # In rounds 2 to 4 ProWD has 0.54, 0.56 and 0.58 on average: 0.56 is more than FedCOM's 0.54,
    # which FedCOM has of its last three.
    assert (found.our_bytes, found.baseline_bytes) == (3_600_000, 5_000_000)


def test_a_single_evaluation_that_is_as_accurate_is_not_enough():
    swings = runs("ProWD", [[0.3, 0.55, 0.45, 0.60, 0.60]], 900_000)
    assert margins([*RESULTS[2:], *swings], "50-50").our_bytes == 5 * 900_000


def test_a_baseline_with_a_part_of_ours_is_none():
    helped = runs("FedCOM-calibrated-broadcast", [[0.6] * 5])
    assert margins([*RESULTS, *helped], "50-50").best_baseline == "FedCOM"


def test_an_accuracy_that_is_never_reached_is_said_so():
    worse = [*RESULTS[2:], *runs("ProWD", [[0.1, 0.2, 0.3, 0.3, 0.3]])]
    assert margins(worse, "50-50").our_bytes is None
    assert "| 5.0 / never |" in to_markdown(worse)


def test_the_table():
    row = "| 50-50 | 62.00 | 58.00 | FedCOM 54.00 | 50% | +17.00 | +13.00 | 5.0 / 3.6 |"
    assert to_markdown(RESULTS).splitlines()[2:] == [row]


@pytest.mark.parametrize(
    ("ceiling", "shown"), [(0.56, "above it"), (0.58, "none"), (0.54, "above it")]
)
def test_at_the_ceiling_there_is_no_distance(ceiling, shown):
    results = [*RESULTS[:-2], *runs("all-Float32", [[0.3, 0.5, *[ceiling] * 3]])]
    assert margins(results, "50-50").distance_share is None
    assert f"| FedCOM 54.00 | {shown} | +17.00 |" in to_markdown(results)


def test_without_the_systems_that_it_speaks_of_there_is_no_table():
    assert to_markdown(RESULTS[2:]) == ""
    assert margins(RESULTS, "80-20") is None
