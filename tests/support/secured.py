"""A whole coordinator with TLS and its own authority in the test's process, and who joins it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fleetune.coordinator import door, initialise
from fleetune.v1 import registry_pb2 as pb
from fleetune.v1 import registry_pb2_grpc
from fleetune.wire import channel, enrolment, identity, keys
from fleetune.wire.identity import SERVER_NAME, Identity
from support.coordinating import WAIT_S, Coordinator, coordinating, settings

DEVICE = "device-0001"


@dataclass
class Secured:
    """A running coordinator and the administrator that `fleetune init` made."""

    coordinator: Coordinator
    admin: Identity
    registry: registry_pb2_grpc.RegistryServiceAsyncStub
    """As the administrator."""
    roots: bytes

    async def token(
        self,
        uses: int = 1,
        *,
        name: str = "",
        replace: bool = False,
        ttl_s: float = 600.0,
        role: pb.Role.ValueType = pb.ROLE_UNSPECIFIED,
    ) -> str:
        kind = pb.IDENTITY_KIND_OPERATOR if role else pb.IDENTITY_KIND_AGENT
        request = pb.CreateTokenRequest(kind=kind, role=role, name=name, replace=replace, uses=uses, ttl_s=ttl_s)
        return (await self.registry.CreateToken(request)).token

    async def join(self, token: str, name: str, device_id: str = DEVICE) -> Identity:
        """AioRpcError where it is refused."""
        request = keys.make_request("whoever")
        message = pb.JoinRequest(token=token, signing_request=request.signing_request, name=name, device_id=device_id)
        options = [("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.use_local_subchannel_pool", 1)]
        address = f"127.0.0.1:{self.coordinator.running.join_port}"
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self.roots), options=options) as joining:
            reply = await registry_pb2_grpc.JoinServiceStub(joining).Join(message)
        return enrolment.identity_of(reply.credentials, request.key, self.coordinator.address)

    @contextlib.asynccontextmanager
    async def channel(self, who: Identity) -> AsyncGenerator[grpc.aio.Channel]:
        opened = channel.open_channel(self.coordinator.address, who)
        try:
            yield opened
        finally:
            await opened.close()

    async def serves(self, who: Identity) -> grpc.StatusCode:
        """What this certificate gets for the one question that all may ask, on a connection of its own."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        async with self.channel(who) as opened:
            try:
                stub: Any = health_pb2_grpc.HealthStub(opened)  # Any: its stubs give the class no methods
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    async def renew(self, who: Identity) -> Identity:
        async with self.channel(who) as opened:
            request = keys.make_request(who.facts.name)
            message = pb.RenewRequest(signing_request=request.signing_request)
            reply = await registry_pb2_grpc.RegistryServiceStub(opened).Renew(message)
        return enrolment.identity_of(reply.credentials, request.key, self.coordinator.address)


@contextlib.asynccontextmanager
async def secured(folder: Path, **changes: object) -> AsyncGenerator[Secured]:
    """The state lies in folder/state, the administrator's identity in folder/admin; both stay for the next start."""
    state_dir = folder / "state"
    if not (folder / "admin").exists():
        await asyncio.to_thread(initialise.initialise, settings(state_dir, plaintext=False), "ada", folder / "admin", "")
    admin = identity.load(folder / "admin")
    assert admin is not None
    with pytest.MonkeyPatch.context() as patched:
        # Who joins is served however long a busy machine takes to say its first word.
        patched.setattr(door, "FIRST_BYTES_S", WAIT_S)
        patched.setattr(door, "VISIT_S", WAIT_S)
        async with coordinating(state_dir, as_operator=admin, plaintext=False, **changes) as coordinator:
            stub = registry_pb2_grpc.RegistryServiceStub(coordinator.operator)
            yield Secured(coordinator, admin, stub, (state_dir / "tls" / "roots.pem").read_bytes())
