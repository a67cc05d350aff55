"""Make what a secured federation needs, and register its sites with the SuperLink.

``make`` writes a folder for each party, which holds all that this party may know and nothing more::

    keys/authority    key and certificate of the authority (CA); stays with the operator
    keys/operator     Flower's config.toml, for FLWR_HOME, and the sites' public keys; stays there
    keys/server       certificate and key of the SuperLink, secret of its superexec
    keys/serverapp    the same secret, for the superexec
    keys/proxy        certificate and key of the proxy
    keys/sites/NAME   one site's authentication key, and the secret of its superexec
    keys/clientapps/NAME   the same secret, for the site's superexec

Keys and secrets that are there already are kept, so that a site can be added later. What follows
from them (certificates, public keys) is made again where it is missing or does not fit, as the
certificates do not when the names change. A file is written whole or not at all: after an
interruption ``make`` completes what is there. ``register`` tells the running SuperLink the public
key of every site.
"""

import argparse
import datetime
import ipaddress
import os
import re
import secrets
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_OWN_NAMES = ("localhost", "127.0.0.1")
_AUTHORITY_DAYS, _CERTIFICATE_DAYS = 3650, 825


def make(folder: Path, names: list[str], sites: list[str], superlink: str) -> None:
    """Write the folders of all parties.

    Parameters
    ----------
    folder : Path
        Where they go.
    names : list of str
        Host names and addresses under which SuperLink and proxy are reached.
    sites : list of str
        Names of the sites.
    superlink : str
        ``host:port`` at which the operator reaches the SuperLink.
    """
    key, certificate = _authority(folder / "authority")
    public = certificate.public_bytes(serialization.Encoding.PEM)
    for party in ("operator", "server", "serverapp", "proxy", *(f"sites/{s}" for s in sites)):
        _write(folder / party / "ca.crt", public, secret=False)
    for party in ("server", "proxy"):
        _issue(folder / party, key, certificate, [*names, *_OWN_NAMES])
    _superexec_secret(folder / "server", folder / "serverapp")
    _operator_config(folder / "operator", superlink)
    for site in sites:
        _site_key(folder / "sites" / site, folder / "operator" / "sites" / f"{site}.pub")
        _superexec_secret(folder / "sites" / site, folder / "clientapps" / site)


def register(folder: Path, patience: float) -> None:
    """Register every site's public key, waiting for the SuperLink for `patience` seconds."""
    env = {**os.environ, "FLWR_HOME": str((folder / "operator").resolve())}
    deadline = time.monotonic() + patience
    for path in sorted((folder / "operator" / "sites").glob("*.pub")):
        name = path.stem
        command = ["flwr", "supernode", "register", str(path), "prowd", "--name", name]
        while True:
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            output = done.stdout + done.stderr
            if done.returncode == 0 or "already in use" in output:
                print(f"{name}: registered")
                break
            if time.monotonic() > deadline:
                sys.exit(f"{name} is not registered: {output.strip()}")
            time.sleep(1)


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    path = folder / "ca.crt"
    if path.exists() and not (folder / "ca.key").exists():
        sys.exit(f"{folder} has a certificate, but its ca.key is missing: nothing can be issued")
    key = _private_key(folder / "ca.key")
    if path.exists():
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        if certificate.public_key() != key.public_key():
            sys.exit(f"{folder}: ca.crt is not the certificate of ca.key")
        return key, certificate
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prowd authority")])
    builder = _certificate(name, name, key, _AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    _write(path, certificate.public_bytes(serialization.Encoding.PEM), secret=False)
    return key, certificate


def _issue(
    folder: Path, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, names: list[str]
) -> None:
    key = _private_key(folder / "server.key")
    alternatives = x509.SubjectAlternativeName([_general_name(n) for n in dict.fromkeys(names)])
    path = folder / "server.crt"
    if path.exists() and _fits(path.read_bytes(), key, ca, alternatives):
        return
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"prowd {folder.name}")])
    builder = _certificate(subject, ca.subject, key, _CERTIFICATE_DAYS)
    builder = builder.add_extension(alternatives, critical=False)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(of_issuer, critical=False)
    certificate = builder.sign(ca_key, hashes.SHA384())
    _write(path, certificate.public_bytes(serialization.Encoding.PEM))
    print(f"{folder.name}: certificate issued for {', '.join(dict.fromkeys(names))}")


def _fits(
    content: bytes,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    alternatives: x509.SubjectAlternativeName,
) -> bool:
    """Whether a certificate is this key's, by this authority, for these names, and not run out."""
    certificate = x509.load_pem_x509_certificate(content)
    held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    try:
        certificate.verify_directly_issued_by(ca)
    except InvalidSignature:
        return False
    now = datetime.datetime.now(datetime.UTC)
    return (
        certificate.public_key() == key.public_key()
        and set(held) == set(alternatives)
        and certificate.not_valid_after_utc > now
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        # Clocks of several machines differ.
        not_valid_before=now - datetime.timedelta(hours=1),
        not_valid_after=now + datetime.timedelta(days=days),
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return builder.add_extension(identifier, critical=False)


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _site_key(folder: Path, public: Path) -> None:
    if public.exists() and not (folder / "node.key").exists():
        sys.exit(f"{folder}: node.key is missing; remove {public} too for a new pair")
    # The curve and the format that Flower's SuperNode authentication reads.
    key = _private_key(folder / "node.key", serialization.PrivateFormat.OpenSSH)
    formats = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, key.public_key().public_bytes(*formats), secret=False)


def _superexec_secret(folder: Path, copy: Path) -> None:
    path = folder / "superexec.secret"
    if not path.exists():
        _write(path, secrets.token_bytes(32))
    _write(copy / path.name, path.read_bytes())


def _operator_config(folder: Path, superlink: str) -> None:
    """Write Flower's configuration; one that is there may hold more, and is left alone."""
    path, certificate = folder / "config.toml", str((folder / "ca.crt").resolve())
    if path.exists():
        held = tomllib.loads(path.read_text()).get("superlink", {}).get("prowd", {})
        if (held.get("address"), held.get("root-certificates")) != (superlink, certificate):
            sys.exit(f"{path} has another address or root-certificates: correct or remove it")
        return
    config = f'[superlink]\ndefault = "prowd"\n\n[superlink.prowd]\naddress = "{superlink}"\n'
    config += f'root-certificates = "{certificate}"\n'
    _write(path, config.encode(), secret=False)


def _private_key(
    path: Path, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> ec.EllipticCurvePrivateKey:
    """Return the key of a file, made first if it is not there."""
    openssh = form is serialization.PrivateFormat.OpenSSH
    if path.exists():
        load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
        key = load(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            sys.exit(f"{path} is no key of an elliptic curve; remove it for a new one")
        return key
    key = ec.generate_private_key(ec.SECP384R1())
    plain = serialization.NoEncryption()
    _write(path, key.private_bytes(serialization.Encoding.PEM, form, plain))
    return key


def _write(path: Path, content: bytes, secret: bool = True) -> None:
    """Write a file whole or not at all; a secret one is never readable to others."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    mode = 0o600 if secret else 0o644
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _site(name: str) -> str:
    """Check the name of a site, which becomes that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise argparse.ArgumentTypeError(f"{name!r}: letters, digits, and . _ - within")
    return name


def _host(name: str) -> str:
    """Check a host's name or address."""
    try:
        _general_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no host: {error}") from error
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("keys"))
    actions = parser.add_subparsers(dest="action", required=True)
    maker = actions.add_parser("make", help="keys, certificates and secrets")
    names: dict[str, Any] = {"nargs": "+", "required": True}
    maker.add_argument("--names", **names, type=_host, help="of the server, as sites dial it")
    maker.add_argument("--sites", **names, type=_site, help="one name a site")
    maker.add_argument("--superlink", default="127.0.0.1:8000", help="as the operator dials it")
    registrar = actions.add_parser("register", help="the sites' public keys")
    registrar.add_argument("--patience", type=float, default=60.0, help="seconds to wait")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.folder, arguments.names, arguments.sites, arguments.superlink)
    else:
        register(arguments.folder, arguments.patience)


if __name__ == "__main__":
    main()
