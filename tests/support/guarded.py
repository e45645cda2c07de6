"""A whole coordinator with TLS inside the test's process, with an authority of its own, and hand-made clients of every identity."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio

from fleetune.coordinator import authority, daemon, tlsfolder, tokens
from fleetune.coordinator.config import TlsFiles
from fleetune.coordinator.daemon import Running
from fleetune.coordinator.principal import Role
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.tokens import Token, Wish
from fleetune.v1 import control_pb2_grpc, registry_pb2_grpc
from fleetune.wire import keys
from fleetune.wire.identity import SERVER_NAME, Facts, Identity
from support.certificates import Authority, Pair
from support.coordinating import settings
from support.echo_agent import EchoAgent


@dataclass
class Guarded:
    """The running parts, and what clients need."""

    running: Running
    authority: Authority
    state_dir: Path
    opened: list[grpc.aio.Channel] = field(default_factory=list[grpc.aio.Channel])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.running.port}"

    async def enrol(self, name: str, device_id: str = "", role: Role = Role.NONE) -> Pair:
        """Join as a device, or as an operator of `role`."""
        now, secret, key = time.time(), tokens.make(), keys.make_key()
        kind: Literal["agent", "operator"] = "agent" if device_id else "operator"
        token = Token(tokens.digest(secret), kind, role, name, False, 1, 1, now, now + 3600, "a test")
        await self.running.roster.create_token(token, "a test")
        enrolled = await self.running.roster.join(secret, Wish(name, device_id), keys.request_for(key), "127.0.0.1")
        return Pair(key, enrolled.certificate)

    def open(self, pair: Pair) -> Any:  # Any: raw calls have no types
        self.opened.append(self.authority.channel(self.address, pair))
        return self.opened[-1]

    def identity(self, pair: Pair, name: str) -> Identity:
        facts = Facts("agent", name, "", self.address, SERVER_NAME, 0.0, time.time() + 3600)
        return Identity(facts, pair.key, pair.certificate, self.authority.root)

    def agent(self, pair: Pair, name: str, **changes: object) -> EchoAgent:
        """An agent that calls itself `name`, with the id `device-NAME`, whoever the certificate is of."""
        return TlsAgent(self, pair, name, **changes)

    def control(self, pair: Pair) -> control_pb2_grpc.ControlServiceAsyncStub:
        stub: control_pb2_grpc.ControlServiceAsyncStub = control_pb2_grpc.ControlServiceStub(self.open(pair))
        return stub

    def registry(self, pair: Pair) -> registry_pb2_grpc.RegistryServiceAsyncStub:
        stub: registry_pb2_grpc.RegistryServiceAsyncStub = registry_pb2_grpc.RegistryServiceStub(self.open(pair))
        return stub

    async def submit(self, toml: str) -> LiveJob:
        return await self.running.engine.submit(toml, f"submit-{len(self.running.engine.jobs)}")


class TlsAgent(EchoAgent):
    def __init__(self, place: Guarded, pair: Pair, name: str, **changes: object) -> None:
        super().__init__(place.address, name, **changes)  # type: ignore[arg-type]  # EchoAgent's own
        self._place, self._pair = place, pair

    def open(self) -> grpc.aio.Channel:
        channel: grpc.aio.Channel = self._place.authority.channel(self.address, self._pair)
        return channel


def _own(state_dir: Path) -> Authority:
    made = tlsfolder.read(tlsfolder.of(state_dir)).authority
    return Authority(key=made.key, root=authority.pem_of(made.root))


def _files(folder: Path, brought: Authority) -> TlsFiles:
    pair = brought.server()
    files = TlsFiles(folder / "roots.pem", folder / "server.pem", folder / "server.key")
    for path, text in ((files.roots, brought.root), (files.certificate, pair.certificate), (files.key, pair.key)):
        path.write_bytes(text)
        path.chmod(0o600)
    return files


@contextlib.asynccontextmanager
async def guarding(state_dir: Path, brought: Authority | None = None, **changes: object) -> AsyncIterator[Guarded]:
    """Everything opened as the daemon does after `fleetune init`, with its engine running; again on the same folder: after a restart.

    `brought`: another authority, with files of its own beside `state_dir`, instead of that of `fleetune init`.
    """
    state_dir.mkdir(exist_ok=True)  # noqa: ASYNC240  # nothing else runs yet
    if brought is not None:
        changes["tls"] = _files(state_dir.parent, brought)
    elif tlsfolder.missing(state_dir):
        tlsfolder.make(state_dir, "", time.time())
    async with daemon.running(settings(state_dir, **{"plaintext": False, **changes})) as running:
        place = Guarded(running, brought or _own(state_dir), state_dir)
        writer = asyncio.create_task(running.engine.run(), name="engine")
        try:
            yield place
        finally:
            for opened in place.opened:
                await opened.close()
            running.fleet.hang_up()
            await running.server.stop(grace=0)
            writer.cancel()
            result = (await asyncio.gather(writer, return_exceptions=True))[0]
        if isinstance(result, Exception):
            raise result
