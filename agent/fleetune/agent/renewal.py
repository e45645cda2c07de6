"""A new certificate in time, without a person: asked for over the present connection, checked, stored, then used."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio

from fleetune.agent.credentials import Credentials
from fleetune.agent.links import Line
from fleetune.errors import FleetuneError, UnsupportedError, WireError
from fleetune.v1 import registry_pb2, registry_pb2_grpc
from fleetune.waiting import happened, within
from fleetune.wire import identity
from fleetune.wire.identity import Facts, Identity
from fleetune.workers import Workers

if TYPE_CHECKING:
    from fleetune.v1.registry_pb2_grpc import RegistryServiceAsyncStub

LOG = logging.getLogger(__name__)

CALL_S = 20.0
CHILD_S = 60.0
"""A Raspberry Pi under load takes seconds to start Python and load the library."""

LOOK_S = 30.0
"""Longest sleep between two looks at the wall clock, which may be set meanwhile."""

SPREAD = 0.05
"""Of a life: boards that joined in one hour do not renew in one second."""

ASKED_SPREAD_S = 5.0
"""The same where the coordinator asks all of them at once."""

RETRY_MIN_S = 10.0
RETRY_MAX_S = 3600.0

ANSWER_BYTES_MAX = 1 << 20


class Renewer:
    """Owner of the agent's renewals. `on_renewed` is called on the event loop once the new identity is stored and in use."""

    def __init__(self, credentials: Credentials, line: Line, connected: Callable[[], bool], on_renewed: Callable[[], None]) -> None:
        self._credentials = credentials
        self._line = line
        self._connected = connected
        self._on_renewed = on_renewed
        self._asked = asyncio.Event()
        self._files = Workers("identity")
        self._spread = random.random()

    def ask(self) -> None:
        """The coordinator wants it renewed now."""
        self._asked.set()

    def due_in_s(self, facts: Facts) -> float:
        """Seconds until two thirds of the life are over, and this agent's share of the spread."""
        return identity.renewal_due_unix_s(facts) + (facts.not_after_unix_s - facts.not_before_unix_s) * SPREAD * self._spread - time.time()

    async def run(self) -> None:
        """Renew whenever it is due, until cancelled."""
        failures = 0
        try:
            while True:
                own = self._credentials.identity
                if own is None:
                    await asyncio.Event().wait()
                    return
                if self._credentials.reread():  # somebody has joined again, or brought a certificate
                    self._on_renewed()
                    continue
                due_in_s = self.due_in_s(own.facts)
                asked = await happened(self._asked, min(LOOK_S, max(due_in_s, 0.0)))
                if asked:
                    await asyncio.sleep(random.uniform(0.0, ASKED_SPREAD_S))
                if not asked and self.due_in_s(own.facts) > 0:
                    continue
                if not self._connected() or identity.trouble(own.facts):
                    # What keeps the session from connecting keeps this from renewing, and is told there.
                    await asyncio.sleep(min(LOOK_S, 1.0))
                    continue
                try:
                    await self.renew(own)
                    failures = 0
                    self._asked.clear()
                except (FleetuneError, OSError, grpc.aio.AioRpcError, asyncio.TimeoutError) as error:
                    wait_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                    failures += 1
                    left_s = own.facts.not_after_unix_s - time.time()
                    wait_s = max(1.0, min(wait_s, left_s / 10))
                    LOG.error(
                        "certificate not renewed name=%s days_left=%.1f try=%d wait_s=%.0f cause=%r",
                        own.facts.name,
                        left_s / 86_400,
                        failures,
                        wait_s,
                        _words(error),
                    )
                    await asyncio.sleep(wait_s)
        finally:
            self._files.close()

    async def renew(self, own: Identity) -> None:
        """One renewal. AioRpcError, FleetuneError, OSError or TimeoutError where it fails, and then nothing has changed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fleetune.agent.keymaker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=ANSWER_BYTES_MAX,
        )
        try:
            made = await _exchange(process, {"name": own.facts.name})
            renewed = await self._ask(own, made)
            answers = {"certificate": renewed.certificate.decode("ascii"), "roots": renewed.roots.decode("ascii")}
            wrong = (await _exchange(process, answers)).get("wrong", "no answer")
            if wrong:
                raise WireError(f"The coordinator's new certificate cannot be used: {wrong}")
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
        if wrong := identity.trouble(renewed.facts):
            raise WireError(f"The coordinator's new certificate cannot be used: {wrong}.", "Compare the clocks of both machines.")
        await self._files.run(self._credentials.store, renewed)
        LOG.info("certificate renewed name=%s days=%.1f", renewed.facts.name, (renewed.facts.not_after_unix_s - time.time()) / 86_400)
        self._on_renewed()

    async def _ask(self, own: Identity, made: dict[str, str]) -> Identity:
        request = registry_pb2.RenewRequest(signing_request=base64.b64decode(made["signing_request"]))
        async with self._line.use() as channel:
            stub: RegistryServiceAsyncStub = registry_pb2_grpc.RegistryServiceStub(channel)
            call = stub.Renew(request, timeout=CALL_S)
            try:
                credentials = (await call).credentials
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    place = self._credentials.folder
                    raise UnsupportedError(
                        "This coordinator issues no certificates.", f"Put a new one into {place} before the old one ends."
                    ) from error
                raise
            finally:
                call.cancel()
        if credentials.kind != registry_pb2.IDENTITY_KIND_AGENT or not credentials.certificate or not credentials.roots:
            raise WireError("The coordinator's answer is no whole certificate.")
        if credentials.name != own.facts.name:
            raise WireError(f"The coordinator's new certificate is for {credentials.name!r}, not for {own.facts.name!r}.")
        facts = Facts(
            "agent",
            own.facts.name,
            "",
            own.facts.coordinator,
            credentials.server_name,
            credentials.not_before_unix_s,
            credentials.not_after_unix_s,
        )
        return Identity(facts, made["key"].encode("ascii"), credentials.certificate.encode("ascii"), credentials.roots.encode("ascii"))


async def _exchange(process: asyncio.subprocess.Process, fields: dict[str, str]) -> dict[str, str]:
    """One line to the child, one back. WireError where it ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(fields).encode() + b"\n")
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass  # what it says, or that it says nothing, tells more
    line = await within(CHILD_S, process.stdout.readline())
    if not line:
        raise WireError(f"The process that makes keys ended with code {await process.wait()}.", "Its own words stand above in the log.")
    return cast("dict[str, str]", json.loads(line))


def _words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
