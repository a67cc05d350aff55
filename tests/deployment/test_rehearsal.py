"""docker-compose.yml: what it says, and that it does."""

import pytest

SITES = ["int4", "int8-a", "int8-b", "float32"]


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


def test_nobody_is_root_and_only_the_proxy_is_published(compose):
    services = compose["services"]
    assert {s["user"] for s in services.values()} == {"49999:49999"}
    assert [name for name, s in services.items() if s.get("ports")] == ["proxy"]
    for name, service in services.items():
        if name not in ("credentials", "register", "operator", "intruder"):
            assert service["restart"] == "unless-stopped", name


def test_sites_share_no_network_with_each_other_or_the_server(compose):
    services = compose["services"].items()
    joined = {name: set(s.get("networks") or {}) for name, s in services if name != "intruder"}
    members = {n: {s for s in joined if n in joined[s]} for n in compose["networks"]}
    assert members.pop("outside") == {"proxy"}
    assert members.pop("core") == {"superlink", "serverapp", "register", "operator", "proxy"}
    for site in SITES:
        assert members.pop(f"uplink-{site}") == {site, "proxy"}
        assert members.pop(site) == {site, f"{site}-clientapp"}
    assert members == {}
    assert not any(
        network.get("internal") is None
        for name, network in compose["networks"].items()
        if name != "outside"
    )


@pytest.mark.parametrize("site", SITES)
def test_a_site_holds_no_keys_but_its_own(compose, site):
    for name in (site, f"{site}-clientapp"):
        mounts = {v["source"]: v for v in compose["services"][name]["volumes"]}
        assert [source for source in mounts if source.startswith("keys")] == [f"keys-{site}"]
        assert mounts[f"keys-{site}"]["read_only"]
