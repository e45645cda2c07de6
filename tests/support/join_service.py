"""A small coordinator for those who join and renew: JoinService with the server's certificate alone, RegistryService.Renew for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fleetune.v1 import registry_pb2, registry_pb2_grpc
from fleetune.wire import channel
from fleetune.wire.identity import SERVER_NAME
from support.authority import DAY_S, Authority, Leaf

# A servicer context is generic in a way that says nothing here.
Context = Any

TOKEN = "a-token-of-a-test-000000"


@dataclass
class Door(registry_pb2_grpc.JoinServiceServicer):
    """Takes TOKEN as often as it comes; what it was told is kept."""

    authority: Authority
    life_s: float = 30 * DAY_S
    joins: list[registry_pb2.JoinRequest] = field(default_factory=list[registry_pb2.JoinRequest])
    renewals: list[registry_pb2.RenewRequest] = field(default_factory=list[registry_pb2.RenewRequest])
    answers: list[tuple[grpc.StatusCode, str]] = field(default_factory=list[tuple[grpc.StatusCode, str]])
    """For the next calls, instead of a certificate."""
    roots: bytes = b""
    """Told to those who join and renew; the authority's if empty."""
    name: str = "one"
    device_id: str = "0123456789abcdef0123456789abcdef"

    async def Join(self, request: registry_pb2.JoinRequest, context: Context) -> registry_pb2.JoinResponse:
        self.joins.append(request)
        await self._refuse(context)
        if request.token != TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"no token {request.token}")
        self.name, self.device_id = request.name, request.device_id
        return registry_pb2.JoinResponse(credentials=self._signed(request.signing_request))

    async def Renew(self, request: registry_pb2.RenewRequest, context: Context) -> registry_pb2.RenewResponse:
        self.renewals.append(request)
        await self._refuse(context)
        return registry_pb2.RenewResponse(credentials=self._signed(request.signing_request))

    def add_renewal(self, server: grpc.aio.Server) -> None:
        """RegistryService with Renew alone."""
        handler = grpc.unary_unary_rpc_method_handler(
            self.Renew,
            request_deserializer=registry_pb2.RenewRequest.FromString,
            response_serializer=registry_pb2.RenewResponse.SerializeToString,
        )
        service = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Renew": handler}),))

    async def _refuse(self, context: Context) -> None:
        if self.answers:
            await context.abort(*self.answers.pop(0))

    def _signed(self, request: bytes) -> registry_pb2.Credentials:
        key = x509.load_der_x509_csr(request).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        agent = bool(self.device_id)
        uri = f"urn:fleetune:agent:{self.device_id}" if agent else "urn:fleetune:operator:operate"
        pem, begin_s, end_s = self.authority.sign(key, self.name, uri, life_s=self.life_s)
        return registry_pb2.Credentials(
            certificate=pem.decode(),
            roots=(self.roots or self.authority.root).decode(),
            server_name=SERVER_NAME,
            kind=registry_pb2.IDENTITY_KIND_AGENT if agent else registry_pb2.IDENTITY_KIND_OPERATOR,
            name=self.name,
            role=registry_pb2.ROLE_UNSPECIFIED if agent else registry_pb2.ROLE_OPERATE,
            not_before_unix_s=begin_s,
            not_after_unix_s=end_s,
        )


def server_credentials(leaf: Leaf, root: bytes, *, mutual: bool) -> grpc.ServerCredentials:
    """Shows the leaf with the root behind it; `mutual` wants a certificate from that root."""
    return grpc.ssl_server_credentials(
        [(leaf.key, leaf.certificate + root)], root_certificates=root if mutual else None, require_client_auth=mutual
    )


@contextlib.asynccontextmanager
async def joining(door: Door, *, leaf: Leaf | None = None, root: bytes = b"") -> AsyncIterator[int]:
    """Serves the door on a free port of loopback, which it yields; with another leaf or root where the test wants a wrong one."""
    server = grpc.aio.server(options=channel.server_options())
    registry_pb2_grpc.add_JoinServiceServicer_to_server(door, server)
    credentials = server_credentials(leaf or door.authority.leaf(), root or door.authority.root, mutual=False)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)
