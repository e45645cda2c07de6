"""JoinService: trades tokens for certificates, on a server of its own for those who have none. What comes here is from anybody."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

import grpc

from fleetune.coordinator import authority, tokens
from fleetune.coordinator.certificates import Enrolled, Roster, RosterError
from fleetune.coordinator.principal import DEVICE_ID, NAME
from fleetune.coordinator.rpc import convert
from fleetune.coordinator.rpc.refusals import Kind as RefusalKind
from fleetune.coordinator.rpc.refusals import Refusals
from fleetune.coordinator.store.identities import Kind
from fleetune.coordinator.tokens import Limiter, Wish
from fleetune.errors import DiskFullError
from fleetune.v1 import registry_pb2, registry_pb2_grpc
from fleetune.wire.channel import Option
from fleetune.wire.identity import SERVER_NAME

log = logging.getLogger("fleetune.join")

MESSAGE_BYTES_MAX = 64 * 1024
CALLS_MAX = 64
CONNECTIONS_MAX = 256
"""Behind the door, which takes fewer: of programs of this machine that come to gRPC's own port."""

_METHOD = "/fleetune.v1.JoinService/Join"

_CODES = {
    "token": grpc.StatusCode.UNAUTHENTICATED,
    "name": grpc.StatusCode.PERMISSION_DENIED,
    "exists": grpc.StatusCode.ALREADY_EXISTS,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "request": grpc.StatusCode.INVALID_ARGUMENT,
}

_KINDS = {
    "busy": "too many tries",
    "token": "a token that is not good",
    "name": "a token for another name",
    "exists": "a name or device that is in the fleet already",
    "invalid": "an unsound request",
    "request": "an unsound signing request",
}
"""What refusals are counted together as: the words of one may differ from those of the next."""


class Aborting(Protocol):
    """The part of a servicer context that tells who calls, and ends a call."""

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: tuple[()] = ...) -> NoReturn: ...

    def peer(self) -> str: ...


def options() -> list[Option]:
    """Options of the server for those who join: one small call, then the connection has done its work."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", 4096),
        ("grpc.absolute_max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", 4),
        ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.max_connection_idle_ms", 10_000),
        ("grpc.max_connection_age_ms", 30_000),
        ("grpc.max_connection_age_grace_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.so_reuseport", 0),
    ]


class JoinService(registry_pb2_grpc.JoinServiceServicer):
    def __init__(
        self,
        roster: Roster,
        on_replaced: Callable[[Kind, str], None],
        on_joined: Callable[[str, str], None],
        source_of: Callable[[str], str] = tokens.source,
        limiter: Limiter | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_replaced` hears kind and name whose older certificates have ended, `on_joined` name and id of a device.

        `source_of` tells of a gRPC peer where it comes from, without what one machine can change at will.
        """
        self._roster = roster
        self._on_replaced = on_replaced
        self._on_joined = on_joined
        self._source_of = source_of
        self._limiter = limiter or Limiter()
        self._monotonic = monotonic
        # Apart from the gate's: strangers by the thousand must not crowd out what is told of those who have a certificate.
        self._refusals = Refusals(monotonic, self._more)

    async def Join(self, request: registry_pb2.JoinRequest, context: Aborting) -> registry_pb2.JoinResponse:  # type: ignore[override]
        source = self._source_of(context.peer())
        if not self._limiter.allows(source, self._monotonic()):
            await self._refuse(context, source, "", "busy", "too many tries", grpc.StatusCode.RESOURCE_EXHAUSTED)
        if wrong := _objection(request):
            await self._refuse(context, source, "", "invalid", wrong, grpc.StatusCode.INVALID_ARGUMENT)
        wish = Wish(request.name, request.device_id)
        try:
            enrolled = await self._roster.join(request.token, wish, request.signing_request, source)
        except RosterError as error:
            await self._refuse(
                context, source, wish.name, error.kind, str(error), _CODES.get(error.kind, grpc.StatusCode.FAILED_PRECONDITION)
            )
        except DiskFullError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        row = enrolled.row
        log.info("joined %s=%s id=%s from=%s until=%.0f", row.kind, row.name, row.device_id, source, row.not_after_unix_s)
        if row.kind == "agent":
            self._on_joined(row.name, row.device_id)
        if enrolled.replaced:
            self._on_replaced(row.kind, row.name)
        return registry_pb2.JoinResponse(credentials=credentials(enrolled))

    async def _refuse(self, context: Aborting, source: str, name: str, kind: str, why: str, code: grpc.StatusCode) -> NoReturn:
        """Answer; tell the log and the audit log of each source and kind once a minute, with the number of those between."""
        if self._refusals.note(source, _METHOD, _KINDS.get(kind, kind), f"{why}, as {name!r}" if name else why):
            await self._roster.note_refusal(source, "join", name, why)
        await context.abort(code, why)

    def _more(self, kind: RefusalKind, count: int) -> None:
        self._roster.note_more_refusals(kind.who, "join", "", f"{kind.why}: another {count}")


def credentials(enrolled: Enrolled) -> registry_pb2.Credentials:
    """As the wire has it."""
    row = enrolled.row
    kind = registry_pb2.IDENTITY_KIND_AGENT if row.kind == "agent" else registry_pb2.IDENTITY_KIND_OPERATOR
    return registry_pb2.Credentials(
        certificate=enrolled.certificate.decode("ascii"),
        roots=enrolled.roots.decode("ascii"),
        server_name=SERVER_NAME,
        kind=kind,
        name=row.name,
        role=registry_pb2.Role.ValueType(row.role),
        not_before_unix_s=row.not_before_unix_s,
        not_after_unix_s=row.not_after_unix_s,
    )


def _objection(request: registry_pb2.JoinRequest) -> str:
    """What is wrong with a request whatever its token is."""
    if not NAME.fullmatch(request.name):
        return f"the name {convert.line(request.name, 80)!r} is not 1 to 63 of A-Z a-z 0-9 . _ -"
    if request.device_id and not DEVICE_ID.fullmatch(request.device_id):
        return f"the device id {convert.line(request.device_id, 80)!r} is not 8 to 64 of A-Z a-z 0-9 -"
    if len(request.token) > tokens.TOKEN_CHARACTERS_MAX:
        return "the token is longer than any"
    if not 0 < len(request.signing_request) <= authority.REQUEST_BYTES_MAX:
        return f"the signing request has {len(request.signing_request)} bytes, allowed are 1 to {authority.REQUEST_BYTES_MAX}"
    return ""
