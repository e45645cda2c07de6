"""The control stream: dialled by the agent, kept open, reopened with jittered back-off when it is cut."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import grpc
import grpc.aio

from fleetune.agent import convert, diagnosis
from fleetune.agent.backoff import Backoff
from fleetune.agent.credentials import Credentials
from fleetune.agent.domain import Receipt, Task, Welcome
from fleetune.agent.links import Links
from fleetune.errors import FleetuneError, UnreachableError, WireError
from fleetune.v1 import fleet_pb2, fleet_pb2_grpc
from fleetune.waiting import happened, within
from fleetune.wire.answers import Answer, let_go

if TYPE_CHECKING:
    from fleetune.v1.fleet_pb2_grpc import FleetServiceAsyncStub

LOG = logging.getLogger(__name__)

WELCOME_DEADLINE_S = 10.0
"""From dialling to Welcome. A host that swallows packets would otherwise hold the agent for minutes."""

REFUSED_S = 60.0
"""At least so long between two tries at a coordinator that does not take this agent's certificate: only a person can change that."""

REREAD_S = 2.0
"""How often such a wait looks whether somebody has joined again, or set the clock."""

SUSPICIONS = 3
"""Failures in a row, none of them a refused connection, before a look at what answers there."""

LEAVE_DEADLINE_S = 1.0
BEATS_MAX = 16
LOG_MESSAGES_MAX = 64
"""Log messages waiting for a slow link; the oldest go first, they are a convenience."""


class RefusedError(FleetuneError):
    """The coordinator does not take this agent, and trying again will not help."""


class Listener(Protocol):
    """Who hears what the coordinator says. Called on the event loop; must not block."""

    def connected(self, welcome: Welcome) -> None: ...
    def disconnected(self) -> None: ...
    def task(self, task: Task) -> None: ...
    def unusable_task(self, task_id: str, lease: int, error: WireError) -> None: ...
    def cancel(self, task_id: str, reason: str) -> None: ...
    def receipt(self, receipt: Receipt) -> None: ...
    def renew(self) -> None: ...
    def set_uplink(self, task_id: str, bits_per_s: float) -> None: ...
    def answered(self, seconds: float) -> None:
        """A heartbeat was answered after so long."""


class _Lost(Exception):
    """This session is over; another one may be tried."""


class _Redial(Exception):
    """This session goes over to a new connection at once."""


class Session:
    """One agent's control stream over time. Owner of the stream and of what waits to be written to it."""

    def __init__(
        self,
        links: Links,
        credentials: Credentials,
        listener: Listener,
        hello: Callable[[], Awaitable[fleet_pb2.Hello]],
        heartbeat: Callable[[int], Awaitable[fleet_pb2.Heartbeat]],
        *,
        connect_timeout_s: float | None = None,
    ) -> None:
        self._links = links
        self._credentials = credentials
        self._listener = listener
        self._hello = hello
        self._heartbeat = heartbeat
        self._connect_timeout_s = connect_timeout_s
        self._mailbox = Mailbox()
        self._connected = False
        self._ever_connected = False
        self._complained = False
        self._duplicate_until_s: float | None = None
        self._leaving = asyncio.Event()
        self._redial = asyncio.Event()
        self._news = asyncio.Event()
        # Heartbeats without an answer: sequence -> when each was written.
        self._beats: dict[int, float] = {}
        # Failures before a welcome, in a row, that a coordinator which is merely away does not explain.
        self._suspicions = 0
        self._welcomed = False
        self._told = ""

    @property
    def connected(self) -> bool:
        return self._connected

    def send_outcome(self, outcome: fleet_pb2.TaskOutcome) -> None:
        """Write an outcome; dropped while disconnected, since all unreceipted ones are sent again after the next Welcome."""
        if self._connected:
            self._mailbox.put(fleet_pb2.SessionRequest(outcome=outcome))

    def send_availability(self, availability: fleet_pb2.Availability) -> None:
        """Write a change; dropped while disconnected, since Hello tells the state at every connect."""
        if self._connected:
            self._mailbox.put(fleet_pb2.SessionRequest(availability=availability))

    def send_progress(self, progress: fleet_pb2.TaskProgress) -> None:
        """Write progress, in place of an older one of the same task that still waits. Losing it loses nothing."""
        if self._connected:
            self._mailbox.put_progress(progress)

    def send_log(self, log: fleet_pb2.TaskLog) -> None:
        """Write lines of a training child; the oldest are dropped where the link is too slow for them."""
        if self._connected:
            self._mailbox.put_log(log)

    def beat_now(self) -> None:
        """A heartbeat has something to tell that should not wait for its time."""
        self._news.set()

    def redial(self) -> None:
        """Go over to a new connection, with the present certificate; what waits to be written is offered again there."""
        self._redial.set()

    async def leave(self, reason: str) -> None:
        """Tell the coordinator that the agent ends, and wait briefly until it has heard. `run` returns after it."""
        self._leaving.set()
        if self._connected:
            self._mailbox.close_with(fleet_pb2.SessionRequest(leaving=fleet_pb2.Leaving(reason=reason)))
            await happened(self._mailbox.written, LEAVE_DEADLINE_S)

    async def run(self) -> None:
        """Keep a session open until `leave`. RefusedError for a final refusal, UnreachableError after the first-connect timeout."""
        backoff = Backoff()
        started_s = time.monotonic()
        while not self._leaving.is_set():
            retry_after_s = 0.0
            barred = diagnosis.Finding(self._credentials.trouble())
            try:
                if barred.refused:
                    raise _Lost(barred.refused)
                left_s = WELCOME_DEADLINE_S
                if not self._ever_connected and self._connect_timeout_s is not None:
                    left_s = min(left_s, max(0.1, started_s + self._connect_timeout_s - time.monotonic()))
                await self._once(backoff, left_s)
                cause = "the coordinator ended the session"
            except _Redial:
                continue
            except _Refused as refused:
                now_s = time.monotonic()
                if refused.kind == fleet_pb2.REFUSAL_KIND_DUPLICATE_ID:
                    # The coordinator may hold an old session of this very agent until its lease has run out after a cut, which is when
                    # it says to try again; whoever has the id then is a second agent.
                    if self._duplicate_until_s is None:
                        self._duplicate_until_s = now_s + refused.retry_after_s
                    elif now_s >= self._duplicate_until_s:
                        refused.retry_after_s = 0.0
                if refused.retry_after_s <= 0:
                    raise RefusedError(
                        f"The coordinator at {self._credentials.address} refused this agent: {refused}", _remedy(refused.kind)
                    ) from refused
                retry_after_s, cause = refused.retry_after_s, f"refused: {refused}"
            except grpc.aio.AioRpcError as error:
                cause = f"{error.code().name}: {error.details()}"
                barred = await self._why(error.code(), error.details() or "")
            except _Lost as lost:
                cause = str(lost)
                if not barred.refused:
                    barred = await self._why(None, "")
            if self._leaving.is_set():
                return
            wait_s = max(backoff.next_s(), min(retry_after_s, 60.0))
            if barred.refused:
                cause, wait_s = barred.refused, max(wait_s, random.uniform(REFUSED_S, 1.5 * REFUSED_S))
            waited_s = time.monotonic() - started_s
            if not self._ever_connected and self._connect_timeout_s is not None and waited_s + wait_s > self._connect_timeout_s:
                within_s = self._connect_timeout_s
                raise UnreachableError(
                    f"The coordinator at {self._credentials.address} did not take this agent within {within_s:g} s ({cause}).",
                    barred.remedy or "Check that `fleetune serve` runs there and that its port can be reached.",
                )
            if barred.refused:
                await self._rest(barred, wait_s)
                backoff.reset()
                continue
            # Said once per trouble, not once per try: an agent may wait for days.
            level = logging.DEBUG if self._complained else logging.WARNING
            self._complained = True
            address = self._credentials.address
            LOG.log(level, "not connected, retrying until it works coordinator=%s wait_s=%.1f cause=%r", address, wait_s, cause)
            await happened(self._leaving, wait_s)

    async def _why(self, code: grpc.StatusCode | None, details: str) -> diagnosis.Finding:
        """Whether a session that failed would go on failing for the certificate's sake."""
        own = self._credentials.identity
        if own is None:
            return diagnosis.SOUND
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return diagnosis.Finding(
                f"the coordinator refuses the certificate of {own.facts.name!r}: {details or code.name}",
                "If this device is to come back, an operator makes a token for it: `fleetune token create --name "
                f"{own.facts.name} --replace`; then `fleetune-agent join --again` here.",
            )
        if self._welcomed or "Connection refused" in details:
            self._suspicions = 0
            return diagnosis.SOUND
        closed = "failed to connect" in details and "Socket closed" in details
        plain = closed or "handshake failed" in details or "verification" in details
        self._suspicions = SUSPICIONS if plain else self._suspicions + 1
        if self._suspicions < SUSPICIONS:
            return diagnosis.SOUND
        found = await diagnosis.look(self._credentials.address, own, self._credentials.folder)
        self._suspicions = SUSPICIONS - 1 if found.refused else 0
        return found

    async def _rest(self, barred: diagnosis.Finding, wait_s: float) -> None:
        """Leave the coordinator alone for `wait_s`, or until there is another identity, or a clock by which this one is good."""
        if barred.refused != self._told:
            self._told = barred.refused
            remedy = barred.remedy or "Set the clock if it is wrong; else join again with a new token: `fleetune-agent join --again`."
            LOG.error("not connected: %s. %s Trying again every minute or so.", barred.refused, remedy)
        by_dates = bool(self._credentials.trouble())
        until_s = time.monotonic() + wait_s
        self._links.pause()
        try:
            while time.monotonic() < until_s and not await happened(self._leaving, REREAD_S):
                if self._credentials.reread() or (by_dates and not self._credentials.trouble()):
                    self._told = ""
                    break
        finally:
            self._links.resume()

    async def _once(self, backoff: Backoff, welcome_deadline_s: float) -> None:
        """One session from dialling to its end."""
        self._welcomed = False
        self._redial.clear()
        async with self._links.control.use() as channel:
            # The first try fails at once and tells why. Later ones wait for the channel, which dials with a back-off of its own: were
            # they to fail at once too, the two waits would add up.
            stub: FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
            call = stub.Session(wait_for_ready=backoff.failures > 0)
            answer = Answer(call)
            try:
                try:
                    welcome = await within(welcome_deadline_s, self._greet(call, answer))
                except asyncio.TimeoutError:
                    raise _Lost(f"no answer within {welcome_deadline_s:g} s") from None
                backoff.reset()
                self._complained = False
                self._told = ""
                self._suspicions = 0
                self._duplicate_until_s = None
                self._ever_connected = self._connected = self._welcomed = True
                self._mailbox = Mailbox()
                self._beats.clear()
                self._listener.connected(welcome)
                try:
                    await self._converse(call, answer, welcome)
                finally:
                    self._connected = False
                    self._mailbox.abandon()
                    self._listener.disconnected()
            finally:
                let_go(call)

    async def _greet(self, call: Call, answer: Answer) -> Welcome:
        # What the agent holds is told as of now, not as of the time when it began to dial.
        await call.wait_for_connection()
        hello = await self._hello()
        try:
            # A coordinator that does not take this certificate says so without waiting for Hello.
            await answer.heard(call.write(fleet_pb2.SessionRequest(hello=hello)))
        except asyncio.InvalidStateError:
            raise _Lost("the stream was cut before Hello") from None
        response = await answer.heard(call.read())
        if not isinstance(response, fleet_pb2.SessionResponse):
            raise _Lost("the coordinator ended the stream before a welcome")
        body = response.WhichOneof("body")
        if body == "refusal":
            raise _Refused(response.refusal)
        if body != "welcome":
            raise _Lost(f"the coordinator answered Hello with {body or 'an unknown message'}")
        return convert.welcome(response.welcome)

    async def _converse(self, call: Call, answer: Answer, welcome: Welcome) -> None:
        """Read, write and heartbeat until one of the three ends; the others are then ended too."""
        pulse = _Pulse(welcome.lease_s)
        parts = [
            asyncio.create_task(answer.heard(self._read(call, welcome, pulse)), name="session reader"),
            asyncio.create_task(answer.heard(self._write(call)), name="session writer"),
            asyncio.create_task(self._beat(welcome.heartbeat_s), name="session heartbeat"),
            asyncio.create_task(pulse.lost(), name="session lease"),
            asyncio.create_task(self._moved(), name="session redial"),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
        for part in done:
            error = part.exception() if not part.cancelled() else None
            if isinstance(error, asyncio.InvalidStateError):
                raise _Lost("the stream was cut") from error
            if error is not None:
                raise error

    async def _moved(self) -> None:
        await self._redial.wait()
        raise _Redial

    async def _read(self, call: Call, welcome: Welcome, pulse: _Pulse) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, fleet_pb2.SessionResponse):
                return
            pulse.beat()
            self._hear(response, welcome)

    def _hear(self, response: fleet_pb2.SessionResponse, welcome: Welcome) -> None:
        body = response.WhichOneof("body")
        if body == "task":
            try:
                task = convert.task(response.task, welcome.epoch)
            except WireError as error:
                self._listener.unusable_task(response.task.task_id, response.task.lease, error)
            else:
                self._listener.task(task)
        elif body == "cancel":
            self._listener.cancel(response.cancel.task_id, response.cancel.reason)
        elif body == "receipt":
            self._listener.receipt(convert.receipt(response.receipt))
        elif body == "renew":
            self._listener.renew()
        elif body == "set_uplink":
            self._listener.set_uplink(response.set_uplink.task_id, convert.rate(response.set_uplink.rate))
        elif body == "heartbeat_reply":
            sent_s = self._beats.pop(response.heartbeat_reply.sequence, None)
            if sent_s is not None:
                self._listener.answered(time.monotonic() - sent_s)
        elif body == "draining":
            LOG.info("coordinator is about to stop reason=%r", response.draining.reason)
        else:
            # A newer minor version may say more than this agent knows.
            LOG.debug("message ignored body=%s", body)

    async def _write(self, call: Call) -> None:
        mailbox = self._mailbox
        while True:
            request = await mailbox.next()
            if request is None:
                await call.done_writing()
                # The coordinator ends the stream once it has read the last word. To cut it before may take that word back.
                await asyncio.sleep(LEAVE_DEADLINE_S)
                return
            if request.HasField("heartbeat"):
                while len(self._beats) >= BEATS_MAX:
                    del self._beats[next(iter(self._beats))]
                self._beats[request.heartbeat.sequence] = time.monotonic()
            await call.write(request)

    async def _beat(self, heartbeat_s: float) -> None:
        sequence = 0
        while True:
            sequence += 1
            self._news.clear()
            self._mailbox.put_heartbeat(await self._heartbeat(sequence))
            await happened(self._news, heartbeat_s)


class Mailbox:
    """What waits to be written to one stream, the urgent first. Bounded: outcomes by the results kept, logs by count, the rest by one."""

    def __init__(self) -> None:
        self._filled = asyncio.Event()
        # Set once nothing more will be written.
        self.written = asyncio.Event()
        self._urgent: deque[fleet_pb2.SessionRequest] = deque()
        self._heartbeat: fleet_pb2.Heartbeat | None = None
        self._progress: dict[str, fleet_pb2.TaskProgress] = {}
        self._logs: deque[fleet_pb2.TaskLog] = deque(maxlen=LOG_MESSAGES_MAX)
        self._last: fleet_pb2.SessionRequest | None = None
        self._closing = False

    def put(self, request: fleet_pb2.SessionRequest) -> None:
        self._urgent.append(request)
        self._filled.set()

    def put_heartbeat(self, heartbeat: fleet_pb2.Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._filled.set()

    def put_progress(self, progress: fleet_pb2.TaskProgress) -> None:
        self._progress[progress.task_id] = progress
        self._filled.set()

    def put_log(self, log: fleet_pb2.TaskLog) -> None:
        self._logs.append(log)
        self._filled.set()

    def close_with(self, request: fleet_pb2.SessionRequest) -> None:
        """The last message; `written` is set once it is."""
        self._last = request
        self._closing = True
        self._filled.set()

    def abandon(self) -> None:
        """Nothing more will be written."""
        self.written.set()

    async def next(self) -> fleet_pb2.SessionRequest | None:
        """The next message to write; None after the last one."""
        while True:
            if self._urgent:
                return self._urgent.popleft()
            if self._heartbeat is not None:
                heartbeat, self._heartbeat = self._heartbeat, None
                return fleet_pb2.SessionRequest(heartbeat=heartbeat)
            if self._last is not None:
                last, self._last = self._last, None
                return last
            if self._closing:
                return None
            if self._progress:
                return fleet_pb2.SessionRequest(progress=self._progress.pop(next(iter(self._progress))))
            if self._logs:
                return fleet_pb2.SessionRequest(log=self._logs.popleft())
            self._filled.clear()
            await self._filled.wait()


class _Refused(Exception):
    def __init__(self, refusal: fleet_pb2.Refusal) -> None:
        super().__init__(refusal.message or fleet_pb2.RefusalKind.Name(refusal.kind))
        self.kind = refusal.kind
        self.retry_after_s = max(0.0, refusal.retry_after_s)  # NaN becomes 0, too


class _Pulse:
    """Ends when nothing was heard for a lease: the other half of the connection is gone, whatever TCP believes."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._heard = asyncio.Event()

    def beat(self) -> None:
        self._heard.set()

    async def lost(self) -> None:
        while await happened(self._heard, self._lease_s):
            self._heard.clear()
        raise _Lost(f"nothing heard for {self._lease_s:g} s")


Call = grpc.aio.StreamStreamCall[fleet_pb2.SessionRequest, fleet_pb2.SessionResponse]


def _remedy(kind: int) -> str:
    if kind == fleet_pb2.REFUSAL_KIND_PROTOCOL:
        return "Install the same version of Fleetune on both machines."
    if kind == fleet_pb2.REFUSAL_KIND_NAME_TAKEN:
        return "Give this agent another name with --name or in its configuration."
    if kind == fleet_pb2.REFUSAL_KIND_DUPLICATE_ID:
        return "If the state folder was copied from another device, remove the id file here and start again."
    return ""
