"""Whole rounds through the real coordinator with small honest agents."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from fleetune.coordinator import daemon
from fleetune.coordinator.rounds import adapter, machine
from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.v1 import control_pb2, fleet_pb2, messages_pb2
from support import tensors
from support.coordinating import WAIT_S, Coordinator, committed, coordinating, echo_job, state_of
from support.echo_agent import EchoAgent, values

ACCEPTED = messages_pb2.RECEIPT_STATUS_ACCEPTED


def result(coordinator: Coordinator, job_id: str, number: int) -> bytes:
    return (adapter.folder(coordinator.engine.jobs_folder, job_id, number) / adapter.STATE_FILE).read_bytes()


async def test_two_devices_add_their_constants_exactly(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        async with EchoAgent(coordinator.address, "a", samples=1) as a, EchoAgent(coordinator.address, "b", samples=3) as b:
            a.serve()
            b.serve()
            job = await coordinator.ended(await coordinator.submit(echo_job(rounds=3, minimum=2)))
            assert job.machine.status == "completed", job.machine.message
            # 1 of weight 1 and 2 of weight 3: 1.75 a round.
            assert np.array_equal(np.unique(values(result(coordinator, job.job_id, 3))), [5.25])
            await a.answered(3)
            await b.answered(3)
            assert [status for _, status in a.done + b.done] == [ACCEPTED] * 6
        assert coordinator.spooled() == []
        kept = {entry.state.digest for entry in job.history if entry.state}
        assert coordinator.blobs() == kept, "updates and the initial state are gone"


async def test_only_the_last_rounds_and_the_best_keep_their_folder_and_blob(tmp_path: Path) -> None:
    async with coordinating(tmp_path, keep_rounds=2) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=6), evaluated=True))
        # The loss of an echo is its first value, which grows: the first round stays the best.
        assert job.machine.best_round == 1
        assert adapter.rounds(coordinator.engine.jobs_folder, job.job_id) == [1, 5, 6]
        folder = coordinator.engine.jobs_folder / job.job_id
        assert (folder / "final").resolve().name == "0006"
        assert (folder / "best").resolve().name == "0001"
        assert len(coordinator.blobs()) == 3
        state = coordinator.engine.blobs.path(state_of(job, 6))
        assert state.samefile(folder / "final" / adapter.STATE_FILE), "one file, two names"


async def its_turn(turns: dict[str, asyncio.Event], task: messages_pb2.Task) -> None:
    await turns[task.task_id.split("/")[2].removeprefix("device-")].wait()


def has_updates(count: int, job: LiveJob) -> bool:
    return job.ended or (job.machine.round is not None and len(job.machine.round.trained()) >= count)


def has_gone(job: LiveJob) -> bool:
    return job.machine.round is not None and any(task.offline_since_unix_s for task in job.machine.round.tasks.values())


async def test_every_order_of_arrival_gives_the_same_bytes(tmp_path: Path) -> None:
    found: set[bytes] = set()
    for index, order in enumerate(itertools.permutations("abc")):
        async with coordinating(tmp_path / str(index)) as coordinator:
            turns = {name: asyncio.Event() for name in order}
            agents = [EchoAgent(coordinator.address, name, samples=ord(name)) for name in "abc"]
            for agent in agents:
                agent.gate = functools.partial(its_turn, turns)
                (await agent.connect()).serve()
            job = await coordinator.submit(echo_job(rounds=1, minimum=3))
            for count, name in enumerate(order, 1):
                turns[name].set()
                await coordinator.until(job, functools.partial(has_updates, count))
            await coordinator.ended(job)
            found.add(result(coordinator, job.job_id, 1))
            for agent in agents:
                await agent.cut()
    assert len(found) == 1


class Clock:
    """The coordinator's wall clock, which the test sets forward: what is to be in time is, however busy the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead_s = 0.0
        monkeypatch.setattr(daemon, "Engine", functools.partial(Engine, wall=lambda: time.time() + self._ahead_s))

    async def forward(self, coordinator: Coordinator, job: LiveJob, by_s: float) -> None:
        self._ahead_s += by_s
        await coordinator.engine.ask(job.job_id, machine.Ticked())


async def test_a_round_closes_without_a_device_that_died_and_the_next_has_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    async with coordinating(tmp_path) as coordinator:
        a, b = EchoAgent(coordinator.address, "a"), EchoAgent(coordinator.address, "b")
        (await a.connect()).serve()
        await b.connect()
        job = await coordinator.submit(echo_job(rounds=2, minimum=2))
        await b.next_task()
        await a.answered(1)
        await b.cut()
        await coordinator.until(job, has_gone)
        assert job.machine.committed == 0
        await clock.forward(coordinator, job, 3600)
        await coordinator.until(job, lambda job: job.machine.committed == 1)
        assert [task.device_name for task in committed(job, 1).trained()] == ["a"]
        await b.connect()
        b.serve()
        await coordinator.ended(job)
        assert [task.device_name for task in committed(job, 2).trained()] == ["a", "b"]
        await a.cut()
        await b.cut()


async def test_a_device_that_comes_back_within_its_grace_gets_its_task_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        a = await EchoAgent(coordinator.address, "a").connect()
        job = await coordinator.submit(echo_job(rounds=1))
        first = await a.next_task()
        await a.cut()
        await coordinator.until(job, has_gone)
        await a.connect()
        again = await a.next_task()
        assert again.task_id == first.task_id
        assert again.lease > first.lease
        assert (await a.answer(again)).status == ACCEPTED
        await coordinator.ended(job)
        await a.cut()


async def test_an_agent_that_still_has_its_task_after_a_reconnect_is_left_alone(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        a = await EchoAgent(coordinator.address, "a").connect()
        job = await coordinator.submit(echo_job(rounds=1))
        task = await a.next_task()
        await a.cut()
        await a.connect({task.task_id: fleet_pb2.HELD_STAGE_RUNNING})
        assert (await a.answer(task)).status == ACCEPTED
        await coordinator.ended(job)
        assert a.tasks.empty()
        assert a.cancels.empty()
        await a.cut()


async def test_a_task_that_was_withdrawn_meanwhile_is_cancelled_at_the_reconnect(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        a = await EchoAgent(coordinator.address, "a").connect()
        job = await coordinator.submit(echo_job(rounds=1))
        task = await a.next_task()
        await a.cut()
        await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id=job.job_id))
        await a.connect({task.task_id: fleet_pb2.HELD_STAGE_RUNNING})
        assert (await a.next_cancel()).task_id == task.task_id
        await a.cut()


async def test_a_new_stream_of_the_same_agent_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        old, new = EchoAgent(coordinator.address, "a"), EchoAgent(coordinator.address, "a")
        await old.connect()
        await new.connect()
        await asyncio.wait_for(old.ended.wait(), WAIT_S)
        await old.cut()
        new.serve()
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=2)))
        assert job.machine.status == "completed"
        (device,) = (await coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert device.online
        assert device.updates_accepted == 2
        await new.cut()


async def test_acknowledged_updates_survive_a_restart_in_the_middle_of_a_round(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        a, b = [await EchoAgent(coordinator.address, name).connect() for name in "ab"]
        job = await coordinator.submit(echo_job(rounds=2, minimum=2))
        assert (await a.answer(await a.next_task())).status == ACCEPTED
        unsent = await b.next_task()
        await a.cut()
        await b.cut()
        job_id = job.job_id
    async with coordinating(tmp_path) as coordinator:
        job = coordinator.engine.jobs[job_id]
        a.address = b.address = coordinator.address
        await a.connect()
        await b.connect({unsent.task_id: fleet_pb2.HELD_STAGE_FINISHED})
        assert a.tasks.empty(), "its update was acknowledged"
        a.serve()
        assert (await b.answer(unsent)).status == ACCEPTED
        b.serve()
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert [len(entry.trained()) for entry in job.history] == [2, 2]
        assert np.array_equal(np.unique(values(result(coordinator, job_id, 2))), [3.0])
        await a.cut()
        await b.cut()
    async with coordinating(tmp_path) as coordinator:
        (view,) = (await coordinator.control.ListJobs(control_pb2.ListJobsRequest())).jobs
        assert (view.state, view.rounds_committed) == (control_pb2.JOB_STATE_COMPLETED, 2)
        assert await asyncio.to_thread(Path(view.adapter_folder).is_dir)


async def test_a_folder_that_a_crash_has_cost_is_written_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=2)))
        rounds = coordinator.engine.jobs_folder / job.job_id / "rounds"
        before = (rounds / "0001" / "manifest.json").read_text()
        adapter.drop(coordinator.engine.jobs_folder, job.job_id, 2)
        (rounds / "0001" / "manifest.json").write_text("")
        (rounds.parent / "final").unlink()
    async with coordinating(tmp_path):
        assert (rounds / "0001" / "manifest.json").read_text() == before
        assert (rounds.parent / "final" / adapter.STATE_FILE).is_file()


async def test_blobs_without_a_row_and_rows_without_a_blob_go_at_the_start(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=1)))
        kept = coordinator.blobs()
        coordinator.engine.blobs.put_bytes(b"half-done")
    async with coordinating(tmp_path) as coordinator:
        assert coordinator.blobs() == kept
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=job.job_id))).job
        assert view.history[0].adapter_digest in kept


# --- what operators do


async def test_a_paused_job_waits_between_rounds(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=2, devices_extra="wait_s = 0.2"))
        task = await a.next_task()
        paused = (await coordinator.control.PauseJob(control_pb2.PauseJobRequest(job_id="last"))).job
        assert paused.message == "pauses after this round"
        await a.answer(task)
        await coordinator.until(job, lambda job: job.machine.status == "paused")
        await asyncio.sleep(0.3)  # longer than wait_s, which must not run meanwhile
        assert a.tasks.empty()
        assert job.machine.status == "paused"
        await coordinator.control.ResumeJob(control_pb2.ResumeJobRequest(job_id="last"))
        await a.answer(await a.next_task())
        assert (await coordinator.ended(job)).machine.status == "completed"


async def test_a_cancelled_job_withdraws_its_task_and_leaves_nothing(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "b") as b:
        job = await coordinator.submit(echo_job(rounds=2, minimum=2))
        task = await a.next_task()
        await b.answer(await b.next_task())
        view = (await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id=job.job_id, reason="enough"))).job
        assert (view.state, view.message) == (control_pb2.JOB_STATE_CANCELLED, "enough")
        assert (await a.next_cancel()).task_id == task.task_id
        await coordinator.ended(job)
        assert coordinator.blobs() == set()
        assert coordinator.spooled() == []


async def test_queued_jobs_run_one_after_the_other(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        first, second = [await coordinator.submit(echo_job(rounds=2, name=name)) for name in ("one", "two")]
        task = await a.next_task()
        assert (first.machine.status, second.machine.status) == ("running", "queued")
        a.tasks.put_nowait(task)
        a.serve()
        await coordinator.until(first, lambda job: job.ended)
        assert second.machine.committed == 0
        await coordinator.ended(first)
        await coordinator.ended(second)
        await a.answered(4)
        assert [task_id.split("-")[0] for task_id, _ in a.done] == ["one", "one", "two", "two"]
        assert len(coordinator.blobs()) == 2, "both jobs come to the same bytes, which are stored once"


async def test_a_queued_job_can_be_paused_and_overtaken(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        first, second, third = [await coordinator.submit(echo_job(rounds=1, name=name)) for name in ("one", "two", "three")]
        await coordinator.control.PauseJob(control_pb2.PauseJobRequest(job_id=second.job_id))
        a.serve()
        await coordinator.ended(first)
        await coordinator.ended(third)
        assert (second.machine.status, second.machine.paused) == ("queued", True)
        await coordinator.control.ResumeJob(control_pb2.ResumeJobRequest(job_id=second.job_id))
        await coordinator.ended(second)


async def test_a_resumed_job_waits_for_a_place_among_those_that_run(tmp_path: Path) -> None:
    async with coordinating(tmp_path, parallel_jobs=1) as coordinator, EchoAgent(coordinator.address, "a") as a:
        first = await coordinator.submit(echo_job(rounds=2))
        second = await coordinator.submit(echo_job(rounds=1))
        task = await a.next_task()
        await coordinator.pause(first)
        await a.answer(task)
        other = await a.next_task()
        assert other.job_id == second.job_id
        await coordinator.resume(first)
        assert (first.machine.status, second.machine.status) == ("queued", "running")
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=first.job_id))).job
        assert (view.state, view.message) == (control_pb2.JOB_STATE_QUEUED, "resumed; waits for its turn")
        await a.answer(other)
        await coordinator.ended(second)
        a.serve()
        await coordinator.ended(first)
        assert (first.machine.status, first.machine.committed) == ("completed", 2)


async def test_parallel_jobs_share_devices_but_a_device_has_one_task(tmp_path: Path) -> None:
    async with coordinating(tmp_path, parallel_jobs=3) as coordinator:
        agents = [(await EchoAgent(coordinator.address, name).connect()) for name in "ab"]
        at_once: dict[str, int] = {}

        async def gate(task: messages_pb2.Task) -> None:
            device = task.task_id.split("/")[2]
            at_once[device] = at_once.get(device, 0) + 1
            assert at_once[device] == 1
            assert sum(device in job.machine.busy_devices() for job in coordinator.engine.jobs.values()) == 1
            await asyncio.sleep(0)
            at_once[device] -= 1

        for agent in agents:
            agent.gate = gate
            agent.serve()
        jobs = [await coordinator.submit(echo_job(rounds=4, name=f"job{index}"), evaluated=True) for index in range(3)]
        for job in jobs:
            await coordinator.ended(job)
        assert [job.machine.status for job in jobs] == ["completed"] * 3
        assert set(at_once.values()) == {0}
        for agent in agents:
            await agent.cut()
        needed = {state_of(job, number) for job in jobs for number in range(max(1, job.machine.committed - 2), job.machine.committed + 1)}
        best = {state_of(job, job.machine.best_round) for job in jobs if job.machine.best_round}
        assert coordinator.blobs() == needed | best


async def test_tags_choose_devices_and_the_others_say_why_not(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        async with EchoAgent(coordinator.address, "a", tags=["gpu", "lab"]) as a, EchoAgent(coordinator.address, "b", tags=["lab"]) as b:
            job = await coordinator.submit(echo_job(rounds=1, minimum=1, devices_extra='tags = ["gpu"]'))
            await a.answer(await a.next_task())
            await coordinator.ended(job)
            assert b.tasks.empty()
            waits = await coordinator.submit(echo_job(rounds=1, devices_extra='tags = ["moon"]'))
            await coordinator.until(waits, lambda job: "0 of at least 1" in job.machine.message)
            view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=waits.job_id))).job
            assert "a: it lacks the tag moon" in view.message
            assert view.state == control_pb2.JOB_STATE_WAITING


async def test_a_round_passes_its_deadline_without_the_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    async with coordinating(tmp_path) as coordinator:
        async with EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "slow") as slow:
            job = await coordinator.submit(echo_job(rounds=1, minimum=2, rounds_extra="deadline_s = 600"))
            a.serve()
            task = await slow.next_task()
            assert 0 < task.deadline_s <= 600
            data = await slow.trained(task)
            await a.answered(1)
            await clock.forward(coordinator, job, 600)
            await coordinator.ended(job)
            assert (await slow.next_cancel()).task_id == task.task_id
            assert (await slow.upload(task, data)).status == messages_pb2.RECEIPT_STATUS_LATE
            (entry,) = job.history
            assert {t.device_name: t.status for t in entry.tasks.values()} == {"a": "done", "slow": "missed"}


async def test_a_refusing_device_is_asked_again_once_it_accepts(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=1))
        for _ in range(8):  # more often than a round may fail
            task = await a.next_task()
            refusal = fleet_pb2.TaskRefusal(reason="8 tasks wait")
            await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, refusal=refusal))
            assert (await a.next_receipt()).status == ACCEPTED
            await coordinator.until(job, lambda job: job.machine.status == "waiting" and "0 of at least 1" in job.machine.message)
            assert a.tasks.empty()
            await a.say(availability=fleet_pb2.Availability(accepts_tasks=True))
        await a.answer(await a.next_task())
        assert (await coordinator.ended(job)).machine.status == "completed"


async def test_a_failure_is_told_with_the_device_and_its_trace(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=1))
        task = await a.next_task()
        failure = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_DATA, stage="load", traceback="Trace")
        failure.message = "row 3\x1b[31m has no label"
        await a.say(log=fleet_pb2.TaskLog(task_id=task.task_id, lines=["loading", "oh\x07 no"]))
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, failure=failure))
        assert (await a.next_receipt()).status == ACCEPTED
        await coordinator.ended(job)
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id="last"))).job
        assert view.state == control_pb2.JOB_STATE_FAILED
        assert (view.failed_device, view.failure.traceback) == ("a", "Trace")
        assert "row 3?[31m has no label" in view.message
        lines = (await coordinator.control.GetLogs(control_pb2.GetLogsRequest(job_id="last", device_name="a"))).lines
        assert [line.text for line in lines] == ["loading", "oh? no"]
        (device,) = (await coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert (device.failures, device.last_failure) == (1, "row 3?[31m has no label")


async def test_a_watcher_hears_the_end_once_the_folder_is_there(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        await coordinator.submit(echo_job(rounds=3))
        seen: list[control_pb2.JobView] = []
        async for response in coordinator.control.WatchJob(control_pb2.WatchJobRequest(job_id="last")):
            seen.append(response.job)
            if len(seen) == 1:
                a.serve()
        assert seen[-1].state == control_pb2.JOB_STATE_COMPLETED
        assert len(seen[-1].history) == 3
        assert (Path(seen[-1].adapter_folder) / adapter.STATE_FILE).is_file()
        assert not seen[0].history


async def test_the_result_is_described_and_downloaded_as_it_lies_on_disk(tmp_path: Path) -> None:
    async with coordinating(tmp_path, keep_rounds=1) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=3))
        await a.answer(await a.next_task())
        await coordinator.until(job, lambda job: job.machine.committed == 1)
        told = await coordinator.control.DescribeAdapter(control_pb2.DescribeAdapterRequest(job_id=job.job_id))
        a.serve()
        await coordinator.ended(job)
        files = {file.name: file for file in told.files}
        assert set(files) == {adapter.STATE_FILE, adapter.README_FILE, adapter.MANIFEST_FILE}
        # Told to somebody who has yet to fetch it: it stays, although its round is gone.
        data = await a.download(files[adapter.STATE_FILE].blob.digest)
        assert np.array_equal(np.unique(values(data)), [1.0])
        (tmp_path / "copy").write_bytes(data)
        assert set(tensors.read(tmp_path / "copy")) == {"echo.00000"}


@pytest.mark.parametrize("verb", ["CancelJob", "PauseJob", "ResumeJob"])
async def test_an_ended_job_takes_no_more_orders(tmp_path: Path, verb: str) -> None:
    async with coordinating(tmp_path) as coordinator:
        job = await coordinator.submit(echo_job(rounds=1))
        await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id=job.job_id))
        request = getattr(control_pb2, f"{verb}Request")(job_id=job.job_id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(coordinator.control, verb)(request)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
