"""Times as people read them."""

import pytest

from core.clock import clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.9, "1:05"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_hours_are_named_where_there_are_any(seconds, text):
    assert clock(seconds) == text
