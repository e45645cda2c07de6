"""A whole coordinator inside the test's process: the daemon's own wiring on a free port, its engine running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio

from fleetune.coordinator import config, daemon
from fleetune.coordinator.config import CoordinatorConfig
from fleetune.coordinator.daemon import Running
from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc.blob import BlobService
from fleetune.coordinator.rpc.fleet import FleetService
from fleetune.v1 import control_pb2, control_pb2_grpc
from fleetune.wire import channel
from fleetune.wire.identity import Identity

WAIT_S = 60.0
"""Longest wait for anything a test expects; only a bug takes longer."""


@dataclass
class Coordinator:
    """The running parts, and a channel for an operator."""

    address: str
    state_dir: Path
    engine: Engine
    fleet: FleetService
    blob_service: BlobService
    control: control_pb2_grpc.ControlServiceAsyncStub
    writer: asyncio.Task[None]
    running: Running
    operator: grpc.aio.Channel

    def spooled(self) -> list[Path]:
        return list((self.state_dir / "spool").iterdir())

    def blobs(self) -> set[str]:
        return set(self.engine.blobs.digests())

    async def submit(self, toml: str, submit_id: str = "", *, evaluated: bool = False) -> LiveJob:
        """`evaluated`: let devices measure each round, which a job file of method echo does not offer."""
        job = await self.engine.submit(toml, submit_id or f"submit-{len(self.engine.jobs)}")
        if evaluated:  # before the engine's loop has had a turn
            job.machine.plan = replace(job.machine.plan, evaluation="devices", metric="loss")
        return job

    async def until(self, job: LiveJob, true: Callable[[LiveJob], bool]) -> None:
        """Wait until `true(job)`. Every change of the job is looked at, and none of them may keep a test waiting for long."""
        while not true(job):
            try:
                await asyncio.wait_for(job.changed.wait(), WAIT_S)
            except asyncio.TimeoutError:
                state = job.machine
                raise AssertionError(f"job stays {state.status} ({state.message!r}), {state.committed} rounds, {state.round}") from None

    async def committed(self, job: LiveJob, rounds: int) -> None:
        """Wait until so many rounds are committed and lie on the disk; the machine knows them a moment before."""
        await self.until(job, lambda job: job.machine.committed >= rounds)
        await self.engine.ask(job.job_id, machine.Ticked())

    async def pause(self, job: LiveJob) -> None:
        await self.control.PauseJob(control_pb2.PauseJobRequest(job_id=job.job_id))

    async def resume(self, job: LiveJob) -> None:
        await self.control.ResumeJob(control_pb2.ResumeJobRequest(job_id=job.job_id))

    async def ended(self, job: LiveJob) -> LiveJob:
        """Wait for the job's end and for everything that is done after it."""
        await self.until(job, lambda job: job.ended)
        await asyncio.wait_for(self.engine.settled(job), WAIT_S)
        return job


def settings(state_dir: Path, **changes: object) -> CoordinatorConfig:
    """The defaults, on a free port, with a lease that outlasts every wait: agents in a test's own process send no heartbeats."""
    made = config.load(
        None, {}, {"listen": "127.0.0.1:0", "plaintext": True, "state_dir": str(state_dir), "heartbeat_s": 0.5, "lease_s": 3 * WAIT_S}
    )
    return replace(made, **changes)  # type: ignore[arg-type]  # checked by the dataclass's own names


@contextlib.asynccontextmanager
async def coordinating(state_dir: Path, *, as_operator: Identity | None = None, **changes: object) -> AsyncGenerator[Coordinator]:
    """Everything opened as the daemon does; what the engine's loop raises is raised here. Plaintext, unless `changes` say otherwise.

    `as_operator`: whose certificate `control` and `operator` show.
    """
    made = settings(state_dir, **changes)
    async with daemon.running(made) as running:
        engine, fleet = running.engine, running.fleet
        address = f"127.0.0.1:{running.port}"
        writer = asyncio.create_task(engine.run(), name="engine")
        operator = channel.open_channel(address, as_operator)
        try:
            control = control_pb2_grpc.ControlServiceStub(operator)
            yield Coordinator(address, state_dir, engine, fleet, running.blob_service, control, writer, running, operator)
        finally:
            await operator.close()
            fleet.hang_up()
            await running.server.stop(grace=0)
            writer.cancel()
            result = (await asyncio.gather(writer, return_exceptions=True))[0]
        if isinstance(result, Exception):
            raise result


def echo_job(
    rounds: int = 2,
    minimum: int = 1,
    *,
    name: str = "echo",
    state_mib: float = 0.02,
    extra: str = "",
    rounds_extra: str = "",
    devices_extra: str = "",
) -> str:
    """A job file of method echo."""
    return f"""
name = "{name}"
{extra}
[method]
name = "echo"
state_mib = {state_mib}
[rounds]
count = {rounds}
{rounds_extra}
[devices]
minimum = {minimum}
{devices_extra}
"""


def committed(job: LiveJob, number: int) -> RoundEntry:
    """The record of a round that memory still holds: one of the last, or one whose adapter is kept."""
    entry = job.history.get(number)
    assert entry is not None, f"round {number} of {job.history.committed} is not in memory"
    return entry


def state_of(job: LiveJob, number: int) -> str:
    """Digest of the state that a round ended with."""
    state = committed(job, number).state
    assert state is not None
    return state.digest
