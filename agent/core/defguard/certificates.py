"""The certificates of a gateway that a core of the second generation has adopted.

Core is the certificate authority: it signs the gateway's certificate and its own client certificate, whose
serial number is pinned. The files have the names that Defguard's gateway gives them, so that its folder can
be taken over as it is.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.errors import ConfigError, InvalidMessage
from agent.folders import sync_names, write_whole
from agent.keys import check_secret_mode

CERTIFICATE: Final = "gateway_grpc_cert.pem"
KEY: Final = "gateway_grpc_key.pem"
CA: Final = "grpc_ca_cert.pem"
CORE: Final = "core_client_cert.pem"
FILES: Final = (KEY, CERTIFICATE, CA, CORE)
_DELETED: Final = ".deleted-by-core"
_SIZE: Final = 64 << 10
_PEM: Final = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a gateway serves with, in PEM, and the serial number of the one client that is let in."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes
    core: bytes

    @property
    def core_serial(self) -> int:
        """The serial number of core's client certificate."""
        return serial_of(self.core)

    @property
    def expires_at(self) -> float:
        """When the first of them expires, in Unix seconds."""
        return min(self.expiries.values())

    @property
    def expiries(self) -> dict[str, float]:
        """When each of them expires, in Unix seconds, by its name in the metrics."""
        pems = {"gateway": self.certificate, "ca": self.ca, "core": self.core}
        return {
            f"defguard.{name}": x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
            for name, pem in pems.items()
        }

    @property
    def authority(self) -> str:
        """What tells this core from any other, however often it adopts: a digest of its CA's public key."""
        public = x509.load_pem_x509_certificate(self.ca).public_key()
        raw = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(raw).hexdigest()[:16]


def serial_of(pem: bytes) -> int:
    """Return a certificate's serial number; ValueError if it is none."""
    return x509.load_pem_x509_certificate(pem).serial_number


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def make_request(key: ec.EllipticCurvePrivateKey, hostname: str) -> bytes:
    """Return a certificate signing request in DER, for this host name or IP address and no other.

    Raises InvalidMessage for what is neither.
    """
    name: x509.GeneralName
    try:
        name = x509.IPAddress(ipaddress.ip_address(hostname))
    except ValueError:
        if not hostname or len(hostname) > 253 or not hostname.isascii() or not hostname.isprintable():
            raise InvalidMessage("core asks for a certificate of a host name that is none") from None
        name = x509.DNSName(hostname)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    request = request.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def check_bundle(
    key: ec.EllipticCurvePrivateKey, certificate: bytes, ca: bytes, core: bytes, now: datetime
) -> Certificates:
    """Return what core sent (three certificates in DER) if it is what a gateway can serve with.

    Both certificates have to be signed by the CA, valid ``now``, on P-256, ours for the key that was made
    for it and for a server, core's for a client. Raises InvalidMessage.
    """
    try:
        ours, authority, cores = map(x509.load_der_x509_certificate, (certificate, ca, core))
        _check(ours, authority, cores, key.public_key(), now)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        what = str(error) if isinstance(error, _Fault) else "a certificate can't be read or verified"
        raise InvalidMessage(f"core sent certificates that can't be used: {what}") from None
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificates(
        ours.public_bytes(_PEM), private, authority.public_bytes(_PEM), cores.public_bytes(_PEM)
    )


class _Fault(ValueError):
    """What is wrong with a certificate, in words."""


def _check(
    ours: x509.Certificate,
    authority: x509.Certificate,
    cores: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
) -> None:
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    if not constraints.ca:
        raise _Fault("the CA's is not one of a CA")
    if ours.public_key() != key:
        raise _Fault("the gateway's is for another key")
    for certificate, usage, whose in (
        (ours, ExtendedKeyUsageOID.SERVER_AUTH, "the gateway's"),
        (cores, ExtendedKeyUsageOID.CLIENT_AUTH, "core's"),
    ):
        public = certificate.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise _Fault(f"{whose} is not on P-256")
        if usage not in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value:
            raise _Fault(f"{whose} is for another use")
        certificate.verify_directly_issued_by(authority)
    for certificate in (ours, authority, cores):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise _Fault("one of them is not valid now: are this host's clock and core's right?")


def load(folder: Path) -> Certificates | None:
    """Return what is in the folder, None if the gateway was not adopted, or only halfway.

    Raises ConfigError for files that can't be read, are none, or that others than their owner may read.
    """
    there = [name for name in FILES if os.path.lexists(folder / name)]
    if len(there) < len(FILES):
        return None
    read = {name: _read(folder / name) for name in FILES}
    found = Certificates(read[CERTIFICATE], read[KEY], read[CA], read[CORE])
    try:
        key = serialization.load_pem_private_key(found.key, None)
        pems = found.certificate, found.ca, found.core
        ours, authority, cores = map(x509.load_pem_x509_certificate, pems)
        whole = key.public_key() == ours.public_key()
        ours.verify_directly_issued_by(authority)
        cores.verify_directly_issued_by(authority)
    except InvalidSignature:
        return None
    except (ValueError, TypeError):
        raise ConfigError(
            f"{folder} holds a file that is no certificate or key",
            "put it right, or move all four files away and have core adopt this gateway anew",
        ) from None
    return found if whole else None


def take_over(folder: Path) -> Certificates | None:
    """Return, and keep in the folder, the whole set that the unit was given as systemd credentials.

    Each is named as its file is. So a gateway that was adopted before stays adopted: its files are root's,
    and the agent is not. None without such a set, and where core has deleted the gateway; raises ConfigError.
    """
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    found = load(Path(given)) if given and not (folder / _DELETED).exists() else None
    if found is not None:
        store(folder, found)
    return found


def _read(path: Path) -> bytes:
    key = "defguard.cert_dir"
    if path.name == KEY:
        check_secret_mode(path, key)
    try:
        with path.open("rb") as file:
            return file.read(_SIZE)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} can't be read: {error.strerror}", "the agent's user must own it"
        ) from None


def store(folder: Path, certificates: Certificates) -> None:
    """Keep them, each whole and its owner's alone; returns once they are on the disk.

    Raises ConfigError. What a crash leaves is a set that does not fit together, which ``load`` takes for
    none.
    """
    contents = {
        KEY: certificates.key,
        CERTIFICATE: certificates.certificate,
        CA: certificates.ca,
        CORE: certificates.core,
    }
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in contents.items():
            write_whole(folder / name, content)
        (folder / _DELETED).unlink(missing_ok=True)
        sync_names(folder)


def remove(folder: Path) -> None:
    """Core has deleted the gateway: remove all four, and take none over again. Raises ConfigError."""
    with _writing(folder):
        (folder / _DELETED).touch(0o600)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"defguard.cert_dir: {folder} can't be written: {error.strerror}",
            "name a folder that the agent may write",
        ) from None
