"""Trouble on the coordinator itself: a full disk, a bug in a job's work, a bug in the engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import text

from fleetune.coordinator import daemon, room
from fleetune.coordinator.rounds import aggregate, engine, folding, machine
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.store import blobs as blobs_module
from fleetune.errors import DiskFullError
from fleetune.supervisor import Supervisor
from fleetune.v1 import control_pb2, control_pb2_grpc, fleet_pb2, messages_pb2
from fleetune.wire import channel
from support.coordinating import WAIT_S, committed, coordinating, echo_job, settings
from support.echo_agent import EchoAgent


async def test_a_full_database_holds_everything_up_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own page limit stands in for the disk: the same error, and it can be lifted."""
    monkeypatch.setattr(engine, "COMMIT_RETRY_S", 0.05)
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=2))
        task = await a.next_task()
        data = await a.trained(task)
        database = coordinator.engine._database
        pages = await database.write(lambda tx: tx.execute(text("PRAGMA page_count")).scalar())
        await database.write(lambda tx: tx.execute(text(f"PRAGMA max_page_count = {pages}")))
        while not coordinator.engine.stalled:  # the file has some room left in its last pages
            with contextlib.suppress(grpc.aio.AioRpcError):
                await coordinator.control.PauseJob(control_pb2.PauseJobRequest(job_id="last"), timeout=0.5)
        assert "full" in coordinator.engine.stalled
        big = control_pb2.SubmitJobRequest(job_toml=echo_job() + "#" * 50_000, submit_id="no-room-for-it")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await coordinator.control.SubmitJob(big)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert list(coordinator.engine.jobs) == [job.job_id]
        sending = asyncio.create_task(a.upload(task, data))
        await asyncio.wait({sending}, timeout=0.2)
        assert not sending.done(), "no receipt before the commit"
        await database.write(lambda tx: tx.execute(text("PRAGMA max_page_count = 1000000")))
        assert (await sending).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        await coordinator.control.ResumeJob(control_pb2.ResumeJobRequest(job_id="last"))
        a.serve()
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert coordinator.engine.stalled == ""


async def test_no_room_for_an_upload_is_told_and_taken_up_later(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=1))
        task = await a.next_task()
        data = await a.trained(task)
        coordinator.engine.blobs._reserve_bytes = 1 << 60
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await a.upload(task, data)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "Make room" in (caught.value.details() or "")
        assert coordinator.spooled() == []
        coordinator.engine.blobs._reserve_bytes = blobs_module.RESERVE_BYTES
        assert (await a.upload(task, data)).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        await coordinator.ended(job)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
async def test_a_fold_that_fails_ends_its_job_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, word: str
) -> None:
    def broken(plan: object) -> None:
        raise error

    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        with monkeypatch.context() as patched:
            patched.setattr(aggregate, "fold", broken)
            job = await coordinator.ended(await coordinator.submit(echo_job(rounds=2)))
        assert job.machine.status == "failed"
        assert word in job.machine.message
        assert coordinator.blobs() == set()
        assert (await coordinator.ended(await coordinator.submit(echo_job(rounds=2)))).machine.status == "completed"


async def test_a_fold_without_room_waits_by_name_and_goes_on_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "FOLD_RETRY_S", 0.05)
    fold = aggregate.fold

    def full(plan: aggregate.FoldPlan) -> aggregate.FoldResult:
        raise DiskFullError("No space left in scratch.", "Make room on that disk.")

    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        monkeypatch.setattr(aggregate, "fold", full)
        job = await coordinator.submit(echo_job(rounds=2))
        await coordinator.until(job, lambda job: coordinator.engine.trouble != "")
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id="last"))).job
        assert view.state == control_pb2.JOB_STATE_RUNNING
        assert "No space left in scratch" in view.message
        monkeypatch.setattr(aggregate, "fold", fold)
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert coordinator.engine.trouble == ""


async def test_a_job_cancelled_while_its_fold_waits_for_room_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "FOLD_RETRY_S", 0.05)

    def full(plan: aggregate.FoldPlan) -> aggregate.FoldResult:
        raise DiskFullError("No space left in scratch.", "Make room on that disk.")

    monkeypatch.setattr(aggregate, "fold", full)
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.submit(echo_job(rounds=2))
        await coordinator.until(job, lambda job: coordinator.engine.trouble != "")
        await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id="last"))
        await coordinator.ended(job)
        assert coordinator.engine.trouble == ""


async def test_health_says_that_no_uploads_are_taken_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOOK_S", 0.02)
    async with coordinating(tmp_path) as coordinator:
        async with channel.open_channel(coordinator.address) as line:
            stub: Any = health_pb2_grpc.HealthStub(line)  # Any: grpc_health gives its stubs no methods
            uploads = stub.Watch(health_pb2.HealthCheckRequest(service="fleetune.v1.BlobService"))
            assert (await uploads.read()).status == health_pb2.HealthCheckResponse.SERVING
            coordinator.engine.blobs._reserve_bytes = 1 << 60
            assert (await uploads.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert "no uploads are taken" in coordinator.engine.trouble
            whole = await stub.Check(health_pb2.HealthCheckRequest(service="fleetune.v1.FleetService"))
            assert whole.status == health_pb2.HealthCheckResponse.SERVING
            coordinator.engine.blobs._reserve_bytes = blobs_module.RESERVE_BYTES
            assert (await uploads.read()).status == health_pb2.HealthCheckResponse.SERVING
            uploads.cancel()


async def test_a_cancelled_job_keeps_nothing_of_a_fold_that_ends_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    begun, go_on = asyncio.Event(), asyncio.Event()
    fold = aggregate.fold

    def slow(plan: aggregate.FoldPlan) -> aggregate.FoldResult:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return fold(plan)

    monkeypatch.setattr(aggregate, "fold", slow)
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.submit(echo_job(rounds=2))
        await begun.wait()
        await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id="last"))
        go_on.set()
        await coordinator.ended(job)
        while coordinator.blobs():  # noqa: ASYNC110  # cleared away in the background
            await asyncio.sleep(0.01)
        assert list((tmp_path / "scratch").iterdir()) == []
        assert job.machine.status == "cancelled"


async def test_a_job_without_an_adapter_is_none_to_start_from(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        first = await coordinator.ended(await coordinator.submit(echo_job(rounds=1)))
        toml = f"""
name = "goes-on"
[model]
base = "org/name"
[task]
kind = "causal-lm"
[lora]
init_adapter = "{first.job_id}"
[data]
name = "x"
input = "input"
target = "target"
"""
        job = await coordinator.ended(await coordinator.submit(toml))
        assert job.machine.status == "failed"
        assert f"job {first.job_id} has no adapter to start from" in job.machine.message
        assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_task_that_does_not_move_is_given_up_although_its_device_lives(tmp_path: Path) -> None:
    async with (
        coordinating(tmp_path) as coordinator,
        EchoAgent(coordinator.address, "stuck") as stuck,
        EchoAgent(coordinator.address, "b") as b,
    ):
        b.serve()
        job = await coordinator.submit(echo_job(rounds=1, minimum=2))
        task = await stuck.next_task()
        await b.answered(1)
        coordinator.engine._settings = replace(coordinator.engine._settings, stall_s=0.3)
        await coordinator.engine.ask(job.job_id, machine.Ticked())  # so that it looks again when it has to
        for _ in range(2):  # the same count twice is no progress
            await stuck.say(progress=fleet_pb2.TaskProgress(task_id=task.task_id, stage=fleet_pb2.TASK_STAGE_TRAINING, done=3, total=9))
        assert (await stuck.next_cancel()).task_id == task.task_id
        await coordinator.ended(job)
        assert {t.device_name: t.status for t in committed(job, 1).tasks.values()} == {"stuck": "failed", "b": "done"}
        assert job.machine.last_failure is not None
        assert job.machine.last_failure.kind == "stalled"


async def test_a_bug_in_the_engine_ends_the_daemon_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = settings(tmp_path, drain_grace_s=5.0)
    serving = asyncio.create_task(daemon._serve(made, Supervisor()))
    while not (tmp_path / "address").exists():
        await asyncio.wait({serving}, timeout=0.01)
        assert not serving.done()
    address = (tmp_path / "address").read_text().strip()

    def broken(self: JobMachine, event: object, now: float) -> None:
        raise AssertionError("an invariant is broken")

    async with EchoAgent(address, "a") as a:
        monkeypatch.setattr(JobMachine, "handle", broken)
        control = control_pb2_grpc.ControlServiceStub(a._channel)  # type: ignore[arg-type]
        with contextlib.suppress(grpc.aio.AioRpcError):  # the answer may still come before the end
            await control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=echo_job(), submit_id="the-last-straw"))
        assert await asyncio.wait_for(serving, WAIT_S) == 1
    (record,) = [r for r in caplog.records if r.levelname == "CRITICAL"]
    assert "nothing that was acknowledged is lost" in record.getMessage()
    assert not (tmp_path / "address").exists()
