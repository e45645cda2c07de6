"""An upload whose device dies in the very moment in which its update is handed to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from pathlib import Path

import grpc.aio
import pytest

from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.orders import Receipt
from fleetune.coordinator.store.db import Database
from support.coordinating import WAIT_S, committed, coordinating, echo_job
from support.echo_agent import EchoAgent


def has_updates(count: int, job: LiveJob) -> bool:
    return job.ended or (job.machine.round is not None and len(job.machine.round.trained()) >= count)


async def test_an_update_that_is_accepted_after_its_device_was_cut_off_keeps_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction before it takes long: the stream ends while the update still waits to be decided on."""
    disk, handed_in, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    disk.set()
    write, ask = Database.write, Engine.ask

    async def slow_write(self: Database, change: object) -> object:
        await disk.wait()
        return await write(self, change)  # type: ignore[arg-type]

    async def watched_ask(self: Engine, job_id: str, event: machine.Event) -> Receipt:
        if not isinstance(event, machine.UpdateArrived):
            return await ask(self, job_id, event)
        try:
            handed_in.set()
            return await ask(self, job_id, event)
        finally:
            left.set()

    monkeypatch.setattr(Database, "write", slow_write)
    monkeypatch.setattr(Engine, "ask", watched_ask)
    async with coordinating(tmp_path) as coordinator:
        async with EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "b") as b:
            job = await coordinator.submit(echo_job(rounds=1, minimum=2))
            task = await a.next_task()
            data = await a.trained(task)
            disk.clear()
            coordinator.engine.post(job.job_id, machine.DeviceOffline("somebody"))
            upload = asyncio.create_task(a.upload(task, data))
            await asyncio.wait_for(handed_in.wait(), WAIT_S)
            await a.cut()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await upload
            await asyncio.wait_for(left.wait(), WAIT_S)
            # Whatever the end of the stream sets going has had its turn before the disk has.
            for _ in range(10):
                await asyncio.sleep(0)
            disk.set()
            await coordinator.until(job, functools.partial(has_updates, 1))
            b.serve()
            await coordinator.ended(job)

    assert job.machine.status == "completed", job.machine.message
    assert [task.device_name for task in committed(job, 1).trained()] == ["a", "b"]
