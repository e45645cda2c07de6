"""A small authority of a test's own: certificates as good or as bad as the test wants them."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import time
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.wire.identity import SERVER_NAME, Facts, Identity

DAY_S = 86_400.0
BACKDATED_S = 300.0

Purpose = Literal["client", "server"]
_PURPOSES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


@dataclass(frozen=True)
class Leaf:
    """A certificate with its key, PEM both; the chain of it and the root is what a server shows."""

    key: bytes
    certificate: bytes
    not_before_unix_s: float
    not_after_unix_s: float


class Authority:
    """Signs whatever it is told to."""

    def __init__(self, name: str = "authority of a test") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(self._key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(_date(time.time() - DAY_S)).not_valid_after(_date(time.time() + 3650 * DAY_S))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        # Python 3.13 looks for these.
        builder = builder.add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        self.certificate = builder.sign(self._key, hashes.SHA256())

    @property
    def root(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def root_sha256(self) -> bytes:
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).digest()

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        name: str,
        uri: str,
        purpose: Purpose = "client",
        *,
        begin_unix_s: float | None = None,
        life_s: float = 30 * DAY_S,
    ) -> tuple[bytes, float, float]:
        """PEM and the dates."""
        begin_s = float(int(time.time() - BACKDATED_S if begin_unix_s is None else begin_unix_s))
        end_s = begin_s + int(life_s)
        builder = x509.CertificateBuilder().subject_name(_name(name)).issuer_name(self.certificate.subject).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(_date(begin_s)).not_valid_after(_date(end_s))
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)] if uri else []
        if purpose == "server":
            names += [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([_PURPOSES[purpose]]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM), begin_s, end_s

    def leaf(
        self,
        name: str = SERVER_NAME,
        uri: str = "",
        purpose: Purpose = "server",
        *,
        begin_unix_s: float | None = None,
        life_s: float = 30 * DAY_S,
    ) -> Leaf:
        """With a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem, begin_s, end_s = self.sign(key.public_key(), name, uri, purpose, begin_unix_s=begin_unix_s, life_s=life_s)
        return Leaf(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
            pem,
            begin_s,
            end_s,
        )

    def agent(
        self,
        name: str = "one",
        device_id: str = "0123456789abcdef0123456789abcdef",
        *,
        coordinator: str = "127.0.0.1:7433",
        purpose: Purpose = "client",
        begin_unix_s: float | None = None,
        life_s: float = 30 * DAY_S,
        trusts: Authority | None = None,
    ) -> Identity:
        """An agent's identity; `trusts` is whose servers it takes, this authority's if left out."""
        leaf = self.leaf(name, f"urn:fleetune:agent:{device_id}", purpose, begin_unix_s=begin_unix_s, life_s=life_s)
        facts = Facts("agent", name, "", coordinator, SERVER_NAME, leaf.not_before_unix_s, leaf.not_after_unix_s)
        return Identity(facts, leaf.key, leaf.certificate, (trusts or self).root)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _date(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(unix_s), datetime.timezone.utc)
