"""How a device or an operator gets its certificate: a key that stays here, a request, and a coordinator known by its root's fingerprint.

The root is fetched and compared before anything else is said: a server that shows another one never sees the token. `cryptography` and
`OpenSSL` are loaded by the calls that need them, since both daemons import this package and idle in a few tens of MiB.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import grpc

from fleetune.errors import FleetuneError, UnreachableError, WireError
from fleetune.v1 import registry_pb2, registry_pb2_grpc
from fleetune.wire import channel
from fleetune.wire.identity import SERVER_NAME, Facts, Identity, trouble
from fleetune.wire.joinline import JoinLine
from fleetune.wire.keys import check, make_request

if TYPE_CHECKING:
    from cryptography import x509
    from OpenSSL import SSL

CONNECT_S = 5.0
CALL_S = 10.0
PATIENCE_S = 15.0
"""How long a coordinator that does not answer, or asks for patience, is tried again."""

PAUSE_S = 0.5

_KINDS = {registry_pb2.IDENTITY_KIND_AGENT: "agent", registry_pb2.IDENTITY_KIND_OPERATOR: "operator"}
_ROLES = {registry_pb2.ROLE_VIEW: "view", registry_pb2.ROLE_OPERATE: "operate", registry_pb2.ROLE_ADMIN: "admin"}

T = TypeVar("T")


class JoinRefusedError(FleetuneError):
    """The coordinator answered and does not let this device or operator in."""


class WrongCoordinatorError(JoinRefusedError):
    """What answers is not the coordinator that the join line names; it was told nothing."""


def enrol(line: JoinLine, name: str, device_id: str = "", *, patience_s: float = PATIENCE_S) -> Identity:
    """The identity that the join line's token is good for. Blocks, within bounds; writes nothing.

    Without a device id it is an operator's. JoinRefusedError for a final no, WrongCoordinatorError where another root is shown,
    UnreachableError where nobody answered for `patience_s`.
    """
    request = make_request(name)
    root = _patiently(lambda: fetch_root(line.join_address, line.root_sha256), patience_s)
    message = registry_pb2.JoinRequest(token=line.token, signing_request=request.signing_request, name=name, device_id=device_id)
    credentials = _patiently(lambda: _join(line, root, message), patience_s)
    identity = identity_of(credentials, request.key, line.address)
    check(identity)
    if wrong := trouble(identity.facts):
        raise JoinRefusedError(f"The certificate could not be used here: {wrong}.", "Set this machine's clock, then join with a new token.")
    return identity


def identity_of(credentials: registry_pb2.Credentials, key: bytes, coordinator: str) -> Identity:
    """What the coordinator gave, with the key that it belongs to. WireError where something is missing."""
    kind = _KINDS.get(credentials.kind)
    if kind not in ("agent", "operator") or not credentials.certificate or not credentials.roots or not credentials.name:
        raise WireError("The coordinator's answer is no whole certificate.", "Install the same version of Fleetune on both machines.")
    facts = Facts(
        kind="agent" if kind == "agent" else "operator",
        name=credentials.name,
        role=_ROLES.get(credentials.role, "") if kind == "operator" else "",
        coordinator=coordinator,
        server_name=credentials.server_name,
        not_before_unix_s=credentials.not_before_unix_s,
        not_after_unix_s=credentials.not_after_unix_s,
    )
    return Identity(facts, key, credentials.certificate.encode(), credentials.roots.encode())


def fetch_root(address: str, root_sha256: bytes, *, connect_s: float = CONNECT_S, handshake_s: float = channel.HANDSHAKE_S) -> bytes:
    """PEM of the root of whoever answers at `address`, if its fingerprint is this one. Nothing is sent but the handshake.

    UnreachableError where nobody speaks TLS there, WrongCoordinatorError for another root or a certificate that is not of it.
    """
    from cryptography.hazmat.primitives import serialization

    chain = _chain(address, connect_s, handshake_s)
    root = next((found for found in chain if hashlib.sha256(found.public_bytes(serialization.Encoding.DER)).digest() == root_sha256), None)
    if root is None or not _issued(chain[0], root):
        raise WrongCoordinatorError(
            f"What answers at {address} is not the coordinator of this join line: its root certificate has another fingerprint.",
            "The token was not sent. Make sure that the address is right and nobody stands in between; if the fleet's authority "
            "was made anew, make a new token.",
        )
    _check_dates(address, chain[0])
    return root.public_bytes(serialization.Encoding.PEM)


def _chain(address: str, connect_s: float, handshake_s: float) -> list[x509.Certificate]:
    """What the server shows, its own certificate first; nothing of it is verified."""
    from OpenSSL import SSL

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_verify(SSL.VERIFY_NONE)
    context.set_alpn_protos([b"h2"])
    host, port = channel.split_address(address)
    try:
        opened = socket.create_connection((host.strip("[]"), port), timeout=connect_s)
    except OSError as error:
        raise _nobody(address, error) from error
    with opened:
        opened.setblocking(False)
        connection = SSL.Connection(context, opened)
        connection.set_connect_state()
        deadline_s = time.monotonic() + handshake_s
        try:
            while not _shaken(connection):
                left_s = deadline_s - time.monotonic()
                waiting = [opened]
                if left_s <= 0 or not any(select.select(waiting, waiting if connection.want_write() else [], [], left_s)):
                    raise UnreachableError(
                        f"What answers at {address} did not finish the TLS handshake within {handshake_s:g} s.",
                        "Check the port: the join line names the one that `fleetune serve` listens on for joining.",
                    )
        except (SSL.Error, OSError) as error:
            raise UnreachableError(
                f"What answers at {address} does not speak TLS as a coordinator does ({_words(error)}).",
                "Check the port: the join line names the one that `fleetune serve` listens on for joining.",
            ) from error
        chain = connection.get_peer_cert_chain(as_cryptography=True)
    if not chain:
        raise UnreachableError(f"What answers at {address} shows no certificate.", "Check the address.")
    return list(chain)


def _shaken(connection: SSL.Connection) -> bool:
    """One step of the handshake; True once it is through."""
    from OpenSSL import SSL

    try:
        connection.do_handshake()
    except (SSL.WantReadError, SSL.WantWriteError):
        return False
    return True


def _issued(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    """Whether the root signed it. Intermediates are no business of a fleet's own authority, and no other one answers joiners."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_dates(address: str, certificate: x509.Certificate) -> None:
    """A handshake that fails for a wrong clock says so nowhere; seen here, it can be told."""
    begin_s, end_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    wrong = trouble(Facts("coordinator", "the coordinator", "", address, SERVER_NAME, begin_s, end_s))
    if wrong:
        raise JoinRefusedError(
            f"The coordinator at {address} cannot be trusted by its dates: {wrong}.",
            "Set this machine's clock if it is wrong; else the coordinator's certificate needs renewal (`fleetune serve` renews it).",
        )


def _join(line: JoinLine, root: bytes, message: registry_pb2.JoinRequest) -> registry_pb2.Credentials:
    options = [*channel.channel_options(), ("grpc.ssl_target_name_override", SERVER_NAME)]
    opened = grpc.secure_channel(line.join_address, grpc.ssl_channel_credentials(root), options=options)
    with contextlib.closing(opened):
        call = registry_pb2_grpc.JoinServiceStub(opened).Join.future(message, timeout=CALL_S)
        try:
            return call.result().credentials
        except grpc.RpcError as error:
            raise _meaning(line, message.name, call.code(), call.details() or "") from error


def _meaning(line: JoinLine, name: str, code: grpc.StatusCode, told: str) -> FleetuneError:
    # Whatever the other side says, the token is not repeated.
    details = told.replace(line.token, "(token)").strip().rstrip(".")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return JoinRefusedError(
            f"The coordinator at {line.join_address} does not take this token: it is unknown, used up, expired or revoked.",
            "Make a new one with `fleetune token create`.",
        )
    if code is grpc.StatusCode.ALREADY_EXISTS:
        return JoinRefusedError(
            f"The name {name!r} is taken in this fleet ({details}).",
            f"Choose another with --name, or let this one take it over: `fleetune token create --name {name} --replace`.",
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnreachableError(
            f"The coordinator at {line.join_address} did not answer ({details or code.name}).",
            "Check that `fleetune serve` runs there and that its join port can be reached.",
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _BusyError(
            f"The coordinator at {line.join_address} takes no more tries now ({details or code.name}).", "Try again in a minute."
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return JoinRefusedError(
            f"What answers at {line.join_address} lets nobody join: no Fleetune coordinator, or one of another version.",
            "Check the line and the version of `fleetune serve`.",
        )
    return JoinRefusedError(f"The coordinator at {line.join_address} refused {name!r}: {details or code.name}.", "Its log says more.")


class _BusyError(UnreachableError):
    """Worth another try."""


def _patiently(call: Callable[[], T], patience_s: float) -> T:
    """What the call gives; UnreachableError only once it has come again and again for so long."""
    deadline_s = time.monotonic() + patience_s
    pause_s = PAUSE_S
    while True:
        try:
            return call()
        except UnreachableError:
            if time.monotonic() + pause_s > deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 4.0)


def _nobody(address: str, error: OSError) -> UnreachableError:
    remedy = "Check the address, and that `fleetune serve` runs there and that its join port can be reached."
    if isinstance(error, socket.gaierror):
        return UnreachableError(f"The host of {address} is not known here ({error.strerror}).", remedy)
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return UnreachableError(f"Nobody answers at {address}.", remedy)
    return UnreachableError(f"Nobody answers at {address} ({error.strerror or error}).", remedy)


def _words(error: Exception) -> str:
    """OpenSSL's errors are lists of tuples of (library, function, reason)."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found: object = error.args[0] if error.args else ""
    if isinstance(found, list) and found:
        return str(cast("list[tuple[str, ...]]", found)[-1][-1])
    return str(error) or "the connection was closed"
