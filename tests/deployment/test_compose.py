"""What docker-compose.yml, the Dockerfile and the Caddyfile say, resolved; none is started."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args
from PIL import Image

from client_app.node import node_of, width_of
from client_app.state_store import state_folder
from core.settings import Settings
from deploy.samples import fill
from server_app.app import main
from task.interface import Node

PROJECT = Path(__file__).parents[2]
DEFAULTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
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
        if name not in ("credentials", "register", "operator", "samples"):
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


WIDTHS = {"int4": 4, "int8-a": 8, "int8-b": 8, "float32": 32}


def test_each_site_has_data_of_its_own_and_keeps_its_own_state(compose):
    """By the rules of the app: no partition, no number of sites."""
    for site in SITES:
        [word] = compose["services"][site]["command"]
        node_config = parse_config_args([word.removeprefix("--node-config=")])
        assert declared(node_config) == WIDTHS[site]
        assert node_config["data-path"] == "/srv/prowd/data"
        app = compose["services"][f"{site}-clientapp"]
        assert mounts(app)[f"state-{site}"]["target"] == "/srv/prowd/state"
        assert app["command"] == [f"--runtime-api-address={site}:9094"]


def declared(node_config):
    node = node_of(node_config)
    assert node == Node(data_path=node_config["data-path"])
    assert state_folder(node_config, "run1") == Path("/srv/prowd/state/run1/device")
    return width_of(node_config, node, Settings(), simulated=False)


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


DATA = {
    "serverapp": ("test-data", "PROWD_TEST_DATA"),
    "int4-clientapp": ("data-int4", "PROWD_DATA_INT4"),
    "int8-a-clientapp": ("data-int8-a", "PROWD_DATA_INT8_A"),
    "int8-b-clientapp": ("data-int8-b", "PROWD_DATA_INT8_B"),
    "float32-clientapp": ("data-float32", "PROWD_DATA_FLOAT32"),
}


def readers(project):
    """Return the services that see data, and what of it."""
    return {
        name: mount
        for name, service in project["services"].items()
        for mount in service.get("volumes", [])
        if mount["target"] == "/srv/prowd/data"
    }


def test_each_site_and_the_server_see_their_own_data_and_cannot_change_it(compose):
    found = readers(compose)
    assert {name: mount["source"] for name, mount in found.items()} == {
        name: volume for name, (volume, _) in DATA.items()
    }
    assert all(mount["type"] == "volume" and mount["read_only"] for mount in found.values())
    # Nobody else has these volumes, but for what fills those of the sites to try it.
    sites = [volume for volume, _ in DATA.values() if volume != "test-data"]
    for name, service in compose["services"].items():
        others = mounts(service).keys() & {volume for volume, _ in DATA.values()}
        if name == "samples":
            assert others == set(sites)
        elif name not in DATA:
            assert not others


def test_a_folder_of_the_host_takes_a_volumes_place(resolved, tmp_path):
    """One a site; `samples` writes into none of them."""
    folders = {variable: str(tmp_path / variable) for _, variable in DATA.values()}
    project = resolved(**folders)
    found = readers(project)
    for name, (_, variable) in DATA.items():
        assert (found[name]["type"], found[name]["source"]) == ("bind", folders[variable])
        assert found[name]["read_only"]
    samples = project["services"]["samples"]["volumes"]
    assert {mount["type"] for mount in samples} == {"volume"}


def test_the_samples_are_of_all_sites_and_of_no_use_to_the_server(compose):
    service = compose["services"]["samples"]
    targets = {v["source"]: v["target"] for v in service["volumes"]}
    assert targets == {f"data-{site}": f"/srv/prowd/samples/{site}" for site in SITES}
    assert service["command"] == ["python", "-m", "deploy.samples", *targets.values()]
    assert service["profiles"] == ["samples"]
    assert service["restart"] == "no"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    fill([folder / site for site in SITES])
    return folder


def test_samples_of_two_sites_share_no_image(samples):
    names = {site: [path.name for path in (samples / site).rglob("*.png")] for site in SITES}
    # Of 1797 digits a fifth is the test set, which no site gets; every fourth of the others.
    assert [len(own) for own in names.values()] == [360, 359, 359, 359]
    assert len({name for own in names.values() for name in own}) == 1437


def test_samples_take_the_place_of_no_data(tmp_path, capsys):
    own = tmp_path / "int4" / "cats" / "1.png"
    own.parent.mkdir(parents=True)
    own.touch()
    fill([tmp_path / "int4"])
    assert capsys.readouterr().out == "int4: has data, left as it is\n"
    assert [path.name for path in tmp_path.rglob("*.png")] == ["1.png"]


def chapter():
    page = (PROJECT / "docs" / "deploy.md").read_text()
    return page.split("## In containers\n")[1].split("\n## ")[0]


def run_of_the_page(number, data, tmp_path):
    """Do a run of the page in this process, with folders as the sites' mounts; its one round."""
    commands = [line for line in chapter().replace("\\\n", "").splitlines() if "flwr run" in line]
    given = shlex.split(commands[number].split("--stream")[1])
    small = {"num-server-rounds": 1, "model": "toy:net", "server-buffer": 32}
    config = {**DEFAULTS, **parse_config_args(given[1:]), **small}
    config |= {"output-dir": str(tmp_path), "run-name": "run", "node-wait": 1.0}
    nodes = {}
    for number, site in enumerate(SITES):
        nodes[number] = ClientAppNode(0, 1, config)
        nodes[number].config = {"bits": WIDTHS[site], "data-path": str(data / site)}
        nodes[number].lose_state()
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    return json.loads((tmp_path / "run" / "rounds.jsonl").read_text())


def test_the_pages_first_run_is_on_the_samples(samples, tmp_path):
    """The server's own digits are of the same classes and shape."""
    entry = run_of_the_page(0, samples, tmp_path)
    assert entry["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert set(entry["accuracy"]) == {"4", "8", "32", "average"}
    assert "evaluated_by_clients" not in entry


def test_the_pages_second_run_is_on_ones_own_folders(tmp_path):
    rng = np.random.default_rng(0)
    for site in SITES:
        for number in range(12):
            folder = tmp_path / site / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    entry = run_of_the_page(1, tmp_path, tmp_path)
    assert entry["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert {"worst-4", "worst-8", "worst-32"} <= entry["evaluated_by_clients"].keys()


def test_the_page_says_what_the_file_has(compose):
    ran = set(re.findall(r"docker compose run --rm (\S+)", chapter()))
    assert ran == {"samples", "operator"}
    assert ran <= compose["services"].keys()
    named = set(re.findall(r"^(PROWD_\w+)=", chapter(), re.M))
    assert named == {name for _, name in DATA.values()}


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
    # A volume has the owner of the folder that it is first mounted on.
    assert "sites/$site clientapps/$site ../samples/$site" in dockerfile
