"""What docker-compose.yml, the Dockerfile and the Caddyfile say, resolved; nothing is started."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SITES = ["int4", "int8-a", "int8-b", "float32"]
# What each service may see of the keys, by volume.
KEYS = {
    "superlink": {"keys-server"},
    "serverapp": {"keys-serverapp"},
    "register": {"keys-operator"},
    "operator": {"keys-operator"},
    "proxy": {"keys-proxy"},
    **{site: {f"keys-{site}"} for site in SITES},
    **{f"{site}-clientapp": {f"keys-{site}-clientapp"} for site in SITES},
}
# Flower writes there.
WRITABLE_KEYS = {"register", "operator"}


def mounts(service):
    return {volume["source"]: volume for volume in service.get("volumes", [])}


def test_no_service_is_root_and_only_the_proxy_is_published(compose):
    services = compose["services"]
    assert {s["user"] for s in services.values()} == {"49999:49999"}
    assert [name for name, s in services.items() if s.get("ports")] == ["proxy"]
    for name, service in services.items():
        if name not in ("credentials", "register", "operator"):
            assert service["restart"] == "unless-stopped", name


def test_every_service_is_confined(compose):
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else [])
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"], name
        assert service["pids_limit"] > 0, name
        assert int(service["mem_limit"]) > 0, name


def test_sites_share_no_network_with_each_other_or_the_server(compose):
    joined = {name: set(s.get("networks") or {}) for name, s in compose["services"].items()}
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


@pytest.mark.parametrize("name", KEYS)
def test_a_service_holds_no_keys_but_its_own(compose, name):
    held = {k: v for k, v in mounts(compose["services"][name]).items() if k.startswith("keys")}
    assert held.keys() == KEYS[name]
    assert all(v.get("read_only") for v in held.values()) == (name not in WRITABLE_KEYS)


def test_the_keys_of_every_party_are_made(compose):
    service = compose["services"]["credentials"]
    made = {v["source"]: v["target"] for v in service["volumes"]}
    assert made.keys() == {*set().union(*KEYS.values()), "keys-authority"}
    root = "/srv/prowd/keys"
    for site in SITES:
        assert made[f"keys-{site}"] == f"{root}/sites/{site}"
        assert made[f"keys-{site}-clientapp"] == f"{root}/clientapps/{site}"
    words = service["command"]
    assert words[words.index("--sites") + 1 :] == SITES


def test_each_site_is_a_partition_and_keeps_its_own_state(compose):
    for number, site in enumerate(SITES):
        [word] = compose["services"][site]["command"]
        assert word.startswith(f"--node-config=partition-id={number} num-partitions={len(SITES)} ")
        app = compose["services"][f"{site}-clientapp"]
        assert mounts(app)[f"state-{site}"]["target"] == "/srv/prowd/state"
        assert app["command"] == [f"--runtime-api-address={site}:9094"]


def words_of(service):
    return [*(service.get("entrypoint") or []), *(service.get("command") or [])]


def test_the_superlink_has_tls_and_asks_its_nodes_and_its_superexec_who_they_are(compose):
    words = compose["services"]["superlink"]["command"]
    assert words[0] == "flower-superlink"
    assert "--enable-supernode-auth" in words
    flags = dict(word.split("=", 1) for word in words if "=" in word)
    keys = "/srv/prowd/keys/server"
    assert flags["--ssl-ca-certfile"] == f"{keys}/ca.crt"
    assert flags["--ssl-certfile"] == f"{keys}/server.crt"
    assert flags["--ssl-keyfile"] == f"{keys}/server.key"
    assert flags["--superexec-auth-secret-file"] == f"{keys}/superexec.secret"
    assert flags["--isolation"] == "process"


def test_services_are_insecure_only_towards_their_own_site(compose):
    services = compose["services"]
    insecure = {name for name, service in services.items() if "--insecure" in words_of(service)}
    # A ClientApp's process reaches its site's SuperNode alone.
    assert insecure == {f"{site}-clientapp" for site in SITES}
    for name in SITES:
        words = words_of(services[name])
        assert "--superlink=proxy:8443" in words
        assert "--root-certificates=/srv/prowd/keys/ca.crt" in words
        assert "--auth-supernode-private-key=/srv/prowd/keys/node.key" in words
    assert "--root-certificates=/srv/prowd/keys/ca.crt" in words_of(services["serverapp"])


def test_caddy_may_write_where_it_is_told_to(compose):
    """Its image sets both, to folders that a read-only root without them refuses."""
    proxy = compose["services"]["proxy"]
    assert proxy["tmpfs"] == ["/tmp"]
    for key in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        assert proxy["environment"][key].startswith("/tmp/")


@pytest.fixture(scope="module")
def proxy():
    """What the Caddyfile makes of the one server that it describes."""
    if shutil.which("caddy") is None:
        pytest.skip("caddy is not installed")
    words = ["caddy", "adapt", "--config", PROJECT / "deploy" / "Caddyfile"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [server] = json.loads(done.stdout)["apps"]["http"]["servers"].values()
    return server


def test_the_proxy_bounds_what_the_superlink_holds_before_it_asks_who_sends_it(proxy):
    limits = {}
    for route in proxy["routes"][:-1]:
        [path] = route["match"][0]["path"]
        [inner] = route["handle"][0]["routes"]
        body, passed = inner["handle"]
        limits[path] = body["max_size"]
        assert passed["transport"]["max_conns_per_host"] == 256
    # The first that matches is taken. Flower's pieces have 5 MiB and a head.
    assert list(limits.items()) == [
        ("/v1/fleet/push-object", 6_000_000),
        ("/v1/fleet/*", 256_000),
    ]


def test_the_proxy_waits_for_no_request_without_end(proxy):
    """But for ten minutes for a piece of a model on a slow line."""
    second = 10**9
    assert proxy["read_header_timeout"] == 30 * second
    assert proxy["read_timeout"] == 600 * second
    # These limits are of HTTP/1.1's connections.
    assert proxy["protocols"] == ["h1"]


def test_clients_and_server_find_data_and_cannot_change_it(compose):
    for name in ("serverapp", *(f"{site}-clientapp" for site in SITES)):
        data = mounts(compose["services"][name])["data"]
        assert data["target"] == "/srv/prowd/data"
        assert data["read_only"]


def test_the_image_is_built_once(compose):
    services = compose["services"].items()
    assert [name for name, s in services if "build" in s] == ["credentials"]
    assert {s["image"] for name, s in services if name != "proxy"} == {"prowd:0.1.0"}


def test_the_image_holds_every_package_and_every_sites_folder():
    """The rehearsal mounts the whole project, and would not miss one."""
    dockerfile = (PROJECT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) \1$", dockerfile, flags=re.M)
    built = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = built["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(copied) == sorted([*packages, "deploy"])
    assert re.search(r'^ARG SITES="(.*)"$', dockerfile, flags=re.M).group(1).split() == SITES
