"""What the rehearsed run survives of what goes wrong in it; `Story` tells in which order."""

import re

import pytest

pytestmark = pytest.mark.deployment

# Flower gives a node or its app up after a minute.
GIVEN_UP = "Node Unavailable|stopped responding"


def test_what_failed_is_left_out_and_recorded(story):
    _, second, third, _ = story.rounds
    int4, int8_a, int8_b, float32 = story.numbers.values()
    assert second["clients"] == {"sampled": 4, "aggregated": 1, "rejected": 0, "failed": 3}
    assert second["left_out"].keys() == {int8_a, int8_b, float32}
    assert "the accelerator is on fire" in second["left_out"][int8_a]
    assert third["clients"] == {"sampled": 4, "aggregated": 2, "rejected": 0, "failed": 2}
    assert third["left_out"].keys() == {int4, int8_a}
    for reason in (
        second["left_out"][int8_b],
        second["left_out"][float32],
        third["left_out"][int8_a],
    ):
        assert re.search(GIVEN_UP, reason)
    assert third["left_out"][int4] == "no reply in time"


def test_only_what_came_in_time_is_in_the_model(story):
    """The one good reply of round 2, of a known size; the late one of round 3 never, also not in
    round 4, when it came."""
    first, second, third, fourth = story.rounds
    assert second["uplink_bytes"] == {"4": first["uplink_bytes"]["4"]}
    assert "4" not in third["uplink_bytes"]
    assert fourth["uplink_bytes"] == first["uplink_bytes"]


def test_all_come_back_by_themselves(rehearsal, story):
    """The killed SuperNode is refused until its old connection has lapsed, and tries again."""
    assert story.rounds[3]["clients"]["aggregated"] == 4
    assert rehearsal.services["float32"].exits


def test_the_superlink_was_killed_in_the_last_round(rehearsal, story):
    assert len(rehearsal.services["superlink"].exits) == 1
