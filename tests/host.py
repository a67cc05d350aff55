"""A host with a network of its own, on which a page's commands are typed."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from containers import PATIENCE

PROJECT = Path(__file__).parents[1]


class Host:
    """A network namespace, as Flower's default ports may be taken on the machine itself.

    Commands are typed in its folder `place`; it knows itself and the given names.
    """

    def __init__(self, folder, name="readme", place="prowd", names=()):
        self.folder = folder
        self.place = place
        # The rehearsal, perhaps in this process too, has namespaces of its services' names.
        self.name = f"pw{os.getpid()}-host-{name}"
        self.processes = []
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self.env = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, script, log):
        with open(self.folder / log, "w") as file:
            # `ip netns exec` gives the command mounts of its own.
            mount = f"mount --bind {self.folder / 'hosts'} /etc/hosts"
            words = ["ip", "netns", "exec", self.name, "bash", "-ec", f"{mount}\n{script}"]
            # Flower gives up an app that a loaded machine does not let begin within a minute.
            words = ["nice", "-n", "-5", *words]
            process = subprocess.Popen(
                words,
                env=self.env,
                cwd=self.folder / self.place,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def __enter__(self):
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        subprocess.run(["ip", "-n", self.name, "link", "set", "lo", "up"], check=True)
        return self

    def __exit__(self, *error):
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.name], check=True)


def copy_project(folder):
    """What a user has: a checkout."""
    for program in ("ip", "caddy"):
        if os.geteuid() != 0 or shutil.which(program) is None:
            pytest.skip(f"a host of its own needs root and {program}")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs")
    shutil.copytree(PROJECT, folder / "prowd", ignore=ignore)


def split_before_flwr_run(script):
    """Return what comes before the run, and the run, with a longer wait for nodes.

    On a loaded machine devices take longer to start, and to answer, than a run waits for them.
    """
    before, _, run = script.partition("flwr run")
    assert run.count("num-server-rounds=2") == 1
    patient = f"num-server-rounds=2 node-wait={PATIENCE}"
    return before, "flwr run" + run.replace("num-server-rounds=2", patient)


def activated(host, log):
    return host.read(log).count('activate-node HTTP/1.1" 200')
