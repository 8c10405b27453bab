"""Makes a folder of certificates: an authority of its own, and what it signs.

authority.pem, authority.key   signs the others; keep the key where nobody serves
member.pem, member.key         of every process of the cluster
front.pem, front.key           of the clients' ports, for the names that clients call them by
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..protocol.errors import ConfigError
from ..protocol.tls import AUTHORITY, FRONT, MEMBER, MEMBER_NAME, read_pem

AUTHORITY_DAYS = 3650
SLACK = timedelta(minutes=5)  # of clocks that are not the same
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def init(folder: Path, names: Sequence[str], days: int) -> None:
    """A new authority, a members' certificate, a front's. names: of the front, beside loopback's. Raises ConfigError where there is one."""
    if (folder / f"{AUTHORITY}.key").exists():
        raise ConfigError(f"{folder} has an authority already; `halfmoon certs rotate` makes new certificates under it")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("halfmoon authority")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    built = _builder(name, name, key.public_key(), AUTHORITY_DAYS)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
    built = built.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    _write(folder, AUTHORITY, key, built.sign(key, hashes.SHA256()))
    rotate(folder, names, days)


def rotate(folder: Path, names: Sequence[str], days: int) -> None:
    """New certificates and keys under the same authority. No names: those that the front has. Raises ConfigError."""
    authority = x509.load_pem_x509_certificate(read_pem(folder / f"{AUTHORITY}.pem"))
    signer = serialization.load_pem_private_key(read_pem(folder / f"{AUTHORITY}.key"), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "init has made it"
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    if not names and (folder / f"{FRONT}.pem").exists():
        names = names_of(folder)
    front = list(dict.fromkeys([*LOCAL_NAMES, *names]))
    for file, subjects, usages in ((MEMBER, [MEMBER_NAME], both), (FRONT, front, both[:1])):
        key = ec.generate_private_key(ec.SECP256R1())
        built = _builder(_name(subjects[0]), authority.subject, key.public_key(), days)
        built = built.add_extension(x509.SubjectAlternativeName([_general_name(one) for one in subjects]), critical=False)
        built = built.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())  # asked for by Python 3.13 and later
        built = built.add_extension(issuer, critical=False)
        _write(folder, file, key, built.sign(signer, hashes.SHA256()))


def names_of(folder: Path) -> list[str]:
    """That the front's certificate is for. Raises ConfigError."""
    found = x509.load_pem_x509_certificate(read_pem(folder / f"{FRONT}.pem"))
    return [str(name.value) for name in found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(x509.random_serial_number())
    return built.not_valid_before(now - SLACK).not_valid_after(now + timedelta(days=days))


def _write(folder: Path, file: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """The key is never readable by others, also while it is written. Who looks meanwhile sees no half of a file."""
    form = serialization.PrivateFormat.PKCS8
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    new = folder / f".{file}.key"
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
    shown = folder / f".{file}.pem"
    shown.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    new.replace(folder / f"{file}.key")
    shown.replace(folder / f"{file}.pem")
