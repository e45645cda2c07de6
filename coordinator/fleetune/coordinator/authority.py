"""The fleet's own certificate authority: makes roots, signs requests, makes the server's certificate. No files, no network."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.coordinator.principal import AGENT_URI, OPERATOR_URI, Role
from fleetune.errors import ConfigError
from fleetune.wire.identity import SERVER_NAME

DAY_S = 86_400.0
ROOT_DAYS = 3653
SERVER_DAYS = 397
"""What browsers and platforms take at most; serve renews it by itself."""

BACKDATE_S = 300.0
"""Clocks of boards go slow: a certificate is good from a little before it was made."""

REQUEST_BYTES_MAX = 16 * 1024
RSA_BITS = range(2048, 8193)
CURVES = ("secp256r1", "secp384r1")


@dataclass(frozen=True)
class Issued:
    """A certificate as it was just signed. Times are Unix seconds; fingerprints are hex SHA-256 of the DER."""

    certificate: bytes
    """PEM, the leaf alone."""
    fingerprint: str
    authority: str
    """Fingerprint of the root that signed it."""
    not_before_unix_s: float
    not_after_unix_s: float


@dataclass(frozen=True)
class Authority:
    """A root with its key, and every root that is still trusted beside it."""

    root: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    roots_pem: bytes
    """The signing root first."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.root)

    def sign_agent(self, request: bytes, name: str, device_id: str, days: float, now_unix_s: float) -> Issued:
        """A certificate for a device. ConfigError for a request that cannot be used; the names in it are ignored."""
        return self._sign_client(request, name, f"{AGENT_URI}:{device_id}", days, now_unix_s)

    def sign_operator(self, request: bytes, name: str, role: Role, days: float, now_unix_s: float) -> Issued:
        """A certificate for an operator. ConfigError as in `sign_agent`."""
        return self._sign_client(request, name, f"{OPERATOR_URI}:{role.name.lower()}", days, now_unix_s)

    def server_certificate(self, key: bytes, now_unix_s: float) -> bytes:
        """PEM of a certificate for the server's key, the root after it: who joins compares that root's fingerprint."""
        names = x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        issued = self._sign(private_key(key).public_key(), SERVER_NAME, names, usage, SERVER_DAYS, now_unix_s)
        return issued.certificate + pem_of(self.root)

    def _sign_client(self, request: bytes, name: str, uri: str, days: float, now_unix_s: float) -> Issued:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        return self._sign(requested_key(request), name, names, ExtendedKeyUsageOID.CLIENT_AUTH, days, now_unix_s)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        name: str,
        names: x509.SubjectAlternativeName,
        usage: x509.ObjectIdentifier,
        days: float,
        now_unix_s: float,
    ) -> Issued:
        # No certificate outlives its root: its last days would fail with a message that names neither.
        until = min(_time(now_unix_s + days * DAY_S), self.root.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(name))
            .issuer_name(self.root.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(now_unix_s - BACKDATE_S))
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        made = builder.sign(self.key, hashes.SHA256())
        return Issued(
            pem_of(made), fingerprint(made), self.fingerprint, made.not_valid_before_utc.timestamp(), made.not_valid_after_utc.timestamp()
        )


def make_root(key: bytes, now_unix_s: float) -> bytes:
    """PEM of a self-signed root for `key`. Its name is its own, so that two roots in one file are told apart."""
    private = private_key(key)
    made = _time(now_unix_s)
    subject = _subject(f"Fleetune authority {made:%Y-%m-%d} {secrets.token_hex(4)}")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_unix_s - BACKDATE_S))
        .not_valid_after(_time(now_unix_s + ROOT_DAYS * DAY_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )
    return pem_of(builder.sign(private, hashes.SHA256()))


def load(key: bytes, roots_pem: bytes) -> Authority:
    """The authority whose key this is. ConfigError where no root belongs to it."""
    private = private_key(key)
    roots = certificates(roots_pem)
    mine = next((root for root in roots if root.public_key() == private.public_key()), None)
    if mine is None:
        raise ConfigError("the authority's key belongs to none of the roots.", "Restore the folder tls/ from a backup.")
    ordered = [mine, *(root for root in roots if root is not mine)]
    return Authority(mine, private, b"".join(map(pem_of, ordered)))


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The public key of a signing request (DER). ConfigError for a damaged one, another kind of key, or a signature by another key."""
    if len(request) > REQUEST_BYTES_MAX:
        raise _bad_request(f"it has {len(request)} bytes, at most {REQUEST_BYTES_MAX} are read")
    try:
        parsed = x509.load_der_x509_csr(request)
        key = parsed.public_key()
        known = isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        # Before the signature is looked at: to check one of 100,000 bits takes minutes.
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name not in CURVES:
            raise _bad_request(f"its key lies on the curve {key.curve.name}, allowed are {' and '.join(CURVES)}")
        if isinstance(key, rsa.RSAPublicKey) and key.key_size not in RSA_BITS:
            raise _bad_request(f"its RSA key has {key.key_size} bits, allowed are {RSA_BITS.start} to {RSA_BITS.stop - 1}")
        if not known:
            raise _bad_request("its key is neither ECDSA nor RSA")
        if not parsed.is_signature_valid:
            raise _bad_request("it is not signed with its own key")
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise _bad_request("it cannot be read as PKCS #10 in DER") from error
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    return key


def certificates(pem: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM file. ConfigError where there is none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError("a file of certificates cannot be read as PEM.", "Restore the folder tls/ from a backup.") from error


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """One of our own keys. ConfigError for anything else; its bytes are in no message."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("a key of the folder tls/ cannot be read.", "Restore that folder from a backup.")
    return key


def fits(key: bytes, certificate: bytes) -> bool:
    """Whether the first certificate of the PEM is of this key (PEM, of any kind). ConfigError for damaged files."""
    try:
        public = serialization.load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("the server's key cannot be read as PEM without a password.", "Give it as unencrypted PKCS #8.") from error
    return public == certificates(certificate)[0].public_key()


def signed_by_any(certificate: bytes, roots: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """The root that signed the first certificate of the PEM directly."""
    leaf = certificates(certificate)[0]
    for root in roots:
        try:
            leaf.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return root
    return None


def fingerprint(certificate: x509.Certificate) -> str:
    """Hex SHA-256 of its DER."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _bad_request(why: str) -> ConfigError:
    return ConfigError(f"The signing request cannot be used: {why}.", "Make it with an ECDSA key (P-256, P-384) or an RSA key.")


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _time(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(unix_s), datetime.timezone.utc)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
