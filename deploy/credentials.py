"""Make what a secured federation needs, and register its sites with the SuperLink.

``make`` writes a folder for each party, which holds all that this party may know and nothing more::

    keys/authority    key and certificate of the authority (CA); stays with the operator
    keys/operator     Flower's config.toml, for FLWR_HOME; stays with the operator
    keys/server       certificate and key of the SuperLink, secret of its superexec
    keys/proxy        certificate and key of the proxy
    keys/sites/NAME   one site's authentication key, and the secret of its superexec

What is there already is kept, so that a site can be added later. ``register`` tells the running
SuperLink the public key of every site.
"""

import argparse
import datetime
import ipaddress
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509
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
    parties = ["operator", "server", "proxy", *(f"sites/{site}" for site in sites)]
    for party in parties:
        (folder / party).mkdir(parents=True, exist_ok=True)
        _write(folder / party / "ca.crt", public, secret=False)
    for party in ("server", "proxy"):
        _issue(folder / party, key, certificate, [*names, *_OWN_NAMES])
    _write(folder / "server" / "superexec.secret", secrets.token_bytes(32))
    config = f'[superlink]\ndefault = "prowd"\n\n[superlink.prowd]\naddress = "{superlink}"\n'
    config += f'root-certificates = "{(folder / "operator" / "ca.crt").resolve()}"\n'
    _write(folder / "operator" / "config.toml", config.encode(), secret=False)
    for site in sites:
        _site_key(folder / "sites" / site)
        _write(folder / "sites" / site / "superexec.secret", secrets.token_bytes(32))


def register(folder: Path, patience: float) -> None:
    """Register every site's public key, waiting for the SuperLink for `patience` seconds."""
    env = {**os.environ, "FLWR_HOME": str((folder / "operator").resolve())}
    deadline = time.monotonic() + patience
    for path in sorted((folder / "sites").glob("*/node.pub")):
        name = path.parent.name
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
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "ca.crt").exists():
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        return key, x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prowd authority")])
    builder = _certificate(name, name, key, _AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    _write(folder / "ca.key", _pem(key))
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), secret=False)
    return key, certificate


def _issue(
    folder: Path, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, names: list[str]
) -> None:
    if (folder / "server.key").exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    builder = _certificate(subject, ca.subject, key, _CERTIFICATE_DAYS)
    alternatives = x509.SubjectAlternativeName([_general_name(n) for n in dict.fromkeys(names)])
    builder = builder.add_extension(alternatives, critical=False)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(of_issuer, critical=False)
    certificate = builder.sign(ca_key, hashes.SHA384())
    _write(folder / "server.key", _pem(key))
    _write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


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


def _site_key(folder: Path) -> None:
    if (folder / "node.key").exists():
        return
    # The curve and the format that Flower's SuperNode authentication reads.
    key = ec.generate_private_key(ec.SECP384R1())
    formats = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / "node.pub", key.public_key().public_bytes(*formats), secret=False)
    _write(folder / "node.key", _pem(key, serialization.PrivateFormat.OpenSSH))


def _pem(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, secret: bool = True) -> None:
    """Write a file that is not there yet; a secret one is never readable to others."""
    if not path.exists():
        mode = 0o600 if secret else 0o644
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("keys"))
    actions = parser.add_subparsers(dest="action", required=True)
    maker = actions.add_parser("make", help="keys, certificates and secrets")
    maker.add_argument("--names", nargs="+", required=True, help="of the server, as sites dial it")
    maker.add_argument("--sites", nargs="+", required=True, help="one name a site")
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
