"""The script that makes keys and certificates."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "credentials.py"


def make(folder, *sites):
    words = [sys.executable, SCRIPT, "--folder", folder, "make", "--names", "fed.example.org"]
    subprocess.run([*words, "--sites", *sites], check=True)
    return {p.relative_to(folder): p.read_bytes() for p in folder.glob("**/*") if p.is_file()}


def test_a_site_is_added_without_changing_what_is_there(tmp_path):
    before = make(tmp_path, "a", "b")
    after = make(tmp_path, "a", "b", "c")
    assert {path: after[path] for path in before} == before
    assert {path.parts[1] for path in after.keys() - before.keys()} == {"c"}


def test_each_partys_secrets_are_its_own_and_readable_to_nobody_else(tmp_path):
    files = make(tmp_path, "a", "b")
    secrets = [p for p in files if p.suffix in (".key", ".secret")]
    assert len(secrets) == len({files[p] for p in secrets}) == 8
    assert all((tmp_path / path).stat().st_mode & 0o077 == 0 for path in secrets)
    assert {p.name for p in files if p.parts[:2] == ("sites", "a")} == {
        "ca.crt",
        "node.key",
        "node.pub",
        "superexec.secret",
    }


def test_the_certificates_are_the_authoritys_for_the_names_given(tmp_path):
    """By another implementation: openssl."""
    make(tmp_path, "a")
    for party in ("server", "proxy"):
        for name in (["-verify_hostname", "fed.example.org"], ["-verify_ip", "127.0.0.1"]):
            words = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "authority/ca.crt"]
            done = subprocess.run(
                [*words, *name, tmp_path / party / "server.crt"], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
