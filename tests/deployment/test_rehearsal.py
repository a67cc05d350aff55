"""docker-compose.yml does what it says."""


def test_a_sound_start_needs_no_restarts(resumed):
    assert resumed.exits == {"credentials": [0], "register": [0]}


def test_a_run_completes_with_all_four_sites(rehearsal, resumed):
    assert resumed.status == "finished:completed"
    assert rehearsal.summary("killed")["status"] == "completed"
    assert (rehearsal.results("killed") / "model.safetensors").exists()
    for entry in resumed.rounds:
        assert entry["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
        assert set(entry["accuracy"]) == {"4", "8", "32", "average"}


def test_after_its_serverapp_was_killed_it_goes_on_from_the_last_round(resumed):
    assert resumed.killed_status == "finished:failed"
    assert [entry["round"] for entry in resumed.rounds] == [1, 2]
    assert resumed.rounds[:1] == resumed.before
