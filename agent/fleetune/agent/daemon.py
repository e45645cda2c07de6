"""The agent daemon: the one place where its parts are wired together, started in order and ended in order."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sqlite3
import time
import uuid
from collections.abc import Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio

from fleetune.agent import convert, limits, work
from fleetune.agent.cache import Cache, hub_cache
from fleetune.agent.config import AgentConfig
from fleetune.agent.credentials import Credentials
from fleetune.agent.domain import FailureKind, Receipt, ReceiptStatus, Result, Task, Update, Welcome
from fleetune.agent.downlink import Downlink
from fleetune.agent.execution import Execution, Throttle
from fleetune.agent.links import Links
from fleetune.agent.measuring import Measures
from fleetune.agent.methods import table
from fleetune.agent.outbox import Outbox, Recovery
from fleetune.agent.probe import compute, figures, linkfigures
from fleetune.agent.probe.linkfigures import LinkFigures
from fleetune.agent.probe.memory import memory
from fleetune.agent.probe.owner import OwnerProbe
from fleetune.agent.probe.profile import profile
from fleetune.agent.probe.telemetry import Telemetry
from fleetune.agent.renewal import Renewer
from fleetune.agent.session import Session
from fleetune.agent.trainer.process import Trainer
from fleetune.agent.uplink import Uplink
from fleetune.child import threads as child_threads
from fleetune.errors import WireError
from fleetune.supervisor import Supervisor
from fleetune.v1 import fleet_pb2, messages_pb2
from fleetune.wire import channel
from fleetune.workers import Workers

LOG = logging.getLogger(__name__)

T = TypeVar("T")

UPLOADS_TOLD_MAX = 16
"""Uploads whose progress is told at a time; they go one after the other."""

PROBE_TRIES = 8
PROBE_AGAIN_S = (1.0, 6.0)
"""Between two tries to measure the link, drawn at random: many devices may have come at once."""

REST_S = 0.5
"""Without work after a task, until the child begins to cool down."""


class Daemon:
    """One agent. Only its `_dispatch` changes the work state, always on the event loop."""

    def __init__(
        self, config: AgentConfig, credentials: Credentials, device_id: str, version: str, connect_timeout_s: float | None = None
    ) -> None:
        self._config = config
        self._credentials = credentials
        self._device_id = device_id
        self._version = version
        self._connect_timeout_s = connect_timeout_s
        # Made at every start: tells a reconnect from a second agent with a copied id file.
        self._instance_id = uuid.uuid4().hex
        self._state = work.State(methods=frozenset(table.METHODS))
        self._owner = OwnerProbe(config.limits, channel.split_address(credentials.address)[0], declared_metered=config.link.metered)
        declared = linkfigures.Configured(config.link.up_mbps * 1e6, config.link.down_mbps * 1e6)
        self._link = LinkFigures(config.state_dir / figures.FOLDER, credentials.address, declared)
        self._link_told: messages_pb2.Link | None = None
        self._telemetry = Telemetry(config.state_dir)
        self._threads = compute.threads(config.training.cores)
        # SQLite and the deletion of files, in order and off the event loop.
        self._storage = Workers("outbox")
        self._deliveries: asyncio.Queue[work.Deliver | work.Forget] = asyncio.Queue()
        self._running: asyncio.Task[Result] | None = None
        # Small tasks: what follows a training, the link's probe. Ended with the daemon.
        self._resting: set[asyncio.Task[None]] = set()
        # Runs from the end of a task until the child begins to cool down, or the next task.
        self._rest_timer: asyncio.TimerHandle | None = None
        self._bug: asyncio.Future[None] | None = None
        self._received_s: dict[str, float] = {}
        self._closing = False
        self._probing = False
        # The session is about to end for a new certificate's sake, and to begin again with that.
        self._changing_over = False

    async def run(self, stop: asyncio.Event, supervisor: Supervisor | None = None) -> None:
        """Work until `stop` is set. RefusedError, UnreachableError and ConfigError end it early."""
        supervisor = supervisor or Supervisor()
        self._bug = asyncio.get_running_loop().create_future()
        self._outbox = await self._stored(lambda: Outbox(self._config.state_dir / "outbox"))
        recovery = await self._stored(self._outbox.recover)
        credentials = self._credentials
        links = Links(lambda: channel.open_channel(credentials.address, credentials.identity))
        await self._stored(self._link.recall)
        downlink = Downlink(links.bulk, on_sample=self._link.fetched)
        self._downlink = downlink
        self._uplink = Uplink(
            links.bulk, self._device_id, self._receipt_of_upload, self._undeliverable, self._upload_progress(), self._link.sent
        )
        self._trainer = Trainer(child_threads.environment(self._threads))
        cache = Cache(
            self._config.state_dir / "cache",
            self._config.cache_max_bytes,
            downlink,
            self._config.models,
            hub_cache(os.environ, Path.home()),
        )
        measures = Measures(self._config, self._threads)
        self._execution = Execution(self._config, self._threads, cache, self._trainer, measures, self._outbox.path_for)
        self._session = Session(links, credentials, self, self._hello, self._heartbeat, connect_timeout_s=self._connect_timeout_s)

        def renewed() -> None:
            self._changing_over = self._session.connected
            links.replace()
            self._session.redial()

        self._renewer = Renewer(credentials, links.control, lambda: self._session.connected, renewed)
        self._recover(recovery)
        parts: set[asyncio.Future[None]] = {
            self._bug,
            asyncio.create_task(self._session.run(), name="session"),
            asyncio.create_task(self._deliver(), name="deliveries"),
            asyncio.create_task(self._renewer.run(), name="renewals"),
            asyncio.create_task(_wait_for(stop), name="stop signal"),
            asyncio.create_task(supervisor.watch(self._words), name="supervisor"),
        }
        # A coordinator that cannot be reached is nothing that a restart here would mend.
        supervisor.ready(self._words())
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            LOG.info("stopping")
            supervisor.stopping("ends what is under way")
            self._closing = True
            self._stay_up()
            await self._session.leave("the agent is being stopped")
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
            ending = [task for task in (self._running, *self._resting) if task is not None]
            for task in ending:
                task.cancel()
            if ending:
                await asyncio.wait(ending)
            await self._trainer.stop()
            await self._uplink.close()
            downlink.close()
            # What was finished but not yet recorded is recorded now.
            while not self._deliveries.empty():
                await self._store(self._deliveries.get_nowait())
            await self._stored(self._outbox.close)
            self._storage.close()
            await links.close()
            LOG.info("stopped")

    def _words(self) -> str:
        """What this agent does now, for `systemctl status`."""
        link = "connected to" if self._session.connected else "not connected to"
        running = self._state.running
        does = f"{running.task.kind.value} {running.task.task_id}" if running is not None else "idle" if self._state.accepts else "resting"
        kept = f", {len(self._state.kept)} results kept" if self._state.kept else ""
        why = f" ({self._state.reason})" if not self._state.accepts and self._state.reason else ""
        return f"{link} {self._credentials.address}, {does}{why}{kept}"

    # --- what the session hears (Listener)

    def connected(self, welcome: Welcome) -> None:
        self._changing_over = False
        LOG.info(
            "connected coordinator=%s version=%s name=%s epoch=%d heartbeat_s=%g",
            self._credentials.address,
            welcome.coordinator_version,
            self._config.name,
            welcome.epoch,
            welcome.heartbeat_s,
        )
        self._uplink.chunk_bytes = welcome.chunk_bytes
        self._uplink.hears_turns = welcome.tells_turns
        self._uplink.wake()
        self._downlink.wake()
        self._dispatch(work.Connected())
        if self._link.wants_probe() and not self._probing:
            self._probing = True
            self._beside(self._probe_link(), "link probe")

    def disconnected(self) -> None:
        if self._changing_over:
            LOG.info("reconnecting coordinator=%s reason='the certificate is a new one'", self._credentials.address)
        elif not self._closing:
            LOG.warning("disconnected coordinator=%s kept_results=%d", self._credentials.address, len(self._state.kept))

    def task(self, task: Task) -> None:
        if self._closing:
            return
        LOG.info(
            "task received task=%s lease=%d job=%s round=%d kind=%s method=%s",
            task.task_id,
            task.lease,
            task.job_id,
            task.round,
            task.kind.value,
            task.method,
        )
        self._received_s.setdefault(task.task_id, time.monotonic())
        if len(self._received_s) > work.RECENT_MAX:  # a task that was withdrawn gets no receipt
            del self._received_s[next(iter(self._received_s))]
        if task.uplink_bits_per_s > 0:
            self._uplink.set_rate(task.task_id, task.uplink_bits_per_s)
        self._dispatch(work.Received(task))

    def set_uplink(self, task_id: str, bits_per_s: float) -> None:
        if any(task_id == known for known in work.known_ids(self._state)):
            LOG.debug("uplink rate task=%s bits_per_s=%.0f", task_id, bits_per_s)
            self._uplink.set_rate(task_id, bits_per_s)

    def answered(self, seconds: float) -> None:
        self._link.answered(seconds)

    def unusable_task(self, task_id: str, lease: int, error: WireError) -> None:
        LOG.error("task cannot be used task=%s cause=%r", task_id, str(error))
        self._dispatch(work.Unusable(task_id, lease, str(error)))

    def cancel(self, task_id: str, reason: str) -> None:
        LOG.info("task cancelled task=%s reason=%r", task_id, reason)
        self._dispatch(work.CancelAsked(task_id))

    def receipt(self, receipt: Receipt) -> None:
        if receipt.status is ReceiptStatus.REFUSED:
            LOG.error("result refused task=%s lease=%d reason=%r", receipt.task_id, receipt.lease, receipt.reason)
        else:
            took_s = time.monotonic() - self._received_s.get(receipt.task_id, time.monotonic())
            LOG.info("receipt task=%s lease=%d status=%s seconds=%.3f", receipt.task_id, receipt.lease, receipt.status.value, took_s)
        self._received_s.pop(receipt.task_id, None)
        self._dispatch(work.Receipted(receipt))

    def renew(self) -> None:
        LOG.info("the coordinator asks for a new certificate")
        self._renewer.ask()

    # --- what the machine says

    async def _hello(self) -> fleet_pb2.Hello:
        training = self._config.training
        measured = await asyncio.to_thread(profile, self._config.state_dir, training.cores, training.accelerator)
        if self._trainer.accelerator and training.accelerator == "auto":
            measured.accelerator = self._trainer.accelerator
        await self._look_at_limits()
        self._link.metered = await asyncio.to_thread(self._owner.metered)
        self._link_told = self._link.message()
        state = self._state
        held = [
            fleet_pb2.HeldTask(task_id=task.task_id, lease=task.lease, stage=fleet_pb2.HELD_STAGE_RUNNING, epoch=task.epoch)
            for task in state.unfinished()
        ]
        held += [
            fleet_pb2.HeldTask(
                task_id=kept.result.task_id, lease=kept.result.lease, stage=fleet_pb2.HELD_STAGE_FINISHED, epoch=kept.result.epoch
            )
            for kept in state.kept
        ]
        return fleet_pb2.Hello(
            protocol_major=channel.PROTOCOL_MAJOR,
            protocol_minor=channel.PROTOCOL_MINOR,
            agent_version=self._version,
            device_id=self._device_id,
            device_name=self._config.name,
            instance_id=self._instance_id,
            tags=self._config.tags,
            profile=measured,
            data_names=sorted(self._config.data),
            train_data_names=sorted(name for name, place in self._config.data.items() if place.train is not None),
            validation_data_names=sorted(name for name, place in self._config.data.items() if place.validation is not None),
            methods=sorted(table.METHODS),
            availability=fleet_pb2.Availability(accepts_tasks=state.accepts, reason=state.reason),
            held=held,
            link=self._link_told,
        )

    async def _heartbeat(self, sequence: int) -> fleet_pb2.Heartbeat:
        running = self._state.running
        task_id = running.task.task_id if running is not None else ""
        heartbeat = await asyncio.to_thread(self._telemetry.heartbeat, sequence, self._trainer.pid, task_id)
        if self._keep_warm_s(heartbeat.memory_total_bytes, heartbeat.memory_available_bytes, 1.0) == 0.0:
            self._trainer.relieve()
        await self._look_at_limits()
        link = self._link.message()
        if linkfigures.differs(self._link_told, link):
            self._link_told = link
            heartbeat.link.CopyFrom(link)
        document = self._link.due()
        if document is not None:
            try:
                await asyncio.to_thread(self._link.write, document)
            except OSError as error:
                LOG.warning("link figures cannot be written cause=%r", str(error))
        return heartbeat

    async def _probe_link(self) -> None:
        """Measures the way up once, since a plan needs it before the first upload. A coordinator that is asked by many says when not."""
        try:
            for _ in range(PROBE_TRIES):
                try:
                    self._link.sent(*await self._uplink.probe())
                    LOG.info("link measured up_mbps=%.1f", self._link.message().up_bits_per_s / 1e6)
                    self._session.beat_now()
                    return
                except grpc.aio.AioRpcError as error:
                    LOG.debug("link not measured cause='%s: %s'", error.code().name, error.details())
                    if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
                        return
                await asyncio.sleep(random.uniform(*PROBE_AGAIN_S))
                if not self._link.wants_probe():  # an upload has told
                    return
        finally:
            self._probing = False

    async def _look_at_limits(self) -> None:
        facts = await asyncio.to_thread(self._owner.facts, time.monotonic())
        accepts, reason = limits.availability(self._config.limits, facts, datetime.now())
        if (accepts, reason) == (self._state.accepts, self._state.reason):
            return
        LOG.info("availability accepts_tasks=%s reason=%r", accepts, reason)
        self._dispatch(work.AvailabilityChanged(accepts, reason))
        self._session.send_availability(fleet_pb2.Availability(accepts_tasks=accepts, reason=reason))

    def _keep_warm_s(self, total_bytes: int, available_bytes: int, task_s: float) -> float:
        return limits.keep_warm_s(self._config.training.keep_warm_s, task_s, total_bytes, available_bytes)

    # --- events in, commands out

    def _dispatch(self, event: work.Event) -> None:
        self._state, commands = work.step(self._state, event)
        for command in commands:
            if isinstance(command, work.Start):
                if not self._closing:
                    self._start(command.task)
            elif isinstance(command, work.Stop):
                if self._running is not None:
                    self._running.cancel()
            else:
                self._deliveries.put_nowait(command)

    def _start(self, task: Task) -> None:
        self._stay_up()
        run = self._execution.run(task, self._progress_of(task), self._lines_of(task))
        self._running = asyncio.create_task(run, name=f"task {task.task_id}")
        # Not the end of a coroutine of ours: one that is cancelled before its first step never runs a line.
        self._running.add_done_callback(lambda ended: self._ended(task, ended))

    def _ended(self, task: Task, ended: asyncio.Task[Result]) -> None:
        self._running = None
        result: Result | None = None
        if not ended.cancelled():
            error = ended.exception()
            if error is not None:
                self._fail(error)
                return
            result = ended.result()
        self._dispatch(work.Ended(task.task_id, result))
        if not self._closing and not self._state.unfinished():
            self._stay_up()
            self._rest_timer = asyncio.get_running_loop().call_later(REST_S, lambda: self._beside(self._rest(task), "rest"))

    def _stay_up(self) -> None:
        """The child does not cool down yet."""
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _beside(self, work: Coroutine[None, None, None], name: str) -> None:
        """A small task beside the others."""
        beside = asyncio.create_task(work, name=name)
        self._resting.add(beside)
        beside.add_done_callback(self._rested)

    async def _rest(self, task: Task) -> None:
        """Let the child cool down. Not before REST_S without a task: reading the memory opens a few files."""
        found = await asyncio.to_thread(memory)
        if self._running is None:
            self._trainer.rest(self._keep_warm_s(found.total_bytes, found.available_bytes, task.keep_warm_s))

    def _rested(self, resting: asyncio.Task[None]) -> None:
        self._resting.discard(resting)
        if not resting.cancelled() and (error := resting.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A bug: the daemon ends with it rather than going on in a state nobody planned."""
        if self._bug is not None and not self._bug.done():
            self._bug.set_exception(error)

    async def _deliver(self) -> None:
        """Carries out Deliver and Forget in their order."""
        while True:
            command = await self._deliveries.get()
            await self._store(command)
            if not isinstance(command, work.Deliver):
                continue
            result = command.result
            if isinstance(result, Update):
                self._uplink.send(result, self._outbox.path_of(result), fresh=command.fresh)
            else:
                self._session.send_outcome(convert.outcome(result))

    async def _store(self, command: work.Deliver | work.Forget) -> None:
        result = command.result
        try:
            if isinstance(command, work.Forget):
                self._uplink.withdraw(result.task_id)
                await self._stored(lambda: self._outbox.delete(result))
            elif command.fresh:
                await self._stored(lambda: self._outbox.put(result))
        except (sqlite3.Error, OSError) as error:
            # A full disk must not keep a finished result from being sent; it only would not survive a restart now.
            LOG.error("outbox cannot be written task=%s cause=%r", result.task_id, str(error))

    async def _stored(self, call: Callable[[], T]) -> T:
        return await self._storage.run(call)

    def _recover(self, recovery: Recovery) -> None:
        if recovery.results or recovery.damaged:
            LOG.info("outbox recovered results=%d damaged=%d", len(recovery.results), len(recovery.damaged))
        self._dispatch(work.Recovered((*recovery.results, *recovery.damaged)))
        for update in recovery.damaged:
            LOG.error("update file is damaged, dropped task=%s path=%s", update.task_id, self._outbox.path_of(update))
            message = "The finished update was damaged on the device's disk (a power cut?) and was dropped."
            self._dispatch(work.Undeliverable(update.task_id, update.lease, FailureKind.TRANSFER, message))

    # --- what uploads and children say

    def _receipt_of_upload(self, receipt: Receipt) -> None:
        self.receipt(receipt)

    def _undeliverable(self, update: Update, kind: FailureKind, message: str) -> None:
        self._dispatch(work.Undeliverable(update.task_id, update.lease, kind, message))

    def _upload_progress(self) -> Callable[[Update, int, int], None]:
        throttles: dict[str, Throttle] = {}

        def hear(update: Update, sent: int, total: int) -> None:
            throttle = throttles.get(update.task_id)
            if sent >= total:
                if throttle is not None:
                    throttles.pop(update.task_id).close()
                return
            if throttle is None:

                def send(stage: str, done: int, total: int, loss: float | None) -> None:
                    self._send_progress(update.task_id, update.lease, stage, done, total, loss)

                throttle = throttles[update.task_id] = Throttle(send)
                if len(throttles) > UPLOADS_TOLD_MAX:  # one that was withdrawn half-way says no more
                    throttles.pop(next(iter(throttles))).close()
            throttle("uploading", sent, total)

        return hear

    def _progress_of(self, task: Task) -> Callable[[str, int, int, float | None], None]:
        def send(stage: str, done: int, total: int, loss: float | None) -> None:
            running = self._state.running
            lease = running.task.lease if running is not None else task.lease
            self._send_progress(task.task_id, lease, stage, done, total, loss)

        return send

    def _send_progress(self, task_id: str, lease: int, stage: str, done: int, total: int, loss: float | None) -> None:
        message = convert.progress(task_id, lease, stage, done, total, loss)
        if message is not None:
            self._session.send_progress(message)

    def _lines_of(self, task: Task) -> Callable[[list[str]], None]:
        return lambda lines: self._session.send_log(fleet_pb2.TaskLog(task_id=task.task_id, lines=lines))


async def _wait_for(stop: asyncio.Event) -> None:
    await stop.wait()
