"""The fleet's own authority: what it signs and what it refuses."""

from __future__ import annotations

import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.coordinator import authority, principal
from fleetune.coordinator.authority import Authority
from fleetune.coordinator.principal import Role
from fleetune.errors import ConfigError
from fleetune.wire import keys
from fleetune.wire.identity import SERVER_NAME

NOW = 1_800_000_000.0
DAY_S = 86_400.0


@pytest.fixture(scope="module")
def fleet() -> Authority:
    key = keys.make_key()
    return authority.load(key, authority.make_root(key, NOW))


def request(key: object, name: str = "", alternative: str = "") -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    )
    if alternative:
        uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(alternative)])
        builder = builder.add_extension(uri, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]  # of several kinds


def made(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_names_in_a_request_are_ignored(fleet: Authority) -> None:
    asked = request(ec.generate_private_key(ec.SECP256R1()), "root", "urn:fleetune:operator:admin")
    issued = fleet.sign_agent(asked, "pi", "device-0001", 30, NOW)
    certificate = made(issued.certificate)
    uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    who = principal.read("pi", uris.get_values_for_type(x509.UniformResourceIdentifier), issued.fingerprint)
    assert who == principal.Principal("agent", "pi", "device-0001", fingerprint=issued.fingerprint)
    assert certificate.subject.rfc4514_string() == "CN=pi"


def test_a_certificate_is_for_one_purpose_and_signs_no_others(fleet: Authority) -> None:
    issued = fleet.sign_operator(keys.request_for(keys.make_key()), "ada", Role.VIEW, 30, NOW)
    extensions = made(issued.certificate).extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    server = authority.certificates(fleet.server_certificate(keys.make_key(), NOW))
    assert list(server[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = server[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [SERVER_NAME]
    assert server[1] == fleet.root


def test_it_is_good_from_a_little_before_and_never_longer_than_its_root(fleet: Authority) -> None:
    issued = fleet.sign_agent(keys.request_for(keys.make_key()), "pi", "device-0001", 30, NOW)
    assert issued.not_before_unix_s == NOW - 300
    assert issued.not_after_unix_s == NOW + 30 * DAY_S
    late = fleet.root.not_valid_after_utc.timestamp() - 5 * DAY_S
    assert fleet.sign_agent(keys.request_for(keys.make_key()), "pi", "device-0001", 30, late).not_after_unix_s == (
        fleet.root.not_valid_after_utc.timestamp()
    )


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["P-384", "RSA 2048"],
)
def test_other_sound_keys_are_taken(fleet: Authority, key: object) -> None:
    fleet.sign_agent(request(key), "pi", "device-0001", 30, NOW)


@pytest.mark.parametrize(
    "key",
    [
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 1024),
    ],
    ids=["Ed25519", "secp256k1", "P-521", "RSA 1024"],
)
def test_other_keys_are_refused(fleet: Authority, key: object) -> None:
    with pytest.raises(ConfigError, match="signing request"):
        fleet.sign_agent(request(key), "pi", "device-0001", 30, NOW)


def test_a_request_that_another_key_signed_is_refused(fleet: Authority) -> None:
    asked = bytearray(request(ec.generate_private_key(ec.SECP256R1())))
    asked[-1] ^= 1
    with pytest.raises(ConfigError, match="signing request"):
        fleet.sign_agent(bytes(asked), "pi", "device-0001", 30, NOW)


def test_no_bytes_whatever_make_it_fail_otherwise(fleet: Authority) -> None:
    whole = keys.request_for(keys.make_key())
    for broken in [
        b"",
        b"\x30",
        b"x" * 100_000,
        *(whole[:n] for n in range(0, len(whole), 7)),
        *(spoiled(whole, n) for n in range(len(whole))),
    ]:
        with pytest.raises(ConfigError, match="signing request"):
            fleet.sign_agent(broken, "pi", "device-0001", 30, NOW)


def spoiled(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def test_a_key_and_roots_that_do_not_belong_together_are_no_authority() -> None:
    with pytest.raises(ConfigError, match="none of the roots"):
        authority.load(keys.make_key(), authority.make_root(keys.make_key(), time.time()))
