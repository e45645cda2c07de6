"""Keys, requests for a certificate of them, and whether both belong together. `cryptography` is loaded by the calls that need it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleetune.errors import ConfigError, WireError
from fleetune.wire.identity import Facts, Identity

AGENT_URI = "urn:fleetune:agent"
OPERATOR_URI = "urn:fleetune:operator"


@dataclass(frozen=True)
class Request:
    """A new key and what asks for a certificate of it."""

    key: bytes = field(repr=False)
    """PEM, PKCS #8."""
    signing_request: bytes
    """DER, PKCS #10."""


def make_request(name: str) -> Request:
    """A fresh key and a request for a certificate of it."""
    key = make_key()
    return Request(key, request_for(key, name))


def make_key() -> bytes:
    """A fresh P-256 key: PEM, PKCS #8, not encrypted."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def request_for(key: bytes, name: str = "") -> bytes:
    """DER of a signing request for an EC key (PEM). Names in it are ignored by the coordinator; some authorities want one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(private, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def check(identity: Identity) -> None:
    """WireError where the key, the certificate and the roots cannot be read or do not belong together."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(identity.key, None)
        certificate = x509.load_pem_x509_certificates(identity.certificate)[0]
        roots = x509.load_pem_x509_certificates(identity.roots)
    except (ValueError, TypeError) as error:
        raise WireError(f"The certificate of {identity.facts.name!r} or its key is damaged: {error}.", "Join again.") from error
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if certificate.public_key().public_bytes(*encoding) != key.public_key().public_bytes(*encoding):
        raise WireError(f"The certificate of {identity.facts.name!r} is for another key.", "Join again.")
    if not roots:
        raise WireError(f"The certificate of {identity.facts.name!r} came without a root.", "Join again.")


@dataclass(frozen=True)
class Brought:
    """An identity whose certificate another authority made. `device_id` is empty where the certificate names none."""

    identity: Identity
    device_id: str


def brought(certificate: bytes, key: bytes, roots: bytes, coordinator: str, server_name: str) -> Brought:
    """The identity of PEM files that an authority of one's own made for a device or an operator.

    The name is the certificate's common name; what it is, a URI among its alternative names says: urn:fleetune:agent, urn:fleetune:agent:ID
    or urn:fleetune:operator:ROLE. ConfigError where that or the purpose "client" is missing, or the files do not belong together.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"The certificate cannot be used: {error}", _REMEDY) from error
    common = [str(name.value) for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("urn:fleetune:")]
    if len(common) != 1 or len(uris) != 1 or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise ConfigError("The certificate does not say whose it is.", _REMEDY)
    kind, _, rest = uris[0].removeprefix("urn:fleetune:").partition(":")
    if kind not in ("agent", "operator") or (kind == "operator") != (rest in ("view", "operate", "admin")):
        raise ConfigError(f"The certificate's name {uris[0]!r} is no agent's and no operator's.", _REMEDY)
    facts = Facts(
        kind="agent" if kind == "agent" else "operator",
        name=common[0],
        role=rest if kind == "operator" else "",
        coordinator=coordinator,
        server_name=server_name,
        not_before_unix_s=leaf.not_valid_before_utc.timestamp(),
        not_after_unix_s=leaf.not_valid_after_utc.timestamp(),
    )
    made = Identity(facts, key, certificate, roots)
    try:
        check(made)
    except WireError as error:
        raise ConfigError(
            error.message, "Give the key that the certificate was made for, unencrypted, and the roots, all as PEM."
        ) from error
    return Brought(made, rest if kind == "agent" else "")


_REMEDY = (
    f"It needs one common name, the purpose clientAuth, and one alternative name: the URI {AGENT_URI}, {AGENT_URI}:DEVICE-ID or "
    f"{OPERATOR_URI}:ROLE with view, operate or admin."
)
