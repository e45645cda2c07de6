"""Certificates of every kind, sound and unsound, made in memory."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.wire.identity import SERVER_NAME

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A key and its certificate, PEM."""

    key: bytes
    certificate: bytes

    @property
    def fingerprint(self) -> str:
        return x509.load_pem_x509_certificate(self.certificate).fingerprint(hashes.SHA256()).hex()


class Authority:
    """A root of a fleet: a new one, or that of `key` and `root` (PEM)."""

    def __init__(self, name: str = "a test's authority", key: ec.EllipticCurvePrivateKey | None = None, root: bytes = b"") -> None:
        if key is not None:
            self._key, self.root, self._name = key, root, x509.load_pem_x509_certificate(root).subject
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.timezone.utc)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        made = (
            x509.CertificateBuilder(self._name, self._name, self._key.public_key(), x509.random_serial_number(), now - DAY, now + 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.root = made.public_bytes(serialization.Encoding.PEM)

    @property
    def key(self) -> bytes:
        return _pem(self._key)

    def server(self, name: str = SERVER_NAME) -> Pair:
        return self.pair("coordinator", [x509.DNSName(name)], purpose=ExtendedKeyUsageOID.SERVER_AUTH)

    def agent(self, name: str, device_id: str = "", *, begins_days: float = -1, ends_days: float = 30) -> Pair:
        uri = x509.UniformResourceIdentifier(f"urn:fleetune:agent:{device_id}".removesuffix(":"))
        return self.pair(name, [uri], begins_days=begins_days, ends_days=ends_days)

    def operator(self, name: str, role: str = "admin") -> Pair:
        return self.pair(name, [x509.UniformResourceIdentifier(f"urn:fleetune:operator:{role}")])

    def pair(
        self,
        name: str,
        alternatives: list[x509.GeneralName],
        *,
        begins_days: float = -1,
        ends_days: float = 30,
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    ) -> Pair:
        """A certificate for these names, from `begins_days` until `ends_days` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder(
                self._name, subject, key.public_key(), x509.random_serial_number(), now + begins_days * DAY, now + ends_days * DAY
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        return Pair(_pem(key), made.public_bytes(serialization.Encoding.PEM))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Of a server that lets in nobody without a certificate of this authority."""
        pair = self.server()
        return grpc.ssl_server_credentials([(pair.key, pair.certificate + self.root)], self.root, require_client_auth=True)

    def channel(self, address: str, pair: Pair | None) -> Any:  # Any: raw calls have no types
        """A hand-made client: only what is needed to be let in, and that of `pair`."""
        given = (pair.key, pair.certificate) if pair is not None else (None, None)
        credentials = grpc.ssl_channel_credentials(self.root, *given)
        options = [("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.aio.secure_channel(address, credentials, options=options)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
