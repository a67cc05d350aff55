"""docker-compose.yml does what it says."""

import pytest

pytestmark = pytest.mark.deployment


def test_a_sound_start_needs_no_restarts(story):
    assert story.exits == {"credentials": [0], "register": [0]}


def test_a_run_completes_with_all_four_sites(rehearsal, story):
    assert story.status == "finished:completed"
    assert rehearsal.summary("run")["status"] == "completed"
    assert (rehearsal.results("run") / "model.safetensors").exists()
    for entry in (story.rounds[0], story.rounds[-1]):
        assert entry["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
        assert set(entry["accuracy"]) == {"4", "8", "32", "average"}


def test_after_its_serverapp_was_killed_it_resumes_from_the_last_round(story):
    assert story.killed_status == "finished:failed"
    assert [entry["round"] for entry in story.rounds] == [1, 2, 3, 4]
    assert story.rounds[:1] == story.before


def test_each_site_trains_on_images_that_only_it_has(rehearsal, story):
    held = [
        {path.name for path in (rehearsal.folder / "volumes" / f"data-{site}").glob("*/*.png")}
        for site in ("int4", "int8-a", "int8-b", "float32")
    ]
    assert [len(names) for names in held] == [64, 84, 104, 124]
    assert len(set().union(*held)) == sum(map(len, held))
    assert sorted(story.numbers.values()) == ["0", "1", "2", "3"]
