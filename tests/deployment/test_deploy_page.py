"""docs/deploy.md, as it is typed: every host in a network of its own."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from containers import PATIENCE, command, wait_until
from host import PROJECT, Host, activated, copy_project, split_before_flwr_run

pytestmark = pytest.mark.deployment

REASONS = {
    "missing": "node-config bits: None is not a bit-width; allowed: 2 to 16, or 32",
    "wrong": "node-config bits: 17 is not a bit-width; allowed: 2 to 16, or 32",
}


def blocks(title):
    """Return the commands under a heading of the page."""
    chapter = (PROJECT / "docs" / "deploy.md").read_text().split(f"## {title}\n")[1].split("\n#")[0]
    return re.findall(r"```bash\n(.*?)```", chapter, flags=re.S)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """The commands of both shells, with two devices more that do not say a width; the host."""
    folder = tmp_path_factory.mktemp("readme")
    copy_project(folder)
    [superlink], [config, run] = (found := blocks("On one host, to try it"))[:1], found[1:]
    devices, run = split_before_flwr_run(run)
    with Host(folder) as host:
        host.start(superlink, "superlink.log")
        wait_until(lambda: "Uvicorn running" in host.read("superlink.log"), "the SuperLink")
        # `bits` missing, and wrong.
        for port, bits, log in ((9096, "", "missing.log"), (9097, " bits=17", "wrong.log")):
            node_config = f"partition-id=0 num-partitions=2{bits}"
            host.start(
                f"flower-supernode --insecure --superlink 127.0.0.1:8000 --port {port} "
                f"--node-config '{node_config}'",
                log,
            )
        host.start(config + devices, "devices.log")
        wait_until(lambda: activated(host, "superlink.log") == 4, "all devices are connected")
        host.start(run, "shell.log").wait(timeout=PATIENCE)
        yield host


def test_the_run_completes_with_the_two_devices(tried):
    output = tried.read("shell.log")
    assert "prowd: completed" in output
    assert re.search(r"partition 0 of 2, 8 bits, \d+ examples", output)
    assert re.search(r"partition 1 of 2, 32 bits, \d+ examples", output)
    assert "clients 2 of 2" in output


@pytest.mark.parametrize("kind", ["missing", "wrong"])
def test_a_device_without_a_width_is_refused_on_both_sides(tried, kind):
    reason = REASONS[kind]
    server = [line for line in tried.read("shell.log").splitlines() if reason in line]
    assert len(server) == 1
    assert re.search(r"Node \d+ is refused: ", server[0])
    assert f"prowd: this node cannot take part: {reason}" in tried.read(f"{kind}.log")


@dataclass(frozen=True)
class Federation:
    """The hosts of the chapter on several hosts, while all processes on them are up."""

    server: Host
    sites: dict[str, Host]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The commands on a server and two sites, each at its own end of a link."""
    folder = tmp_path_factory.mktemp("several")
    make, start, first, run = blocks("On several hosts, with TLS and authentication")
    variables, run = split_before_flwr_run(run)
    second = first.replace("int8", "float32").replace("id=0", "id=1").replace("bits=8", "bits=32")
    with ExitStack() as hosts:
        server = hosts.enter_context(Host(new(folder / "server"), "server"))
        copy_project(server.folder)
        server.start(make, "make.log").wait(timeout=PATIENCE)
        scripts, sites = {"int8": first, "float32": second}, {}
        for number, name in enumerate(scripts):
            names = [("fed.example.org", f"10.232.{number}.1")]
            site = hosts.enter_context(Host(new(folder / f"site-{name}"), name, ".", names))
            connect(server, site, number)
            sites[name] = site
            # The app of a run comes from the server: a site has its keys alone.
            shutil.copytree(server.folder / "prowd" / "keys" / "sites" / name, site.folder / name)
        server.start(start, "start.log").wait(timeout=PATIENCE)
        for name, script in scripts.items():
            sites[name].start(script, "site.log")
        wait_until(lambda: activated(server, "prowd/superlink.log") == 2, "both sites are there")
        server.start(variables + run, "run.log").wait(timeout=PATIENCE)
        yield Federation(server, sites)


def new(folder):
    folder.mkdir()
    return folder


def connect(server, site, number):
    """Lay a cable between two hosts."""
    link = ["type", "veth", "peer", "name", "uplink", "netns", site.name]
    command("ip", "-n", server.name, "link", "add", f"site{number}", *link)
    for host, device, address in (
        (server, f"site{number}", f"10.232.{number}.1/24"),
        (site, "uplink", f"10.232.{number}.2/24"),
    ):
        command("ip", "-n", host.name, "address", "add", address, "dev", device)
        command("ip", "-n", host.name, "link", "set", device, "up")


def test_several_hosts_complete_a_run(several):
    assert "int8: registered" in several.server.read("start.log")
    output = several.server.read("run.log")
    assert "prowd: completed" in output, output
    assert re.search(r"partition 0 of 2, 8 bits, \d+ examples", output)
    assert re.search(r"partition 1 of 2, 32 bits, \d+ examples", output)
    assert "clients 2 of 2" in output


STRANGER = (
    "flower-supernode --superlink fed.example.org:8443 --root-certificates int8/ca.crt --port 9095 "
    "--node-config 'partition-id=0 num-partitions=2 bits=8'"
)


def test_a_site_cannot_bring_a_supernode_of_its_own(several):
    """It registers itself, which a SuperLink allows that is not told to authenticate them.

    With keys of its own: `test_intruders.py`.
    """
    site = several.sites["int8"]
    code = site.start(STRANGER, "stranger.log").wait(timeout=PATIENCE)
    output = site.read("stranger.log")
    assert code != 0
    assert "Exit Code: 305" in output
    assert "All SuperNodes must be registered" in output


def test_the_superlinks_port_is_not_in_reach_of_a_site(several):
    """Its other interfaces do not authenticate; a site reaches the proxy alone."""

    def dial(host, name, port):
        script = f"python -c \"import socket; socket.create_connection(('{name}', {port}), 600)\""
        return host.start(script, "dial.log").wait(timeout=PATIENCE)

    site = several.sites["int8"]
    assert dial(several.server, "127.0.0.1", 8000) == 0
    assert dial(site, "fed.example.org", 8443) == 0
    assert dial(site, "fed.example.org", 8000) != 0
    assert "Connection refused" in site.read("dial.log")


def test_the_quick_start_keeps_its_default_connection(tmp_path):
    """With no configuration before: Flower writes its own only where there is no file."""
    [script] = [b for b in blocks("On one host, to try it") if "superlink.lab" in b]
    env = {k: v for k, v in os.environ.items() if k != "FLWR_HOME"}
    env |= {"HOME": str(tmp_path), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", script], env=env, check=True, capture_output=True)
    held = tomllib.loads((tmp_path / ".flwr" / "config.toml").read_text())["superlink"]
    assert held["default"] == "local"
    assert held["local"]["address"] == ":local:"
    assert held["lab"] == {"address": "127.0.0.1:8000", "insecure": True}
