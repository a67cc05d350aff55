"""The services of a resolved compose file as real processes, each in namespaces of its own.

Every service has its own network (one interface a compose network, on a bridge of that network),
its own process tree and mounts (named volumes at their targets, a private /srv and /tmp), runs as
the user that the file names, may write no more of /srv than the file lets it, and is started again
as its restart policy says. What is not rehearsed is the image, whose folders test_compose.py
compares, and the limits on memory and processes: the processes see this machine's programs and the
tests' environment.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

# Seconds after which something that must come is given up: many times what a loaded machine takes.
PATIENCE = 1200.0


def command(*words: object) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


class Containers:
    """A compose project in namespaces.

    Parameters
    ----------
    project : mapping
        The resolved compose file.
    folder : Path
        For volumes and logs.
    app : Path
        What the image holds in ``/srv/prowd/app``.
    """

    def __init__(self, project: Mapping, folder: Path, app: Path) -> None:
        self.folder = folder
        self.app = app
        self.services = {name: Service(name, s, self) for name, s in project["services"].items()}
        self._project = project
        self._prefix = f"pw{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._ports = 0

    def namespace(self, service: str) -> str:
        return f"{self._prefix}-{service}"

    def build_networks(self) -> None:
        """Make a bridge for every network, and plug every service into its own."""
        self._make_namespace(self._switch)
        members = {name: list(s.get("networks") or {}) for name, s in self._spec().items()}
        networks = list(self._project["networks"])
        for number in range(len(networks)):
            command("ip", "-n", self._switch, "link", "add", f"br{number}", "type", "bridge")
            command("ip", "-n", self._switch, "link", "set", f"br{number}", "up")
        addresses: dict[str, dict[str, str]] = {network: {} for network in networks}
        for host, (name, joined) in enumerate(members.items(), start=2):
            self._make_namespace(self.namespace(name))
            for network in joined:
                number = networks.index(network)
                addresses[network][name] = f"10.231.{number}.{host}"
                self._plug(name, number, addresses[network][name])
        for name, joined in members.items():
            known = {n: a for network in joined for n, a in addresses[network].items()}
            lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in known.items())]
            (self.folder / f"{name}.hosts").write_text("\n".join(lines) + "\n")
        self.addresses = addresses

    def up(self) -> None:
        """Start the services that need no profile, in the order that they depend on each other."""
        waiting = {name: s for name, s in self._spec().items() if not s.get("profiles")}
        while waiting:
            ready = [n for n, s in waiting.items() if not waiting.keys() & s.get("depends_on", {})]
            for name in ready:
                for other, how in waiting[name].get("depends_on", {}).items():
                    if how["condition"] == "service_completed_successfully":
                        self.services[other].wait_completed()
                self.services[name].start()
            waiting = {n: s for n, s in waiting.items() if n not in ready}

    def run(self, service: str, *words: str) -> subprocess.CompletedProcess:
        """Run another command in place of a service's own and of its entrypoint."""
        return subprocess.run(
            self.services[service].words(list(words)),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def set_link(self, service: str, network: str, state: str) -> None:
        """Cut (``down``) or mend (``up``) a service's link to a network."""
        interface = f"net{list(self._project['networks']).index(network)}"
        command("ip", "-n", self.namespace(service), "link", "set", interface, state)

    def down(self) -> None:
        for service in self.services.values():
            service.stop()
        for name in self._namespaces:
            command("ip", "netns", "delete", name)

    def _spec(self) -> Mapping[str, Mapping]:
        return self._project["services"]

    def _make_namespace(self, name: str) -> None:
        command("ip", "netns", "add", name)
        self._namespaces.append(name)
        command("ip", "-n", name, "link", "set", "lo", "up")

    def _plug(self, service: str, number: int, address: str) -> None:
        self._ports += 1
        port, name = f"p{self._ports}", self.namespace(service)
        own = ["name", f"net{number}", "netns", name]
        peer = ["peer", "name", port]
        command("ip", "-n", self._switch, "link", "add", *own, "type", "veth", *peer)
        command("ip", "-n", self._switch, "link", "set", port, "master", f"br{number}", "up")
        command("ip", "-n", name, "address", "add", f"{address}/24", "dev", f"net{number}")
        command("ip", "-n", name, "link", "set", f"net{number}", "up")


class Service:
    """One service: its process, started again as the restart policy says."""

    def __init__(self, name: str, spec: Mapping, containers: Containers) -> None:
        self.name = name
        self.exits: list[int] = []
        self._spec = spec
        self._containers = containers
        self._process: subprocess.Popen | None = None
        self._ended = threading.Event()
        self._stopped = threading.Event()

    @property
    def log(self) -> str:
        return (self._containers.folder / f"{self.name}.log").read_text()

    def start(self) -> None:
        self._spawn()
        threading.Thread(target=self._look_after, daemon=True).start()

    def wait_completed(self) -> None:
        if not self._ended.wait(PATIENCE) or self.exits[-1]:
            raise RuntimeError(f"{self.name} did not complete: {self.log}")

    def kill(self) -> None:
        """Kill the container's first process, and so all; the restart policy starts it again."""
        first = next(_descendants(self._process.pid), self._process.pid)
        os.kill(first, signal.SIGKILL)

    def stop(self) -> None:
        self._stopped.set()
        if self._process is not None and self._process.poll() is None:
            self.kill()
            self._process.wait()

    def process_ids(self, word: str) -> list[int]:
        """Return this service's processes that have a word in their command line."""
        return [pid for pid in _descendants(self._process.pid) if word in _command_line(pid)]

    def words(self, words: list[str] | None = None) -> list[str]:
        """Return the command that enters the namespaces and runs the service's, or another."""
        spec, root = self._spec, self._containers.folder
        uid, gid = spec["user"].split(":")
        environment = {
            "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            # Fifteen processes share the machine's cores.
            "OMP_NUM_THREADS": "1",
            **spec.get("environment", {}),
        }
        script = [
            "mount -t tmpfs -o mode=755 tmpfs /srv && mkdir -p /srv/prowd/home",
            f"chown -R {uid}:{gid} /srv/prowd",
            *_bind(self._containers.app, "/srv/prowd/app", read_only=True),
        ]
        for volume in spec.get("volumes", []):
            source = Path(volume["source"])
            if volume["type"] == "volume":
                source = root / "volumes" / volume["source"]
                source.mkdir(parents=True, exist_ok=True)
                os.chown(source, int(uid), int(gid))
            script += _bind(source, volume["target"], bool(volume.get("read_only")))
        if "networks" in spec:
            script += [f"mount --bind {root / (self.name + '.hosts')} /etc/hosts"]
        script += _private_folders()
        for entry in spec.get("tmpfs", []):
            target, _, options = entry.partition(":")
            if target != "/tmp":
                options = ",".join(filter(None, ["noexec", options]))
                script += [f"mkdir -p {target}", f"mount -t tmpfs -o {options} tmpfs {target}"]
        if spec.get("read_only"):
            script += ["mount -o remount,ro /srv"]
        run = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        run += ["env", "-i", *(f"{k}={v}" for k, v in environment.items())]
        run += words or [*(spec.get("entrypoint") or []), *spec["command"]]
        script += [f"cd {spec.get('working_dir', '/')}", f"exec {shlex.join(run)}"]
        entry = ["ip", "netns", "exec", self._containers.namespace(self.name), "unshare"]
        entry += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*entry, "sh", "-ec", "\n".join(script)]

    def _spawn(self) -> None:
        # Flower gives up who is silent for a minute, also where a loaded machine is the reason: the
        # services come before what else runs here, and those that answer before the apps.
        superexec = any("flower-superexec" in word for word in self.words())
        words = ["nice", "-n", "-5" if superexec else "-10", *self.words()]
        with open(self._containers.folder / f"{self.name}.log", "a") as log:
            self._process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def _look_after(self) -> None:
        policy = self._spec.get("restart", "no")
        # As Docker does: twice as long each time, up to a minute.
        pause = 0.1
        while True:
            self.exits.append(self._process.wait())
            again = policy == "unless-stopped" or (policy == "on-failure" and self.exits[-1])
            if not again or self._stopped.wait(pause):
                self._ended.set()
                return
            pause = min(2 * pause, 60.0)
            self._spawn()


def _private_folders() -> list[str]:
    """An empty /tmp and /root; Python and the tests' environment, which may lie there, are kept."""
    kept = [Path(p).resolve() for p in dict.fromkeys([sys.prefix, sys.base_prefix])]
    kept = [shlex.quote(str(p)) for p in kept if p.parts[1] in ("tmp", "root")]
    places = {path: f"/srv/kept/{number}" for number, path in enumerate(kept)}
    return [
        *(f"mkdir -p {place} && mount --bind {path} {place}" for path, place in places.items()),
        "mount -t tmpfs -o mode=1777,noexec tmpfs /tmp",
        "mount -t tmpfs -o mode=755 tmpfs /root",
        *(f"mkdir -p {path} && mount --bind {place} {path}" for path, place in places.items()),
    ]


def _bind(source: Path, target: str, read_only: bool = False) -> list[str]:
    quoted = shlex.quote(str(source))
    make = f"mkdir -p {target}" if source.is_dir() else f"touch {target}"
    lines = [make, f"mount --bind {quoted} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if read_only else lines


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from _descendants(int(child))


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def wait_until(condition, what: str) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.3)
