"""Which updates are too large, by hand; what becomes of them stands in test_hostile.py."""

import pytest
import torch

from exchange.replies import all_small, norms_of, scale_of, too_large


def test_the_bound_by_hand():
    def norms(*values):
        return {i: {"parameters": v, "statistics": 0.0} for i, v in enumerate(values)}

    sent = {"parameters": 1.0, "statistics": 0.0}
    assert too_large(norms(0.1, 10.0, 0.2), sent, 10) == {}
    assert too_large(norms(0.1, 10.1, 0.2), sent, 10) == {
        1: "its parameters have a norm of 10.1; norm-bound 10 allows 10"
    }
    # All leave the small model far behind: the median is what is usual.
    assert too_large(norms(20, 30, 40, 299), sent, 10) == {}
    assert list(too_large(norms(20, 30, 40, 301), sent, 10)) == [3]
    # Of two, the smaller one; one alone is held against the model.
    assert list(too_large(norms(20, 201), sent, 10)) == [1]
    assert too_large(norms(10.0), sent, 10) == {}
    assert list(too_large(norms(10.1), sent, 10)) == [0]
    assert too_large(norms(0.1, 1e7, 0.2), sent, 0) == {}
    assert too_large({}, sent, 10) == {}


@pytest.mark.parametrize("others", [0, 1, 2])
def test_statistics_may_grow_as_the_square_in_any_company(others):
    """Variances do, and with weights that honest training makes larger they are far larger."""
    sent = {"parameters": 1.0, "statistics": 2.0}
    updates = {i: {"parameters": 1.0, "statistics": 2.0} for i in range(1, 1 + others)}
    updates[0] = {"parameters": 1.0, "statistics": 200.0}
    assert too_large(updates, sent, 10) == {}
    updates[0]["statistics"] = 201.0
    assert too_large(updates, sent, 10) == {
        0: "its statistics have a norm of 201; norm-bound 10 allows 200"
    }


def test_what_is_small_beside_the_model_needs_no_others():
    sent = {"parameters": 1.0, "statistics": 2.0}

    def small(parameters, statistics):
        first = {"parameters": 1.0, "statistics": 2.0}
        return all_small([first, {"parameters": parameters, "statistics": statistics}], sent, 10)

    assert small(10.0, 200.0)
    assert not small(10.1, 200.0)
    assert not small(10.0, 201.0)
    # What is no number is not small.
    assert not small(float("nan"), 1.0)
    assert not small(1.0, float("inf"))


def test_norms_by_hand():
    state = {
        "a": torch.tensor([[3.0]]),
        "b": torch.tensor([4.0]),
        "running_var": torch.full((4,), 2.0),
    }
    assert norms_of(state) == scale_of(state) == {"parameters": 5.0, "statistics": 4.0}
    zeros = {name: torch.zeros_like(t) for name, t in state.items()}
    assert norms_of(zeros) == {"parameters": 0.0, "statistics": 0.0}
    assert scale_of(zeros) == {"parameters": 2**0.5, "statistics": 2.0}
    assert scale_of({}) == {"parameters": 0.0, "statistics": 0.0}
