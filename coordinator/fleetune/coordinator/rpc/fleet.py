"""FleetService: the control streams. Knows sessions and messages; decides nothing about jobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from fleetune.coordinator.domain import Failure
from fleetune.coordinator.registry import Greeting, Refused, Registry, Session
from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.orders import Order, Receipt
from fleetune.coordinator.rpc import convert, gate, ownership
from fleetune.coordinator.rpc.limits import Bucket
from fleetune.coordinator.rpc.streams import Patience, Readable, hang_up, next_message
from fleetune.coordinator.store import records
from fleetune.coordinator.store.db import Database
from fleetune.v1 import fleet_pb2, fleet_pb2_grpc, messages_pb2
from fleetune.wire import channel
from fleetune.wire.chunks import CHUNK_BYTES

log = logging.getLogger("fleetune.fleet")

HELLO_S = 10.0
"""How long a new stream may stay silent."""

OUTBOUND_MAX = 1000
"""Messages waiting for one agent; an agent that reads none of so many is cut and may come back."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{7,63}", re.ASCII)
WORD_CHARACTERS_MAX = 200
WORDS_CHARACTERS_MAX = 32_768
LOG_LINES_MAX = 2000
"""Of one task."""

LOG_ROUNDS_BACK = 20
"""Lines of older rounds are dropped: a device must not fill the disk by way of all the tasks that it has ever had."""

LOGGED_TASKS_MAX = 100
"""Tasks of one device whose lines are counted."""

Context = grpc.aio.ServicerContext[fleet_pb2.SessionRequest, fleet_pb2.SessionResponse]

_REFUSALS = {
    "duplicate_id": fleet_pb2.REFUSAL_KIND_DUPLICATE_ID,
    "name_taken": fleet_pb2.REFUSAL_KIND_NAME_TAKEN,
    "invalid": fleet_pb2.REFUSAL_KIND_INVALID,
}


@dataclass(slots=True)
class Line:
    """One live stream: what is to be sent on it, and what it last said. Written only by the fleet service.

    A fleet at rest has one of these for each device, hence neither a queue nor an event of asyncio, which take 3 KiB.
    """

    session: Session
    hello: fleet_pb2.Hello
    telemetry: fleet_pb2.Heartbeat | None = None
    outbound: list[fleet_pb2.SessionResponse] = field(default_factory=list[fleet_pb2.SessionResponse])
    """Waits to be sent, in this order."""
    cut: bool = False
    last_words: tuple[grpc.StatusCode, str] | None = None
    """What the agent is told where its own doing ends the stream."""
    _news: asyncio.Future[None] | None = None

    def send(self, message: fleet_pb2.SessionResponse) -> None:
        if len(self.outbound) < OUTBOUND_MAX:
            self.outbound.append(message)
            self.stir()
            return
        if not self.cut:
            log.warning("device=%s reads nothing, its stream is cut", self.session.greeting.name)
        self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{OUTBOUND_MAX} messages wait and none is read")

    def end(self, code: grpc.StatusCode, why: str) -> None:
        """Cut it for what the agent does."""
        self.last_words = (code, why)
        self.hang_up()

    def hang_up(self) -> None:
        """End the stream."""
        self.cut = True
        self.stir()

    def stir(self, _: object = None) -> None:
        """Wake who waits for `news`."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def news(self) -> None:
        """Wait until something is to be sent, the stream is to end, or a task of it has ended.

        For one waiter, who has just looked at all that: what came before is not told again.
        """
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Also the engine's dispatcher: tasks leave through the lines held here."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        database: Database,
        *,
        version: str,
        heartbeat_s: float,
        epoch: int,
        is_behind: Callable[[str], bool] = lambda _: False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_behind` is asked of each device that connects: whether its certificate should be renewed now."""
        self.lines: dict[str, Line] = {}
        self.draining = False
        self._logged: dict[str, dict[str, int]] = {}
        """Device id -> task id -> lines taken, also over reconnects."""
        self._engine = engine
        self._registry = registry
        self._database = database
        self._version = version
        self._heartbeat_s = heartbeat_s
        self._epoch = epoch
        self._is_behind = is_behind
        self._monotonic = monotonic

    # -- the engine's dispatcher

    def send_task(self, order: Order) -> None:
        line = self.lines.get(order.command.device_id)
        if line is not None:
            line.send(fleet_pb2.SessionResponse(task=convert.task(order, line.session.greeting.name)))

    def withdraw(self, device_id: str, task_id: str, reason: str) -> None:
        line = self.lines.get(device_id)
        if line is not None:
            line.send(fleet_pb2.SessionResponse(cancel=fleet_pb2.CancelTask(task_id=task_id, reason=reason)))

    def set_uplink(self, device_id: str, task_id: str, bits_per_s: float) -> None:
        line = self.lines.get(device_id)
        if line is not None:
            rate = messages_pb2.UplinkRate(bits_per_s=bits_per_s)
            line.send(fleet_pb2.SessionResponse(set_uplink=fleet_pb2.SetUplink(task_id=task_id, rate=rate)))

    # -- the service

    async def Session(  # type: ignore[override]  # the stub allows both gRPC flavours; this is the aio one
        self,
        request_iterator: AsyncIterator[fleet_pb2.SessionRequest],
        context: Context,
    ) -> None:
        hello = await self._hello(context)
        if hello is None:
            return
        line = await self._admit(hello, context)
        if line is None:
            return
        try:
            await self._converse(line, context)
        finally:
            await self._close(line, hello.device_id)
        if line.last_words is not None:
            await hang_up(context, *line.last_words)

    async def _converse(self, line: Line, context: Context) -> None:
        """Greet, then read and write until one side ends."""
        name = line.session.greeting.name
        log.info("device=%s online id=%s address=%s", name, line.session.greeting.device_id, line.session.greeting.address)
        ours = [task for task in line.hello.held if self._is_ours(task.epoch) and self._is_its_own(line, task.task_id)]
        held = frozenset(task.task_id for task in ours)
        running = frozenset(task.task_id for task in ours if task.stage == fleet_pb2.HELD_STAGE_RUNNING)
        self._drop_foreign(line)
        # Nothing may wait between the session's admission and this: a task that the engine gave it meanwhile would count as not held, and
        # be given once more.
        self._engine.device_online(line.session, held, running)
        await self._save(line.session.greeting, line.hello)
        reader = asyncio.create_task(self._read(line, context), name=f"from {name}")
        reader.add_done_callback(line.stir)
        writer: asyncio.Task[None] | None = None
        try:
            while not (line.cut or reader.done() or _failed(writer)):
                if writer is not None and writer.done():
                    writer = None
                if line.outbound and writer is None:
                    # Only while there is something to send: an idle stream has one task beside this one.
                    writer = asyncio.create_task(self._write(line, context), name=f"to {name}")
                    writer.add_done_callback(line.stir)
                await line.news()
        finally:
            tasks = [task for task in (writer, reader) if task is not None]
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, grpc.aio.BaseError | asyncio.TimeoutError):
                    log.error("device=%s session failed", name, exc_info=result)

    def _is_ours(self, epoch: int) -> bool:
        """Whether what a device has is of this coordinator's epoch; an agent from before the field does not say."""
        return epoch in (0, self._epoch)

    def _drop_foreign(self, line: Line) -> None:
        """Stop work that was begun before a restore: its ids may mean other work now. Before any new task is sent on this line."""
        foreign = [task for task in line.hello.held if not self._is_ours(task.epoch)]
        if foreign:
            log.warning(
                "device=%s has %d tasks of epoch %d, this is epoch %d: refused, an older state was restored",
                line.session.greeting.name,
                len(foreign),
                foreign[0].epoch,
                self._epoch,
            )
        for task in foreign:
            if task.stage == fleet_pb2.HELD_STAGE_RUNNING:
                self.withdraw(line.session.greeting.device_id, task.task_id, "an older state of the coordinator was restored")

    def drain(self, reason: str) -> None:
        """Tell everybody that the coordinator is about to stop."""
        self.draining = True
        for line in self.lines.values():
            line.send(fleet_pb2.SessionResponse(draining=fleet_pb2.Draining(reason=reason)))

    def ask_to_renew(self, device_id: str) -> None:
        """Tell a connected agent that its certificate should be renewed now."""
        line = self.lines.get(device_id)
        if line is not None:
            line.send(fleet_pb2.SessionResponse(renew=fleet_pb2.RenewCertificate()))

    def hang_up(self) -> None:
        """End all streams."""
        for line in self.lines.values():
            line.hang_up()

    async def _hello(self, context: Context) -> fleet_pb2.Hello | None:
        try:
            first = await next_message(context, HELLO_S, fleet_pb2.SessionRequest)
        except asyncio.TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {HELLO_S:g} s")
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session must be Hello")
        hello = first.hello
        convert.sober(hello)
        refusal = self._objection(hello)
        if refusal is not None:
            await context.write(fleet_pb2.SessionResponse(refusal=refusal))
            return None
        return hello

    def _objection(self, hello: fleet_pb2.Hello) -> fleet_pb2.Refusal | None:
        """What is wrong with a Hello before the registry is asked."""
        if hello.protocol_major != channel.PROTOCOL_MAJOR:
            return fleet_pb2.Refusal(
                kind=fleet_pb2.REFUSAL_KIND_PROTOCOL,
                message=f"the agent speaks protocol {hello.protocol_major}.{hello.protocol_minor}, this coordinator "
                f"{channel.PROTOCOL_MAJOR}.{channel.PROTOCOL_MINOR}; install matching versions (coordinator {self._version}, "
                f"agent {convert.line(hello.agent_version, 40)}).",
            )
        if self.draining:
            return fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_DRAINING, message="the coordinator is about to stop", retry_after_s=1.0)
        wrong = ""
        if not NAME.fullmatch(hello.device_name):
            wrong = f"the device name {convert.line(hello.device_name, 80)!r} is not 1 to 63 of A-Z a-z 0-9 . _ -"
        elif not DEVICE_ID.fullmatch(hello.device_id):
            wrong = f"the device id {convert.line(hello.device_id, 80)!r} is not 8 to 64 of A-Z a-z 0-9 -"
        elif not hello.instance_id or len(hello.instance_id) > 64:
            wrong = "the instance id is empty or longer than 64 characters"
        elif any(len(task.task_id) > convert.TASK_ID_CHARS_MAX for task in hello.held):
            wrong = f"the id of a held task is longer than {convert.TASK_ID_CHARS_MAX} characters"
        elif sum(len(word) for words in _words(hello) for word in words) > WORDS_CHARACTERS_MAX:
            wrong = f"tags, data names and methods have more than {WORDS_CHARACTERS_MAX} characters together"
        elif max(len(hello.held), *(len(words) for words in _words(hello))) > 1000:
            wrong = "more than 1000 tags, data names, methods or held tasks"
        elif any(len(word) > WORD_CHARACTERS_MAX or not word.isprintable() for words in _words(hello) for word in words):
            wrong = f"a tag, data name or method is longer than {WORD_CHARACTERS_MAX} characters or not printable"
        if wrong:
            return fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_INVALID, message=wrong)
        return None

    async def _admit(self, hello: fleet_pb2.Hello, context: Context) -> Line | None:
        greeting = convert.greeting(hello, context.peer())
        if why := ownership.greeting_objection(gate.caller(), greeting.name, greeting.device_id, self._registry.names):
            gate.refuse(why)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
        verdict = self._registry.admit(greeting, self._monotonic())
        if isinstance(verdict, Refused):
            log.warning("device=%s refused kind=%s message=%r", hello.device_name, verdict.kind, verdict.message)
            refusal = fleet_pb2.Refusal(kind=_REFUSALS[verdict.kind], message=verdict.message, retry_after_s=verdict.retry_after_s)
            await context.write(fleet_pb2.SessionResponse(refusal=refusal))
            return None
        old = self.lines.get(greeting.device_id)
        if old is not None:
            old.hang_up()
        line = Line(verdict, hello)
        self.lines[greeting.device_id] = line
        line.send(
            fleet_pb2.SessionResponse(
                welcome=fleet_pb2.Welcome(
                    protocol_minor=min(channel.PROTOCOL_MINOR, hello.protocol_minor),
                    coordinator_version=self._version,
                    heartbeat_s=self._heartbeat_s,
                    lease_s=self._registry.lease_s,
                    epoch=self._epoch,
                    chunk_bytes=CHUNK_BYTES,
                )
            )
        )
        if self._is_behind(greeting.device_id):
            self.ask_to_renew(greeting.device_id)
        return line

    async def _close(self, line: Line, device_id: str) -> None:
        if self.lines.get(device_id) is line:
            del self.lines[device_id]
        if self._registry.leave(line.session):
            log.info("device=%s offline", line.session.greeting.name)
            self._engine.device_offline(device_id)
            await self._save(line.session.greeting, line.hello)

    async def _save(self, greeting: Greeting, hello: fleet_pb2.Hello) -> None:
        now = time.time()
        row = records.DeviceRow(greeting.device_id, greeting.name, now, now, hello.SerializeToString())
        await self._database.write(lambda tx: records.save_device(tx, row))

    async def _write(self, line: Line, context: Context) -> None:
        """Send what waits."""
        while line.outbound:
            await context.write(line.outbound.pop(0))

    async def _read(self, line: Line, context: Readable) -> None:
        bucket = Bucket(self._monotonic())
        with Patience(self._registry.lease_s) as patience:
            while isinstance(message := await patience.on(context.read()), fleet_pb2.SessionRequest):
                now_s = line.session.last_heard_s = self._monotonic()
                if await self._handle(line, message):
                    return
                if pause_s := bucket.draw(now_s):
                    if bucket.floods(now_s):
                        gate.refuse("more messages than an agent has to send, for too long")
                        line.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many messages for too long")
                        return
                    await asyncio.sleep(pause_s)

    async def _handle(self, line: Line, message: fleet_pb2.SessionRequest) -> bool:
        """True where the agent says goodbye."""
        device_id = line.session.greeting.device_id
        match message.WhichOneof("body"):
            case "heartbeat":
                convert.sober_heartbeat(message.heartbeat, device_id)
                line.telemetry = message.heartbeat
                if message.heartbeat.HasField("link"):
                    line.session.link = convert.link(message.heartbeat.link)
                    # Kept with the rest of what it said of itself, for when it is gone.
                    line.hello.link.CopyFrom(convert.link_message(line.session.link))
                line.send(fleet_pb2.SessionResponse(heartbeat_reply=fleet_pb2.HeartbeatReply(sequence=message.heartbeat.sequence)))
            case "progress":
                p = message.progress
                if self._is_its_own(line, p.task_id):
                    loss = p.loss if p.HasField("loss") and math.isfinite(p.loss) else None
                    self._engine.note_progress(p.task_id, device_id, p.stage, p.done, p.total, loss)
            case "outcome":
                await self._outcome(line, message.outcome)
            case "log":
                if self._is_its_own(line, message.log.task_id):
                    await self._log(line, message.log)
            case "availability":
                said = message.availability
                self._registry.announce(line.session, said.accepts_tasks, convert.line(said.reason, 200))
                self._engine.availability_changed()
            case "leaving":
                log.info("device=%s leaves reason=%r", line.session.greeting.name, convert.line(message.leaving.reason, 200))
                return True
            case _:
                # A newer agent's message: its minor version may add kinds that this coordinator does not know.
                log.debug("device=%s sent an unknown message", line.session.greeting.name)
        return False

    def _is_its_own(self, line: Line, task_id: str) -> bool:
        """Whether a message is about a task of the device that sent it. What names no device at all is for the engine to judge."""
        if ownership.device_of(task_id) in ("", line.session.greeting.device_id):
            return True
        gate.refuse("a message about another device's task")
        return False

    async def _outcome(self, line: Line, outcome: fleet_pb2.TaskOutcome) -> None:
        device_id = line.session.greeting.device_id
        if not self._is_its_own(line, outcome.task_id):
            refused = Receipt("refused", "the task is another device's")
            task_id = convert.line(outcome.task_id, convert.TASK_ID_CHARS_MAX)
            line.send(fleet_pb2.SessionResponse(receipt=convert.receipt(task_id, outcome.lease, refused)))
            return
        if not self._is_ours(outcome.epoch):
            refused = convert.foreign_epoch(outcome.epoch, self._epoch)
            line.send(fleet_pb2.SessionResponse(receipt=convert.receipt(outcome.task_id, outcome.lease, refused)))
            return
        if why := ownership.lease_objection(self._engine.job_of_task(outcome.task_id), outcome.task_id, outcome.lease):
            gate.refuse("a lease that was never given out")
            line.send(fleet_pb2.SessionResponse(receipt=convert.receipt(outcome.task_id, outcome.lease, Receipt("refused", why))))
            return
        match outcome.WhichOneof("outcome"):
            case "failure":
                answer = await self._engine.admission.take_failure(outcome.task_id, device_id, convert.failure(outcome.failure))
            case "evaluation":
                answer = await self._engine.admission.take_evaluation(outcome.task_id, device_id, convert.evaluation(outcome.evaluation))
            case "figures":
                figures = convert.figures(outcome.figures)
                if figures is None:
                    failure = Failure("model", "measure", "the device's figures are no times and sizes of steps by depth.")
                    answer = await self._engine.admission.take_failure(outcome.task_id, device_id, failure)
                else:
                    answer = await self._engine.admission.take_figures(outcome.task_id, device_id, figures)
            case "refusal":
                reason = convert.line(outcome.refusal.reason, 200)
                # Nothing more for it for a while, or it would refuse in a loop.
                self._registry.refused(line.session, reason, self._monotonic())
                answer = await self._engine.admission.take_refusal(outcome.task_id, device_id, reason)
            case _:
                return
        message: messages_pb2.Receipt = convert.receipt(outcome.task_id, outcome.lease, answer)
        line.send(fleet_pb2.SessionResponse(receipt=message))

    async def _log(self, line: Line, message: fleet_pb2.TaskLog) -> None:
        """Bounded per task: a chatty child must not fill the coordinator's disk."""
        task_id = message.task_id[: convert.TASK_ID_CHARS_MAX]
        job = self._engine.job_of_task(task_id)
        if job is None or _round_of(task_id) < job.machine.committed - LOG_ROUNDS_BACK:
            return
        counts = self._logged.setdefault(line.session.greeting.device_id, {})
        room = LOG_LINES_MAX - counts.get(task_id, 0)
        lines = [convert.line(text, 1000) for text in message.lines[: max(0, room)]]
        if lines:
            counts[task_id] = counts.pop(task_id, 0) + len(lines)
            if len(counts) > LOGGED_TASKS_MAX:
                del counts[next(iter(counts))]  # the one that was silent for longest
            greeting = line.session.greeting
            with contextlib.suppress(asyncio.QueueFull):
                await self._engine.admission.add_log(task_id, greeting.device_id, greeting.name, lines)


def _failed(task: asyncio.Task[None] | None) -> bool:
    return task is not None and task.done() and (task.cancelled() or task.exception() is not None)


def _round_of(task_id: str) -> int:
    """Its round, -1 for what is no task's id."""
    number = task_id.split("/", 2)[1:2]
    return int(number[0]) if number and number[0].isascii() and number[0].isdigit() and len(number[0]) < 10 else -1


def _words(hello: fleet_pb2.Hello) -> tuple[Sequence[str], ...]:
    """What an agent calls things, as it came."""
    return hello.tags, hello.data_names, hello.train_data_names, hello.validation_data_names, hello.methods
