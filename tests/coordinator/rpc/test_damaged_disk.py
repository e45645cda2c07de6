"""A disk that damages what a running job stands on: noticed before it is folded, mended or named."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fleetune.coordinator import daemon
from fleetune.coordinator.domain import Blob, Evaluation, Failure
from fleetune.coordinator.rounds import adapter, aggregate, damage, inspection
from fleetune.coordinator.rounds.host import HostError
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import DurabilityError
from fleetune.supervisor import Supervisor
from fleetune.v1 import control_pb2, control_pb2_grpc, fleet_pb2, messages_pb2
from fleetune.wire import digests
from support.coordinating import WAIT_S, Coordinator, committed, coordinating, echo_job, settings
from support.echo_agent import EchoAgent
from support.spoil import KINDS, Kind, spoil


@pytest.fixture(autouse=True)
def rechecked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything had lain on the disk for long."""
    monkeypatch.setattr(inspection, "RECHECK_AFTER_S", 0.0)


async def test_what_was_just_written_is_not_read_again_before_it_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    is_whole = damage.is_whole

    def noted(blobs: BlobStore, blob: Blob) -> bool:
        read.append(blob.digest)
        return is_whole(blobs, blob)

    monkeypatch.setattr(damage, "is_whole", noted)
    monkeypatch.setattr(inspection, "RECHECK_AFTER_S", 60.0)
    await _undisturbed(tmp_path / "young", 2)
    assert read == []
    monkeypatch.setattr(inspection, "RECHECK_AFTER_S", 0.0)
    await _undisturbed(tmp_path / "old", 2)
    assert len(read) >= 6  # two updates and the state in each round


async def _undisturbed(tmp_path: Path, rounds: int) -> str:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        a.serve()
        b.serve()
        job = await c.ended(await c.submit(echo_job(rounds=rounds, minimum=2)))
        state = committed(job, job.machine.committed).state
        assert state is not None
        return state.digest


@pytest.mark.parametrize("kind", KINDS)
async def test_a_damaged_update_is_made_again_and_never_folded(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Kind) -> None:
    expected = await _undisturbed(tmp_path / "undisturbed", 1)
    async with coordinating(tmp_path / "s") as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job = await c.submit(echo_job(rounds=1, minimum=2))
        first, others = await a.next_task(), await b.next_task()
        data = await a.trained(first)
        await a.upload(first, data)
        spoil(c.engine.blobs.path(digests.of_bytes(data)), kind)
        await b.upload(others, await b.trained(others))
        again = await a.next_task()
        assert again.task_id == first.task_id
        assert again.lease > first.lease
        assert job.machine.status == "running"
        receipt = await a.upload(again, await a.trained(again))
        assert receipt.status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        await c.ended(job)
        state = committed(job, 1).state
        assert state is not None
        assert state.digest == expected
    assert "update damaged on disk" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_an_update_damaged_while_the_coordinator_was_down_is_asked_for_again(tmp_path: Path, kind: Kind) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        await c.submit(echo_job(rounds=1, minimum=2))
        task = await a.next_task()
        data = await a.trained(task)
        await a.upload(task, data)
        path = c.engine.blobs.path(digests.of_bytes(data))
        await b.next_task()
    spoil(path, kind)
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        again = await a.next_task()  # at once, while the other one still trains
        assert again.task_id == task.task_id
        assert again.lease > task.lease
        await a.upload(again, await a.trained(again))
        b.serve()
        job = await c.ended(c.engine.jobs[task.task_id.split("/")[0]])
        assert job.machine.status == "completed"


async def _second_round(c: Coordinator, a: EchoAgent) -> tuple[messages_pb2.Task, bytes]:
    """The open task of round 2 and its finished update; round 1's folder is written."""
    first = await a.next_task()
    await a.upload(first, await a.trained(first))
    second = await a.next_task()
    job = c.engine.jobs[second.task_id.split("/")[0]]
    async with job.publishing:
        return second, await a.trained(second)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_damaged_state_with_a_whole_copy_is_mended_before_the_fold(tmp_path: Path, kind: Kind) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        job = await c.submit(echo_job(rounds=2))
        task, data = await _second_round(c, a)
        path = c.engine.blobs.path(task.state.digest)
        copy = path.read_bytes()
        path.unlink()
        path.write_bytes(copy)  # bytes of its own, beside the folder's
        spoil(path, kind)
        await a.upload(task, data)
        await c.ended(job)
        assert job.machine.status == "completed"


@pytest.mark.parametrize("kind", ["flip", "cut"])
async def test_a_damaged_state_without_a_copy_ends_the_job_by_name(tmp_path: Path, kind: Kind) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        job = await c.submit(echo_job(rounds=2))
        task, data = await _second_round(c, a)
        spoil(c.engine.blobs.path(task.state.digest), kind)  # the folder's file is the same file
        await a.upload(task, data)
        await c.ended(job)
        assert job.machine.status == "failed"
        assert "is damaged on the coordinator's disk" in job.machine.message
        assert "restore a backup" in job.machine.message
        assert job.machine.committed == 1, "nothing was folded on it"


async def test_a_state_damaged_while_the_coordinator_was_down_ends_the_job_at_start(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        job = await c.submit(echo_job(rounds=2))
        task = await a.next_task()
        path = c.engine.blobs.path(task.state.digest)
    spoil(path, "flip")
    async with coordinating(tmp_path) as c:
        found = await c.ended(c.engine.jobs[job.job_id])
        assert found.machine.status == "failed"
        assert "the check at start failed" in found.machine.message
        assert "damaged" in found.machine.message


async def test_a_device_that_could_not_use_what_it_fetched_makes_the_coordinator_look(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job = await c.submit(echo_job(rounds=1, minimum=2))
        task = await a.next_task()
        await b.next_task()
        spoil(c.engine.blobs.path(task.state.digest), "flip")
        told = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_TRANSFER, stage="download", message="another digest")
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, failure=told))
        await c.ended(job)
        assert job.machine.status == "failed"
        assert "serving files failed" in job.machine.message


async def _in_evaluation(c: Coordinator, a: EchoAgent, b: EchoAgent) -> tuple[LiveJob, messages_pb2.Task]:
    """A job in the evaluation of its only round, and the task of `a` to measure it."""
    job = await c.submit(echo_job(rounds=1, minimum=2), evaluated=True)
    for agent in (a, b):
        task = await agent.next_task()
        await agent.upload(task, await agent.trained(task))
    task = await a.next_task()
    assert task.kind == messages_pb2.TASK_KIND_EVALUATE
    await b.next_task()
    return job, task


@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_state_that_a_device_finds_damaged_is_folded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Kind
) -> None:
    expected = await _undisturbed(tmp_path / "undisturbed", 1)
    async with coordinating(tmp_path / "s") as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job, task = await _in_evaluation(c, a, b)
        assert task.state.digest == expected
        spoil(c.engine.blobs.path(expected), kind)
        told = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_TRANSFER, stage="fetch", message="another digest")
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, epoch=1, failure=told))
        again = await a.next_task()
        assert (again.task_id, again.state.digest) == (task.task_id, expected)
        assert again.lease > task.lease
        assert digests.of_file(c.engine.blobs.path(expected)) == expected
        await a.answer(again)
        b.serve()
        await c.ended(job)
        assert job.machine.status == "completed", job.machine.message
        assert committed(job, 1).metrics
    assert "folded once more" in caplog.text


async def test_a_new_state_damaged_while_the_coordinator_was_down_is_folded_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job, task = await _in_evaluation(c, a, b)
        path = c.engine.blobs.path(task.state.digest)
    spoil(path, "flip")
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        a.serve()
        b.serve()
        found = await c.ended(c.engine.jobs[job.job_id])
        assert found.machine.status == "completed", found.machine.message
        state = committed(found, 1).state
        assert state is not None and state.digest == task.state.digest


async def test_a_new_state_that_the_model_host_cannot_read_is_folded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        asked: list[str] = []

        async def evaluate(
            base_folder: str, recipe: object, state: Path, rows: Path, structure: str, *, triplets: bool = False
        ) -> Evaluation:
            asked.append(state.name)
            if len(asked) == 1:
                spoil(state, "flip")
                raise HostError(Failure("model", "evaluate", "The file is damaged."))
            assert digests.of_file(state) == state.name
            return Evaluation({"loss": 1.0}, 3)

        monkeypatch.setattr(c.engine._host, "evaluate", evaluate)
        a.serve()
        job = await c.submit(echo_job(rounds=1))
        job.machine.plan = replace(job.machine.plan, evaluation="heldout", metric="loss")
        await c.ended(job)
        assert job.machine.status == "completed", job.machine.message
        assert len(asked) == 2 and len(set(asked)) == 1
        assert committed(job, 1).metrics == {"loss": 1.0}


async def test_with_a_new_state_its_updates_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job, task = await _in_evaluation(c, a, b)
        monkeypatch.setattr(inspection, "RECHECK_AFTER_S", 3600.0)
        entry = job.machine.round
        assert entry is not None
        (update,) = [t.update for t in entry.trained() if t.device_id == a.device_id]
        assert update is not None
        for digest in (update.blob.digest, task.state.digest):
            spoil(c.engine.blobs.path(digest), "flip")
        told = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_TRANSFER, stage="fetch", message="another digest")
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, epoch=1, failure=told))
        again = await a.next_task()
        assert again.kind == messages_pb2.TASK_KIND_TRAIN
        await a.answer(again)
        a.serve()
        b.serve()
        await c.ended(job)
        assert job.machine.status == "completed", job.machine.message


async def test_garbage_is_collected_by_the_operators_call(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        a.serve()
        job = await c.ended(await c.submit(echo_job(rounds=3)))
        kept = c.blobs()
        c.engine.blobs.put_bytes(b"nobody's")
        found = await c.control.CollectGarbage(control_pb2.CollectGarbageRequest(dry_run=True))
        assert (found.blobs, found.blob_bytes) == (1, 8)
        assert await c.control.CollectGarbage(control_pb2.CollectGarbageRequest()) == found
        assert c.blobs() == kept
        trimmed = await c.control.CollectGarbage(control_pb2.CollectGarbageRequest(keep_rounds=1))
        assert (trimmed.blobs, trimmed.folders) == (2, 2)
        state = committed(job, job.machine.committed).state
        assert state is not None
        assert c.blobs() == {state.digest}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await c.control.CollectGarbage(control_pb2.CollectGarbageRequest(jobs_older_than_s=-1))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    async with coordinating(tmp_path) as c:
        assert c.blobs() == {state.digest}
        assert adapter.rounds(tmp_path / "jobs", job.job_id) == [3]
        assert c.engine.jobs[job.job_id].keep_rounds == 1


# --- a flush that fails


async def _serving(state_dir: Path) -> tuple[asyncio.Task[int], str]:
    serving = asyncio.create_task(daemon._serve(settings(state_dir, drain_grace_s=5.0), Supervisor()))
    while not (state_dir / "address").exists():
        await asyncio.wait({serving}, timeout=0.01)
        assert not serving.done()
    return serving, (state_dir / "address").read_text().strip()


def _refuse(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no file under `folder` can be flushed."""
    fsync = os.fsync

    def broken(fd: int) -> None:
        if f"/{folder}" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", broken)


@pytest.mark.parametrize("folder", ["spool", "blobs"])
async def test_a_flush_that_fails_ends_the_process_before_any_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    serving, address = await _serving(tmp_path)
    async with EchoAgent(address, "a") as a:
        control = control_pb2_grpc.ControlServiceStub(a._channel)  # type: ignore[arg-type]
        await control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=echo_job(), submit_id="eio-eio-eio"))
        task = await a.next_task()
        data = await a.trained(task)
        with monkeypatch.context() as patched:
            _refuse(folder, patched)
            with pytest.raises(grpc.aio.AioRpcError):
                await a.upload(task, data)
            assert await asyncio.wait_for(serving, WAIT_S) == 1
        assert a.receipts.empty()
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a", device_id=a.device_id) as again:
        (job,) = c.engine.jobs.values()
        assert job.machine.open_task(task.task_id) is not None
        again.serve()
        await c.ended(job)
        assert job.machine.status == "completed"


async def test_a_fold_whose_result_cannot_be_flushed_ends_the_process_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: object) -> None:
        raise DurabilityError("The disk did not take it.")

    serving, address = await _serving(tmp_path)
    async with EchoAgent(address, "a") as a:
        control = control_pb2_grpc.ControlServiceStub(a._channel)  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            patched.setattr(aggregate, "fold", broken)
            a.serve()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=echo_job(), submit_id="eio-eio-eio"))
            assert await asyncio.wait_for(serving, WAIT_S) == 1
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as again:
        again.serve()
        (job,) = c.engine.jobs.values()
        assert (await c.ended(job)).machine.status == "completed"
