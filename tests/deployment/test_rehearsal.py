"""docker-compose.yml as it is: every service's own command, in namespaces of its own."""


def test_a_run_completes_with_all_four_sites(rehearsal):
    run_id = rehearsal.start_run("all", num_server_rounds=2)
    assert rehearsal.wait_for_run(run_id, 180) == "finished:completed"
    assert rehearsal.summary("all")["status"] == "completed"
    for entry in rehearsal.rounds("all"):
        assert entry["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
        assert set(entry["accuracy"]) == {"4", "8", "32", "average"}
