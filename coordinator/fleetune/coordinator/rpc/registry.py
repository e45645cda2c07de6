"""RegistryService: renewal for whoever has a certificate; tokens, revocation and quarantine for administrators."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

import grpc

from fleetune.coordinator import tokens
from fleetune.coordinator.certificates import Roster, RosterError
from fleetune.coordinator.principal import NAME, Role
from fleetune.coordinator.principal import Kind as PrincipalKind
from fleetune.coordinator.rpc import convert, gate
from fleetune.coordinator.rpc.join import Aborting, credentials
from fleetune.coordinator.store.identities import CertificateRow, Kind
from fleetune.coordinator.tokens import Token
from fleetune.errors import DiskFullError
from fleetune.v1 import registry_pb2 as pb
from fleetune.v1 import registry_pb2_grpc

log = logging.getLogger("fleetune.registry")

REASON_CHARACTERS_MAX = 200
CERTIFICATES_MAX = 10_000
"""In one answer, which must fit one message; the newest."""

T = TypeVar("T")

_CODES = {
    "unknown": grpc.StatusCode.NOT_FOUND,
    "revoked": grpc.StatusCode.PERMISSION_DENIED,
    "request": grpc.StatusCode.INVALID_ARGUMENT,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "off": grpc.StatusCode.FAILED_PRECONDITION,
}
_KINDS: dict[pb.IdentityKind.ValueType, Kind] = {pb.IDENTITY_KIND_AGENT: "agent", pb.IDENTITY_KIND_OPERATOR: "operator"}
_WORDS = {kind: number for number, kind in _KINDS.items()}


class Cutting(Protocol):
    """The part of the gate that ends the calls of somebody whose certificate was revoked."""

    def cut(self, kind: PrincipalKind, name: str) -> int: ...


@dataclass(frozen=True)
class Entrance:
    """What a join line tells besides the token. `join_port` 0: nobody can join."""

    address: str
    join_port: int
    root_fingerprint: str


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(
        self,
        roster: Roster,
        gate: Cutting,
        entrance: Callable[[], Entrance],
        on_quarantine: Callable[[], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`entrance` is asked at each token, `on_quarantine` told that a device was taken in or out."""
        self._roster = roster
        self._gate = gate
        self._entrance = entrance
        self._on_quarantine = on_quarantine
        self._wall = wall

    async def Renew(self, request: pb.RenewRequest, context: Aborting) -> pb.RenewResponse:  # type: ignore[override]
        caller = gate.caller()
        if caller.kind == "local":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this coordinator runs without TLS: there is nothing to renew")
        try:
            enrolled = await self._roster.renew(caller, request.signing_request)
        except RosterError as error:
            await context.abort(_CODES.get(error.kind, grpc.StatusCode.INVALID_ARGUMENT), str(error))
        except DiskFullError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        log.info("renewed %s=%s until=%.0f", enrolled.row.kind, enrolled.row.name, enrolled.row.not_after_unix_s)
        return pb.RenewResponse(credentials=credentials(enrolled))

    # -- tokens

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Aborting) -> pb.CreateTokenResponse:  # type: ignore[override]
        if wrong := _token_objection(request):
            await self._refuse(context, "token create", request.name, wrong, grpc.StatusCode.INVALID_ARGUMENT)
        entrance = self._entrance()
        if not entrance.join_port:
            why = "this coordinator has no authority of its own, so that nobody can join with a token"
            await self._refuse(context, "token create", request.name, why, grpc.StatusCode.FAILED_PRECONDITION)
        now, secret = self._wall(), tokens.make()
        kind = _KINDS[request.kind]
        token = Token(
            digest=tokens.digest(secret),
            kind=kind,
            role=Role(request.role) if kind == "operator" else Role.NONE,
            name=request.name,
            replace=request.replace,
            uses=request.uses,
            uses_left=request.uses,
            created_unix_s=now,
            expires_unix_s=now + request.ttl_s,
            creator=str(gate.caller()),
        )
        await self._asked(context, "token create", request.name, self._roster.create_token(token, self._actor(context)))
        return pb.CreateTokenResponse(
            token=secret,
            view=_token_view(token),
            root_fingerprint=entrance.root_fingerprint,
            join_port=entrance.join_port,
            address=entrance.address,
        )

    async def ListTokens(self, request: pb.ListTokensRequest, context: Aborting) -> pb.ListTokensResponse:  # type: ignore[override]
        return pb.ListTokensResponse(tokens=[_token_view(token) for token in (await self._roster.tokens())[-CERTIFICATES_MAX:]])

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Aborting) -> pb.RevokeTokenResponse:  # type: ignore[override]
        token_id = convert.line(request.token_id, 40)
        work = self._roster.revoke_token(token_id, self._actor(context))
        return pb.RevokeTokenResponse(token=_token_view(await self._asked(context, "token revoke", token_id, work)))

    # -- certificates

    async def ListCertificates(self, request: pb.ListCertificatesRequest, context: Aborting) -> pb.ListCertificatesResponse:  # type: ignore[override]
        rows = self._roster.certificates()[-CERTIFICATES_MAX:]
        return pb.ListCertificatesResponse(certificates=[_certificate_view(row) for row in rows])

    async def RevokeIdentity(self, request: pb.RevokeIdentityRequest, context: Aborting) -> pb.RevokeIdentityResponse:  # type: ignore[override]
        kind = _KINDS.get(request.kind)
        if kind is None or not NAME.fullmatch(request.name):
            why = "a kind (agent or operator) and a name of 1 to 63 of A-Z a-z 0-9 . _ - are needed"
            await self._refuse(context, "revoke", request.name, why, grpc.StatusCode.INVALID_ARGUMENT)
        reason = convert.line(request.reason, REASON_CHARACTERS_MAX)
        work = self._roster.revoke(kind, request.name, reason, self._actor(context))
        done = await self._asked(context, "revoke", f"{kind} {request.name}", work)
        streams = self._gate.cut(kind, request.name)
        log.warning("revoked %s=%s certificates=%d calls=%d by=%s", kind, request.name, done.certificates, streams, gate.caller())
        return pb.RevokeIdentityResponse(certificates=done.certificates, streams=streams)

    async def SetQuarantine(self, request: pb.SetQuarantineRequest, context: Aborting) -> pb.SetQuarantineResponse:  # type: ignore[override]
        name = convert.line(request.device_name, 80)
        reason = ""
        if request.quarantined:
            reason = convert.line(request.reason, REASON_CHARACTERS_MAX) or f"by {gate.caller()}"
        await self._asked(context, "quarantine", name, self._roster.set_quarantine(name, reason, self._actor(context)))
        log.warning("device=%s %s", name, f"in quarantine reason={reason!r}" if reason else "released from quarantine")
        self._on_quarantine()
        return pb.SetQuarantineResponse()

    # -- small parts

    async def _asked(self, context: Aborting, action: str, subject: str, work: Awaitable[T]) -> T:
        try:
            return await work
        except RosterError as error:
            await self._refuse(context, action, subject, str(error), _CODES.get(error.kind, grpc.StatusCode.INVALID_ARGUMENT))
        except DiskFullError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def _refuse(self, context: Aborting, action: str, subject: str, why: str, code: grpc.StatusCode) -> NoReturn:
        await self._roster.note_refusal(self._actor(context), action, convert.line(subject, 100), why)
        await context.abort(code, why)

    def _actor(self, context: Aborting) -> str:
        return f"{gate.caller()} {convert.line(context.peer(), 100)}"


def _token_objection(request: pb.CreateTokenRequest) -> str:
    if request.kind not in _KINDS:
        return "a token is for a device or for an operator"
    if request.kind == pb.IDENTITY_KIND_OPERATOR and request.role not in (pb.ROLE_VIEW, pb.ROLE_OPERATE, pb.ROLE_ADMIN):
        return "the token of an operator needs a role: view, operate or admin"
    if request.kind == pb.IDENTITY_KIND_AGENT and request.role != pb.ROLE_UNSPECIFIED:
        return "devices have no role"
    if request.name and not NAME.fullmatch(request.name):
        return f"the name {convert.line(request.name, 80)!r} is not 1 to 63 of A-Z a-z 0-9 . _ -"
    if request.name and request.uses != 1:
        return "a token for one name is good for one use"
    if not 1 <= request.uses <= tokens.USES_MAX:
        return f"a token has 1 to {tokens.USES_MAX} uses, not {request.uses}"
    if not (math.isfinite(request.ttl_s) and tokens.TTL_S_MIN <= request.ttl_s <= tokens.TTL_S_MAX):
        return f"a token lives from {tokens.TTL_S_MIN:.0f} s to {tokens.TTL_S_MAX / 86_400:.0f} days, not {request.ttl_s:g} s"
    return ""


def _token_view(token: Token) -> pb.TokenView:
    return pb.TokenView(
        token_id=token.token_id,
        kind=_WORDS[token.kind],
        role=pb.Role.ValueType(int(token.role)),
        name=token.name,
        replace=token.replace,
        uses_left=token.uses_left,
        created_unix_s=token.created_unix_s,
        expires_unix_s=token.expires_unix_s,
        revoked=token.revoked_unix_s > 0,
        creator=token.creator,
    )


def _certificate_view(row: CertificateRow) -> pb.CertificateView:
    return pb.CertificateView(
        fingerprint=row.fingerprint,
        kind=_WORDS[row.kind],
        name=row.name,
        device_id=row.device_id,
        role=pb.Role.ValueType(row.role),
        not_before_unix_s=row.not_before_unix_s,
        not_after_unix_s=row.not_after_unix_s,
        revoked_unix_s=row.revoked_unix_s,
    )
