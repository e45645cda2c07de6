"""The operator's side of RegistryService: tokens, revocation, quarantine."""

from __future__ import annotations

from fleetune.coordinator.client import UNARY_DEADLINE_S, Client
from fleetune.v1 import registry_pb2 as pb
from fleetune.v1 import registry_pb2_grpc
from fleetune.wire.identity import Identity


class FleetClient(Client):
    """A connection to a coordinator for what concerns its fleet."""

    def __init__(self, address: str, identity: Identity | None = None) -> None:
        super().__init__(address, identity)
        self._registry = registry_pb2_grpc.RegistryServiceStub(self._channel)

    async def __aenter__(self) -> FleetClient:
        return self

    @property
    def identity(self) -> Identity | None:
        """As whom it asks; None in plaintext."""
        return self._identity

    async def renew(self, signing_request: bytes) -> pb.Credentials:
        """A new certificate for the identity of this connection."""
        request = pb.RenewRequest(signing_request=signing_request)
        return (await self._unary(self._registry.Renew(request, timeout=UNARY_DEADLINE_S))).credentials

    async def create_token(self, request: pb.CreateTokenRequest) -> pb.CreateTokenResponse:
        """The secret is in the answer, and nowhere else."""
        return await self._unary(self._registry.CreateToken(request, timeout=UNARY_DEADLINE_S))

    async def tokens(self) -> list[pb.TokenView]:
        """Those of the last months, the oldest first."""
        return list((await self._unary(self._registry.ListTokens(pb.ListTokensRequest(), timeout=UNARY_DEADLINE_S))).tokens)

    async def revoke_token(self, token_id: str) -> pb.TokenView:
        """NotFoundError for an id that no token has."""
        return (await self._unary(self._registry.RevokeToken(pb.RevokeTokenRequest(token_id=token_id), timeout=UNARY_DEADLINE_S))).token

    async def certificates(self) -> list[pb.CertificateView]:
        """All that were given out, the oldest first."""
        reply = await self._unary(self._registry.ListCertificates(pb.ListCertificatesRequest(), timeout=UNARY_DEADLINE_S))
        return list(reply.certificates)

    async def revoke(self, kind: pb.IdentityKind.ValueType, name: str, reason: str) -> pb.RevokeIdentityResponse:
        """NotFoundError for a name that nobody has."""
        request = pb.RevokeIdentityRequest(kind=kind, name=name, reason=reason)
        return await self._unary(self._registry.RevokeIdentity(request, timeout=UNARY_DEADLINE_S))

    async def set_quarantine(self, name: str, quarantined: bool, reason: str = "") -> None:
        """NotFoundError for a name that no device has."""
        request = pb.SetQuarantineRequest(device_name=name, quarantined=quarantined, reason=reason)
        await self._unary(self._registry.SetQuarantine(request, timeout=UNARY_DEADLINE_S))
