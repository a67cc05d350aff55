"""A SuperLink of the tests' own, with its own home and ports, ended when they are done."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from containers import PATIENCE, wait_until

PROJECT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
# Flower gives up a SuperLink that is not there in 15 s, an app that is silent for a minute, and Ray
# its own processes after 30 s, also where a loaded machine is the reason.
_RAY_IS_SLOW = "The current node timed out during startup"
_FIRST = ("nice", "-n", "-5") if os.geteuid() == 0 else ()


@dataclass(frozen=True)
class Run:
    """What a finished run left: its folder, what it printed, and Flower's own status."""

    folder: Path
    output: str
    status: str

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def rounds(self) -> list[dict]:
        lines = (self.folder / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


class Flower:
    """`flwr run` against the tests' SuperLink.

    Attributes
    ----------
    modules : Path
        Folder on the `PYTHONPATH` of the SuperLink.
    """

    def __init__(self, home: Path, output_dir: Path, env: dict[str, str]) -> None:
        self.home = home
        self.modules = home / "modules"
        self.output_dir = output_dir
        self.env = env

    def run(self, name: str, federation: str = "", app: Path = PROJECT, **settings) -> Run:
        """Run the app, or a copy of it, to its end; settings in snake_case."""
        # A loaded machine starts its clients slower than in the usual minute.
        where = {"output_dir": str(self.output_dir), "run_name": name, "node_wait": PATIENCE}
        settings = {**where, **settings}
        config = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in settings.items())
        return self.run_config(name, config, federation, app)

    def run_config(self, name: str, config: str, federation: str = "", app: Path = PROJECT) -> Run:
        """Run the app to its end with what stands after `--run-config`."""
        folder = self.output_dir / name
        for _ in range(5):
            done = subprocess.run(
                self.command(config, federation, app),
                env=self.env,
                cwd=self.home,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            if _RAY_IS_SLOW not in done.stdout or (folder / "checkpoint").exists():
                break
            shutil.rmtree(folder)
        run_id = re.search(r"run (\d+)", done.stdout).group(1)
        return Run(folder, done.stdout + done.stderr, self.status(run_id))

    def command(self, config: str, federation: str = "", app: Path = PROJECT) -> list[str]:
        """Return the command that runs the app."""
        command = [str(_BIN / "flwr"), "run", str(app), "--stream", "--run-config", config]
        return [*command, "--federation-config", federation] if federation else command

    def compare(self, plan: Path, output_dir: Path, *options: str) -> subprocess.CompletedProcess:
        """Run `prowd compare` to its end."""
        compare = self.start_compare(plan, output_dir, *options)
        said = compare.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(compare.args, compare.returncode, *said)

    def start_compare(self, plan: Path, output_dir: Path, *options: str) -> subprocess.Popen:
        """Start `prowd compare`."""
        command = [*_FIRST, sys.executable, "-m", "prowd", "compare", str(plan), *options]
        command += ["--output-dir", str(output_dir)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=self.env,
            cwd=PROJECT,
            stdout=pipe,
            stderr=pipe,
            text=True,
            # A shell's background job, as CI may be, hands on that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @contextmanager
    def without_superlink(self, home: Path) -> Iterator["Flower"]:
        """`flwr run` from a new home: it starts a SuperLink of its own, ended as README says."""
        env = {
            **self.env,
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        }
        home.mkdir()
        cold = Flower(home, home / "runs", env)
        try:
            yield cold
        finally:
            [stop] = re.findall(r"^pkill .*", (PROJECT / "README.md").read_text(), re.M)
            assert stop.count("39091") == 1
            port = env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
            subprocess.run(shlex.split(stop.replace("39091", port)), check=True)
            wait_until(lambda: not cold.superlinks(), "the local SuperLink has ended")

    def superlinks(self) -> list[int]:
        """Return the processes of SuperLinks that have this home."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                ours = f"FLWR_HOME={self.home}\0".encode() in (process / "environ").read_bytes()
                if ours and b"flower-superlink" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def status(self, run_id: str) -> str:
        """Return how a run stands for Flower."""
        command = [str(_BIN / "flwr"), "ls", "--run-id", run_id, "--format", "json"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return json.loads(done.stdout)["runs"][0]["status"]


def free_port() -> int:
    """Return a port below those that the system gives to connections, which come and go."""
    while True:
        port = secrets.choice(range(20_000, 30_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def flower(tmp_path_factory):
    home = tmp_path_factory.mktemp("flwr-home")
    (home / "modules").mkdir()
    shutil.copy(PROJECT / "tests" / "toy.py", home / "modules")
    port = free_port()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "tests"\n\n'
        f'[superlink.tests]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = {
        **os.environ,
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{home / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_COLOR": "1",
    }
    superlink = subprocess.Popen(
        [
            *_FIRST,
            str(_BIN / "flower-superlink"),
            "--insecure",
            "--simulation",
            *("--isolation", "subprocess"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--control-api-address", f"127.0.0.1:{free_port()}"),
            *("--log-file", str(home / "superlink.log")),
        ],
        env=env,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", superlink)
        yield Flower(home, tmp_path_factory.mktemp("runs"), env)
    finally:
        os.killpg(superlink.pid, signal.SIGTERM)
        try:
            superlink.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(superlink.pid, signal.SIGKILL)


def _wait_for(url: str, process: subprocess.Popen) -> None:
    def is_up() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"flower-superlink ended with code {process.returncode}")
        try:
            with urlopen(url, timeout=PATIENCE):
                return True
        except OSError:
            return False

    wait_until(is_up, "flower-superlink comes up")
