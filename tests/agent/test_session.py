"""The control stream against a real gRPC server: greeting, hearing, losing it and coming back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from fleetune.agent import session as sessions
from fleetune.agent.credentials import Credentials
from fleetune.agent.domain import Receipt, Task, Welcome
from fleetune.agent.links import Links
from fleetune.agent.session import Mailbox, RefusedError, Session
from fleetune.errors import UnreachableError, WireError
from fleetune.v1 import fleet_pb2, messages_pb2
from fleetune.wire import channel
from support.fake_coordinator import FakeCoordinator, echo_task

WAIT_S = 60.0


@dataclass
class Ear:
    """Keeps what a session heard; `changed` wakes whoever waits for more."""

    events: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[float] = field(default_factory=list[float])

    def connected(self, welcome: Welcome) -> None:
        self._note("connected", welcome)

    def disconnected(self) -> None:
        self._note("disconnected")

    def task(self, task: Task) -> None:
        self._note("task", task)

    def unusable_task(self, task_id: str, lease: int, error: WireError) -> None:
        self._note("unusable", task_id, lease, str(error))

    def cancel(self, task_id: str, reason: str) -> None:
        self._note("cancel", task_id, reason)

    def receipt(self, receipt: Receipt) -> None:
        self._note("receipt", receipt)

    def renew(self) -> None:
        self._note("renew")

    def set_uplink(self, task_id: str, bits_per_s: float) -> None:
        self._note("set_uplink", task_id, bits_per_s)

    def answered(self, seconds: float) -> None:
        self.answers.append(seconds)
        self.changed.set()

    async def until(self, *names: str) -> tuple[object, ...]:
        """The last of these events, once the first ones heard are so named; more may have followed."""
        while tuple(event[0] for event in self.events[: len(names)]) != names:
            await self._more()
        return self.events[len(names) - 1]

    async def an_answer(self) -> None:
        while not self.answers:
            await self._more()

    async def _more(self) -> None:
        self.changed.clear()
        await asyncio.wait_for(self.changed.wait(), WAIT_S)

    def _note(self, *event: object) -> None:
        self.events.append(event)
        self.changed.set()


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator(heartbeat_s=0.05)
    await fake.start()
    yield fake
    await fake.stop()


@contextlib.asynccontextmanager
async def opened(
    address: str,
    ear: Ear,
    connect_timeout_s: float | None = None,
    *,
    hello: Callable[[], Awaitable[fleet_pb2.Hello]] | None = None,
    links: Links | None = None,
) -> AsyncGenerator[tuple[Session, asyncio.Task[None]], None]:
    """A session that runs; ended with its channel."""

    async def plain_hello() -> fleet_pb2.Hello:
        return fleet_pb2.Hello(device_id="d1", device_name="one", protocol_major=1)

    async def heartbeat(sequence: int) -> fleet_pb2.Heartbeat:
        return fleet_pb2.Heartbeat(sequence=sequence)

    links = links or Links(lambda: channel.open_channel(address))
    credentials = Credentials(Path("nowhere"), None, address)
    session = Session(links, credentials, ear, hello or plain_hello, heartbeat, connect_timeout_s=connect_timeout_s)
    running = asyncio.create_task(session.run())
    try:
        yield session, running
    finally:
        running.cancel()
        await asyncio.wait([running])
        await links.close()


async def test_hello_is_answered_and_heartbeats_are_numbered_upwards(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        await coordinator.until(lambda: len(coordinator.heartbeats) >= 3)
    assert coordinator.hellos[0].device_name == "one"
    # One that waits to be written is replaced by the next.
    numbers = [beat.sequence for beat in coordinator.heartbeats]
    assert numbers[0] >= 1
    assert numbers == sorted(set(numbers))


async def test_rates_of_uploads_and_the_time_to_an_answer_are_heard(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear) as (session, _):
        await ear.until("connected")
        coordinator.send(set_uplink=fleet_pb2.SetUplink(task_id="t1", rate=messages_pb2.UplinkRate(bits_per_s=5e6)))
        coordinator.send(set_uplink=fleet_pb2.SetUplink(task_id="t1"))
        await ear.until("connected", "set_uplink", "set_uplink")
        session.beat_now()
        await ear.an_answer()
    assert ear.events[1:3] == [("set_uplink", "t1", 5e6), ("set_uplink", "t1", 0.0)]
    assert min(ear.answers) >= 0


async def test_tasks_cancels_and_receipts_are_heard_in_order(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        coordinator.send(task=echo_task("t1", messages_pb2.BlobRef(digest="0" * 64, size_bytes=8), lease=7))
        coordinator.send(cancel=fleet_pb2.CancelTask(task_id="t1", reason="enough"))
        coordinator.send(receipt=messages_pb2.Receipt(task_id="t1", lease=7, status=messages_pb2.RECEIPT_STATUS_LATE))
        await ear.until("connected", "task", "cancel", "receipt")
    task = ear.events[1][1]
    assert isinstance(task, Task)
    assert (task.task_id, task.lease, task.epoch, task.method) == ("t1", 7, 1, "echo")
    assert ear.events[2] == ("cancel", "t1", "enough")


async def test_a_task_that_breaks_the_protocol_is_told_and_the_session_stays(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        coordinator.send(task=echo_task("t1", messages_pb2.BlobRef(digest="../../etc/passwd", size_bytes=8)))
        name, task_id, _, message = await ear.until("connected", "unusable")
        await coordinator.until(lambda: len(coordinator.heartbeats) >= 2)
    assert (name, task_id) == ("unusable", "t1")
    assert "is not a digest" in str(message)


async def test_a_base_with_a_path_for_a_name_is_unusable(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    task = echo_task("t1", messages_pb2.BlobRef(digest="0" * 64, size_bytes=8))
    task.base.digest = "1" * 64
    task.base.files.add(name="../config.json", blob=messages_pb2.BlobRef(digest="0" * 64, size_bytes=8))
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        coordinator.send(task=task)
        event = await ear.until("connected", "unusable")
    assert "../config.json" in str(event[3])


async def test_a_stream_that_is_cut_while_hello_is_put_together_is_opened_again(coordinator: FakeCoordinator) -> None:
    ear, dialled, told = Ear(), list[grpc.aio.Channel](), list[int]()

    def dial() -> grpc.aio.Channel:
        dialled.append(channel.open_channel(coordinator.address))
        return dialled[-1]

    async def hello() -> fleet_pb2.Hello:
        told.append(len(told))
        if len(told) == 1:
            # A stream that has not arrived when its server goes away is no cut one: gRPC takes it over to the next connection by itself.
            await coordinator.until(lambda: coordinator.streams == 1)
            await coordinator.stop()
            await dialled[0].wait_for_state_change(grpc.ChannelConnectivity.READY)
            await coordinator.start()
        return fleet_pb2.Hello(device_id="d1", device_name="one", protocol_major=1)

    async with opened(coordinator.address, ear, hello=hello, links=Links(dial)):
        await ear.until("connected")
    assert len(told) >= 2


async def test_a_session_that_is_cut_is_opened_again(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        coordinator.hang_up()
        await ear.until("connected", "disconnected", "connected")
    assert len(coordinator.hellos) == 2


async def test_a_coordinator_that_comes_back_is_found(coordinator: FakeCoordinator) -> None:
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
        await coordinator.stop()
        await ear.until("connected", "disconnected")
        await coordinator.start()
        await ear.until("connected", "disconnected", "connected")


async def test_silence_for_a_lease_ends_a_session_whose_connection_still_stands(coordinator: FakeCoordinator) -> None:
    coordinator.welcome.lease_s = 0.3
    coordinator.answers_heartbeats = False
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected", "disconnected", "connected")


async def test_a_final_refusal_ends_the_session_with_the_coordinator_s_words(coordinator: FakeCoordinator) -> None:
    coordinator.refusals = [fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_NAME_TAKEN, message="another device is called 'one'")]
    async with opened(coordinator.address, Ear()) as (_, running):
        with pytest.raises(RefusedError, match=r"another device is called 'one'.*--name"):
            await asyncio.wait_for(running, WAIT_S)


async def test_a_refusal_for_now_is_tried_again(coordinator: FakeCoordinator) -> None:
    refusal = fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_DUPLICATE_ID, message="an older session lives", retry_after_s=0.05)
    coordinator.refusals = [refusal]
    ear = Ear()
    async with opened(coordinator.address, ear):
        await ear.until("connected")
    assert len(coordinator.hellos) == 2


async def test_a_duplicate_id_is_given_up_when_it_is_still_in_use_after_the_time_given(coordinator: FakeCoordinator) -> None:
    refusal = fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_DUPLICATE_ID, message="two devices, one id", retry_after_s=0.01)
    coordinator.refusals = [refusal] * 50
    async with opened(coordinator.address, Ear()) as (_, running):
        with pytest.raises(RefusedError, match=r"two devices, one id.*id file"):
            await asyncio.wait_for(running, WAIT_S)


async def test_a_coordinator_that_was_never_reached_ends_the_session_after_the_timeout(coordinator: FakeCoordinator) -> None:
    await coordinator.stop()
    async with opened(coordinator.address, Ear(), connect_timeout_s=0.5) as (_, running):
        with pytest.raises(UnreachableError, match=r"within 0.5 s.*fleetune serve"):
            await asyncio.wait_for(running, WAIT_S)


async def test_leaving_is_told_and_ends_the_session(coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is the coordinator that ends the stream, once it has heard: however long that takes here.
    monkeypatch.setattr(sessions, "LEAVE_DEADLINE_S", WAIT_S)
    ear = Ear()
    async with opened(coordinator.address, ear) as (session, running):
        await ear.until("connected")
        await session.leave("lunch")
        await asyncio.wait_for(running, WAIT_S)
    assert coordinator.leaving == ["lunch"]


async def test_leaving_cuts_the_wait_for_another_try(coordinator: FakeCoordinator) -> None:
    await coordinator.stop()
    async with opened(coordinator.address, Ear()) as (session, running):
        await asyncio.sleep(0)
        await session.leave("lunch")
        running.cancel()
        await asyncio.wait([running])
    assert coordinator.leaving == []


async def test_the_mailbox_gives_the_urgent_first_and_keeps_only_the_latest_progress() -> None:
    mailbox = Mailbox()
    mailbox.put_log(fleet_pb2.TaskLog(task_id="t1"))
    for done in range(5):
        mailbox.put_progress(fleet_pb2.TaskProgress(task_id="t1", done=done))
    mailbox.put_heartbeat(fleet_pb2.Heartbeat(sequence=1))
    mailbox.put(fleet_pb2.SessionRequest(outcome=fleet_pb2.TaskOutcome(task_id="t0")))
    taken = [await mailbox.next() for _ in range(4)]
    assert [request.WhichOneof("body") for request in taken if request is not None] == ["outcome", "heartbeat", "progress", "log"]
    assert taken[2] is not None
    assert taken[2].progress.done == 4


async def test_the_mailbox_drops_the_oldest_logs() -> None:
    mailbox = Mailbox()
    for number in range(sessions.LOG_MESSAGES_MAX + 1):
        mailbox.put_log(fleet_pb2.TaskLog(task_id=str(number)))
    first = await mailbox.next()
    assert first is not None
    assert first.log.task_id == "1"
