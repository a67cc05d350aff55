"""The script that makes keys and certificates."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

SCRIPT = Path(__file__).parents[2] / "deploy" / "credentials.py"
NAME = "fed.example.org"


def attempt(folder, *sites, name=NAME):
    words = [sys.executable, SCRIPT, "--folder", folder, "make", "--names", name]
    return subprocess.run([*words, "--sites", *sites], capture_output=True, text=True)


def make_here(folder, *sites):
    """Make the keys in this process, which takes less time; the reason of a refusal."""
    try:
        runpy.run_path(str(SCRIPT))["make"](folder, [NAME], list(sites), "127.0.0.1:8000")
    except SystemExit as refusal:
        return refusal.code
    return ""


def make(folder, *sites, name=NAME):
    done = attempt(folder, *sites, name=name)
    assert done.returncode == 0, done.stderr
    return contents(folder)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("**/*") if p.is_file()}


def verify(folder, party, *name):
    """Check a certificate by another implementation, openssl."""
    words = ["openssl", "verify", "-x509_strict", "-CAfile", folder / "authority/ca.crt", *name]
    words.append(folder / party / "server.crt")
    done = subprocess.run(words, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def public_key(content, load=serialization.load_pem_private_key):
    return load(content, None).public_key()


def test_a_site_is_added_without_changing_what_is_there(tmp_path):
    before = make(tmp_path, "a", "b")
    after = make(tmp_path, "a", "b", "c")
    assert {path: after[path] for path in before} == before
    assert after.keys() - before.keys() == {
        "operator/sites/c.pub",
        "sites/c/ca.crt",
        "sites/c/node.key",
        "sites/c/superexec.secret",
        "clientapps/c/superexec.secret",
    }


def test_each_partys_secrets_are_its_own_and_readable_to_no_other(tmp_path):
    files = make(tmp_path, "a", "b")
    secrets = [p for p in files if p.endswith((".key", ".secret"))]
    # Each superexec holds the secret of the process that it serves, and no other.
    assert len(secrets) == 11
    assert len({files[p] for p in secrets}) == 8
    assert all((tmp_path / path).stat().st_mode & 0o077 == 0 for path in secrets)
    assert {p for p in files if p.startswith(("operator", "serverapp", "clientapps/a"))} == {
        "operator/ca.crt",
        "operator/config.toml",
        "operator/sites/a.pub",
        "operator/sites/b.pub",
        "serverapp/ca.crt",
        "serverapp/superexec.secret",
        "clientapps/a/superexec.secret",
    }


def test_the_certificates_are_the_authoritys_for_the_names_given(tmp_path):
    make(tmp_path, "a")
    for party in ("server", "proxy"):
        assert verify(tmp_path, party, "-verify_hostname", NAME) == ""
        assert verify(tmp_path, party, "-verify_ip", "127.0.0.1") == ""


def test_other_names_give_other_certificates_and_keep_the_keys(tmp_path):
    before = make(tmp_path, "a")
    after = make(tmp_path, "a", name="new.example.org")
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"server/server.crt", "proxy/server.crt"}
    assert verify(tmp_path, "proxy", "-verify_hostname", "new.example.org") == ""
    assert verify(tmp_path, "proxy", "-verify_hostname", NAME) != ""


# Of a site, what the key stands for lies with the operator.
REFUSED = {"authority/ca.key", "sites/a/node.key"}


def test_whatever_is_missing_is_made_anew_and_fits_or_is_refused(tmp_path):
    """Whichever file it is: as after an interruption, or a mistake."""
    for path in make(tmp_path, "a"):
        before = contents(tmp_path)
        (tmp_path / path).unlink()
        reason = make_here(tmp_path, "a")
        after = contents(tmp_path)
        if path in REFUSED:
            assert "is missing" in reason
            assert "\n" not in reason
            assert after.keys() == before.keys() - {path}
            (tmp_path / path).write_bytes(before[path])
            continue
        assert reason == "", path
        assert after.keys() == before.keys()
        check_fitting(after)


def check_fitting(files):
    authority = x509.load_pem_x509_certificate(files["authority/ca.crt"])
    assert authority.public_key() == public_key(files["authority/ca.key"])
    for party in ("server", "proxy"):
        certificate = x509.load_pem_x509_certificate(files[f"{party}/server.crt"])
        certificate.verify_directly_issued_by(authority)
        assert certificate.public_key() == public_key(files[f"{party}/server.key"])
    for path in ("operator/ca.crt", "sites/a/ca.crt", "serverapp/ca.crt"):
        assert files[path] == files["authority/ca.crt"]
    node_key = public_key(files["sites/a/node.key"], serialization.load_ssh_private_key)
    assert serialization.load_ssh_public_key(files["operator/sites/a.pub"]) == node_key
    for app, party in (("serverapp", "server"), ("clientapps/a", "sites/a")):
        assert files[f"{app}/superexec.secret"] == files[f"{party}/superexec.secret"]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_at_any_write_it_completes_the_next_time(tmp_path, monkeypatch):
    """At the moment before a file gets its name: what is there is whole."""
    number = 0
    while True:
        folder, calls = tmp_path / str(number), iter([True] * number)

        def replace(path, target, calls=calls):
            if not next(calls, False):
                raise Killed
            path.rename(target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            make_here(folder, "a")
            break
        except Killed:
            number += 1
        monkeypatch.undo()
        assert make_here(folder, "a") == ""
        files = contents(folder)
        assert not [path for path in files if path.endswith(".part")]
        check_fitting(files)
    assert number == len(contents(folder))


@pytest.mark.parametrize("site", ["../evil", "..", "a/b", "", ".a"])
def test_a_site_that_is_no_name_of_a_folder_is_refused(tmp_path, site):
    done = attempt(tmp_path / "keys", site)
    assert done.returncode == 2
    assert "letters, digits" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_address_of_the_superlink_is_not_ignored(tmp_path):
    make(tmp_path, "a")
    config = tmp_path / "operator" / "config.toml"
    config.write_text(config.read_text().replace(":8000", ":9000"))
    done = attempt(tmp_path, "a")
    assert done.returncode == 1
    assert "config.toml has another address" in done.stderr


def test_a_key_of_another_kind_is_one_line(tmp_path):
    make(tmp_path, "a")
    [path] = tmp_path.rglob("ca.key")
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.PEM, *form)
    )
    assert make_here(tmp_path, "a") == (
        f"{path} is no key of an elliptic curve; remove it for a new one"
    )
