"""A machine that reaches the proxy without a key can do nothing."""

import json
import shutil
import sys

import pytest
from containers import command

pytestmark = pytest.mark.deployment

KEYS = "/srv/prowd/keys"
REAL, FOREIGN = f"{KEYS}/real-ca.crt", f"{KEYS}/authority/ca.crt"

# Of the paths that lead out of /v1/fleet/, if proxy and SuperLink disagree on what a path means.
PATHS = [
    "/v1/control/list-runs",
    "/v1/control/list-nodes",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/health",
    "/openapi.json",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/./../control/list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet\\\\..\\\\control/list-runs",
    "//v1/control/list-runs",
    "/V1/CONTROL/list-runs",
    "https://superlink:8000/v1/control/list-runs",
]
POST = f"""
import http.client, ssl
for path in {PATHS!r}:
    trusted = ssl.create_default_context(cafile="{REAL}")
    connection = http.client.HTTPSConnection("proxy", 8443, context=trusted, timeout=600)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/protobuf")
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    print(connection.getresponse().status)
"""

# Bodies under and over what the proxy passes on, each of an announced and an unannounced length: a
# piece of a model, and the announcement of a reply.
LARGE = f"""
import http.client, ssl
SIZES = {{"push-object": (5_500_000, 6_500_000), "push-messages": (250_000, 300_000)}}
for path, size in ((path, size) for path, sizes in SIZES.items() for size in sizes):
    for announced in (True, False):
        trusted = ssl.create_default_context(cafile="{REAL}")
        connection = http.client.HTTPSConnection("proxy", 8443, context=trusted, timeout=600)
        connection.putrequest("POST", f"/v1/fleet/{{path}}")
        connection.putheader("Content-Type", "application/protobuf")
        if announced:
            connection.putheader("Content-Length", size)
        else:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        block = bytes(50_000)
        try:
            for _ in range(size // len(block)):
                connection.send(block if announced else b"c350\\r\\n" + block + b"\\r\\n")
            connection.send(b"" if announced else b"0\\r\\n\\r\\n")
        except OSError:
            pass  # cut off on the way
        try:
            print(connection.getresponse().status)
        except (OSError, http.client.HTTPException):
            print("cut")
"""


def known_to(rehearsal):
    """Return the runs and nodes that the SuperLink knows."""
    commands = (["ls"], ["supernode", "ls"])
    listed = [rehearsal.run("operator", "flwr", *c, "prowd", "--format", "json") for c in commands]
    runs, nodes = (json.loads(done.stdout) for done in listed)
    return (
        [run["run-id"] for run in runs["runs"]],
        [(node["node-id"], node["status"]) for node in nodes["nodes"]],
    )


@pytest.fixture(scope="module")
def intruder(rehearsal):
    """Run commands as the intruder, who has keys of its own making and the public certificate.

    When all has been tried, the SuperLink knows the runs and nodes that it knew before.
    """
    before = known_to(rehearsal)
    folder = rehearsal.folder / "volumes" / "intruder"
    make = ["make", "--names", "proxy", "--sites", "own", "--superlink", "proxy:8443"]
    script = rehearsal.app / "deploy" / "credentials.py"
    command(sys.executable, script, "--folder", folder, *make)
    shutil.copy(rehearsal.folder / "volumes" / "keys-int4" / "ca.crt", folder / "real-ca.crt")
    config = folder / "operator" / "config.toml"
    config.write_text(config.read_text().replace(str(folder / "operator" / "ca.crt"), REAL))
    command("chown", "-R", "49999:49999", folder)
    yield lambda *words: rehearsal.run("intruder", *words)
    assert known_to(rehearsal) == before


def supernode(*more):
    node_config = "partition-id=0 num-partitions=4 bits=4"
    return "flower-supernode", "--superlink=proxy:8443", f"--node-config={node_config}", *more


CERTIFICATE, KEY = "--root-certificates", f"--auth-supernode-private-key={KEYS}/sites/own/node.key"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((f"{CERTIFICATE}={REAL}", KEY), "Failed to activate SuperNode"),
        ((f"{CERTIFICATE}={REAL}",), "All SuperNodes must be registered"),
        ((f"{CERTIFICATE}={FOREIGN}", KEY), "certificate verify failed"),
    ],
    ids=["unregistered key", "no key", "wrong CA"],
)
def test_a_foreign_supernode_is_refused(intruder, arguments, reason):
    done = intruder(*supernode(*arguments))
    assert done.returncode != 0
    assert "Exit Code: 305" in done.stdout + done.stderr
    assert reason in done.stdout + done.stderr


def test_the_operators_commands_do_not_pass_the_proxy(intruder):
    """What the others ask for is among `PATHS`."""
    done = intruder("flwr", "run", ".", "prowd")
    assert done.returncode != 0
    assert "403 Forbidden" in done.stdout + done.stderr


def test_a_foreign_superexec_gets_no_task(rehearsal, intruder):
    """Even with the true secret, as the proxy does not serve what it would ask for."""
    folder = rehearsal.folder / "volumes"
    shutil.copy(folder / "keys-server" / "superexec.secret", folder / "intruder" / "secret")
    command("chown", "49999", folder / "intruder" / "secret")
    superexec = ["flower-superexec", "--runtime-api-address=proxy:8443"]
    more = f"--superexec-auth-secret-file={KEYS}/secret"
    done = intruder(*superexec, f"--root-certificates={REAL}", more)
    assert done.returncode != 0
    assert "403 Forbidden" in done.stdout + done.stderr


def test_without_the_secret_the_superlink_itself_gives_no_task(rehearsal):
    """On the server's own network, where no proxy stands between."""
    superexec = ["flower-superexec", "--runtime-api-address=superlink:8000"]
    ca = "--root-certificates=/srv/prowd/keys/ca.crt"
    refusals = rehearsal.services["superlink"].log.count("SuperExec authentication failed")
    rehearsal.run("serverapp", *superexec, ca)
    log = rehearsal.services["superlink"].log
    assert log.count("SuperExec authentication failed") == refusals + 1
    assert 'acquire-task HTTP/1.1" 401' in log


def test_no_path_leads_past_the_fleets_interface(intruder):
    done = intruder("python", "-c", POST)
    answers = dict(zip(PATHS, done.stdout.split(), strict=True))
    # 404: passed on as it was written, and the SuperLink has no such path.
    assert set(answers.values()) <= {"403", "404"}, answers
    served = ("/v1/control/", "/v1/runtime/")
    assert {status for path, status in answers.items() if path.startswith(served)} == {"403"}


def test_a_large_request_is_not_passed_on_to_the_superlink(intruder):
    """Which reads it into memory, whole, before it asks who sends it."""
    done = intruder("python", "-c", LARGE)
    answers = done.stdout.split()
    assert len(answers) == 8, done.stderr
    # The SuperLink's own answer to what is no message.
    assert answers[:2] == answers[4:6] == ["400", "400"]
    assert {*answers[2:4], *answers[6:]} <= {"413", "cut"}, answers


@pytest.mark.parametrize(
    ("source", "network", "target", "port"),
    [
        ("intruder", "core", "superlink", 8000),
        ("intruder", "int4", "int4", 9094),
        ("int8-a", "core", "superlink", 8000),
        ("int8-a", "int4", "int4", 9094),
        ("int8-a", "uplink-int4", "int4", 9094),
        ("int8-a-clientapp", "uplink-int8-a", "proxy", 8443),
    ],
)
def test_networks_are_apart(rehearsal, source, network, target, port):
    """The service answers at its own address, and is not in reach from the other network."""
    dial = f"import socket; socket.create_connection(('{{}}', {port}), 600)"
    address = rehearsal.addresses[network][target]
    words = ["python", "-c", dial.format(address)]
    command("ip", "netns", "exec", rehearsal.namespace(target), *words)
    done = rehearsal.run(source, *words)
    assert "Network is unreachable" in done.stderr
