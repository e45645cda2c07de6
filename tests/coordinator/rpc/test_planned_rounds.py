"""Planned rounds through the real coordinator: devices are measured, a plan is made of it, and only its parts are trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

import pytest

from fleetune.coordinator.history import reader
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import convert
from fleetune.v1 import control_pb2, fleet_pb2, messages_pb2
from support import planned_agent
from support.coordinating import committed, coordinating
from support.planned_agent import PlannedAgent

ACCEPTED = messages_pb2.RECEIPT_STATUS_ACCEPTED


@pytest.fixture(autouse=True)
def _hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_agent.hosted(monkeypatch)


async def test_devices_are_measured_once_and_each_trains_one_block(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [PlannedAgent(coordinator.address, name) for name in "abcde"]
        for agent in agents:
            (await stack.enter_async_context(agent)).serve()
        job = await coordinator.ended(await coordinator.submit(planned_agent.job(tmp_path, rounds=3, minimum=5)))
        assert job.machine.status == "completed", job.machine.message
        assert [agent.measured for agent in agents] == [1] * 5
        for number in (1, 2, 3):
            entry = committed(job, number)
            assert entry.plan is not None
            assert [part.depths for part in entry.plan.parts] == [(1,), (2,), (3,), (4,)]
            assert len(entry.trained()) == 4
            assert len(entry.plan.idle_devices) == 1
            assert all(task.update is not None and task.update.figures is None for task in entry.trained())
        depths = sorted(depths for agent in agents for depths in agent.trained_depths)
        assert depths == sorted([(1,), (2,), (3,), (4,)] * 3)
        assert not job.machine.held
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


async def test_tasks_carry_the_rate_of_the_plan(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "abcd"]
        method = 'layout = "blocks"\nresource = "airtime"'
        job = await coordinator.submit(planned_agent.job(tmp_path, rounds=1, minimum=4, method=method))
        await measured(agents)
        tasks = [await agent.next_task() for agent in agents]
        assert all(task.kind == messages_pb2.TASK_KIND_TRAIN for task in tasks)
        entry = job.machine.round
        assert entry is not None
        assert entry.plan is not None
        for agent, task in zip(agents, tasks, strict=True):
            part = entry.plan.part_of(agent.device_id)
            assert part is not None
            assert task.uplink.bits_per_s == part.uplink_bits_per_s > 0
        for agent, task in zip(agents, tasks, strict=True):
            await agent.answer(task)
        await coordinator.ended(job)


async def test_a_fleet_that_holds_no_block_waits_and_says_why(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [PlannedAgent(coordinator.address, name, room_bytes=1050) for name in "ab"]
        for agent in agents:
            (await stack.enter_async_context(agent)).serve()
        job = await coordinator.submit(planned_agent.job(tmp_path, minimum=2))
        await coordinator.until(job, lambda job: "memory" in job.machine.message)
        assert job.machine.status == "waiting"
        assert "needs 1.1 KiB of the 1.0 KiB" in job.machine.message
        assert "comes nearest" in job.machine.message
        roomy = PlannedAgent(coordinator.address, "c")
        (await stack.enter_async_context(roomy)).serve()
        await coordinator.until(job, lambda job: job.machine.committed > 0)


def is_training(job: LiveJob) -> bool:
    return job.machine.round is not None and job.machine.round.phase == "training"


def parts(job: LiveJob) -> dict[str, tuple[int, ...]]:
    """Device name -> what it trains in the open round."""
    entry = job.machine.round
    assert entry is not None
    assert entry.plan is not None
    return {part.device_id.removeprefix("device-"): part.depths for part in entry.plan.parts}


async def measured(agents: Iterable[PlannedAgent]) -> None:
    """Answer the measure task that each of them has."""
    for agent in agents:
        task = await agent.next_task()
        assert task.kind == messages_pb2.TASK_KIND_MEASURE
        assert (await agent.answer(task)).status == ACCEPTED


async def test_an_idle_device_takes_over_from_one_that_fails(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = {name: await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "abcde"}
        job = await coordinator.submit(planned_agent.job(tmp_path, rounds=1, minimum=5))
        await measured(agents.values())
        await coordinator.until(job, is_training)
        before = parts(job)
        (idle,) = set(agents) - set(before)
        broken = min(before)
        task = await agents[broken].next_task()
        failure = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_CRASH, stage="train", message="gone")
        await agents[broken].say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, failure=failure))
        for name in set(agents) - {broken}:
            await agents[name].answer(await agents[name].next_task())
        await coordinator.ended(job)
        assert agents[idle].trained_depths == [before[broken]]
        assert committed(job, 1).plan is not None
        entry = committed(job, 1)
        assert {task.device_name for task in entry.trained()} == set(agents) - {broken}
        assert job.machine.depth_rounds == [1, 1, 1, 1]
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


async def test_who_is_measured_beside_a_round_is_told_with_how_far_it_is(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "ab"]
        job = await coordinator.submit(planned_agent.job(tmp_path, rounds=2, minimum=2))
        await measured(agents)
        await coordinator.until(job, is_training)
        late = await stack.enter_async_context(PlannedAgent(coordinator.address, "late"))
        task = await late.next_task()
        await late.say(heartbeat=fleet_pb2.Heartbeat(sequence=1, task_id=task.task_id))
        stage = fleet_pb2.TASK_STAGE_MEASURING
        await late.say(progress=fleet_pb2.TaskProgress(task_id=task.task_id, lease=task.lease, stage=stage, done=2, total=5))
        await coordinator.until(job, lambda job: task.task_id in job.progress and job.progress[task.task_id].done == 2)
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=job.job_id))).job
        assert [(one.device_name, one.stage, one.done, one.total) for one in view.newcomers] == [("late", stage, 2, 5)]
        assert {one.device_name for one in view.current.tasks} == {"a", "b"}, "nobody waits for it"
        devices = (await coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        (own,) = (device.task for device in devices if device.name == "late")
        assert (own.kind, own.stage, own.done) == (messages_pb2.TASK_KIND_MEASURE, stage, 2)


async def test_a_coordinator_that_is_killed_while_devices_measure_goes_on_with_them(tmp_path: Path) -> None:
    toml = planned_agent.job(tmp_path, rounds=1, minimum=4)
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "abcd"]
        job = await coordinator.submit(toml)
        await measured(agents[:2])
        await coordinator.until(job, lambda job: len(job.machine.figures) == 2)
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        (job,) = coordinator.engine.jobs.values()
        assert len(job.machine.figures) == 2
        again = [PlannedAgent(coordinator.address, name) for name in "abcd"]
        for agent in again:
            (await stack.enter_async_context(agent)).serve()
        await coordinator.ended(job)
        assert job.machine.status == "completed", job.machine.message
        assert [agent.measured for agent in again] == [0, 0, 1, 1]
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


async def test_figures_that_no_machine_has_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        wild = PlannedAgent(coordinator.address, "wild", step_s=(1.0, math.nan, 1.0, 1.0))
        other = PlannedAgent(coordinator.address, "other", step_s=(1.0, 2.0), step_bytes=(1, 2))
        sound = [PlannedAgent(coordinator.address, name) for name in "ab"]
        for agent in (wild, other, *sound):
            (await stack.enter_async_context(agent)).serve()
        job = await coordinator.ended(await coordinator.submit(planned_agent.job(tmp_path, rounds=1, minimum=2)))
        assert job.machine.status == "completed"
        assert {task.device_name for task in committed(job, 1).trained()} == {"a", "b"}
        assert "no times and sizes" in job.machine.excluded["device-wild"]
        assert "the model has 4 depths" in job.machine.excluded["device-other"]


async def test_links_come_with_the_greeting_and_with_heartbeats_and_are_shown(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agent = await stack.enter_async_context(PlannedAgent(coordinator.address, "a", up_bits_per_s=8e6))
        session = coordinator.engine.registry.sessions[agent.device_id]
        assert session.link.up_bits_per_s == 8e6
        newer = messages_pb2.Link(up_bits_per_s=4e6, down_bits_per_s=math.inf, source="measured", age_s=3.0)
        await agent.say(heartbeat=fleet_pb2.Heartbeat(sequence=1, link=newer))
        await agent.say(heartbeat=fleet_pb2.Heartbeat(sequence=2))
        agent.serve()
        await coordinator.ended(await coordinator.submit(planned_agent.job(tmp_path, rounds=1)))
        assert session.link.up_bits_per_s == 4e6, "a heartbeat that tells nothing of it takes nothing back"
        (view,) = (await coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert view.link.up_bits_per_s == 4e6
        assert view.link.down_bits_per_s == convert.RATE_MAX
        assert view.link.source == "measured"
        assert list(view.figures.step_s) == [0.001, 0.002, 0.003, 0.004]


async def test_what_was_planned_and_what_came_of_it_is_told(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        for name in "abcd":
            (await stack.enter_async_context(PlannedAgent(coordinator.address, name))).serve()
        method = 'layout = "auto"\nuplink_mbps = 100.0'
        job = await coordinator.ended(await coordinator.submit(planned_agent.job(tmp_path, rounds=2, minimum=4, method=method)))
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=job.job_id))).job
        assert list(view.blocks) == ["layer.3", "layer.2", "layer.1", "layer.0"]
        for item in view.history:
            assert [one.layout for one in item.plan.predictions] == ["single", "data-parallel", "blocks", "depth"]
            assert item.plan.share_unit == "bit/s"
            trained = [task for task in item.tasks if task.HasField("plan")]
            assert trained
            assert all(task.kind == messages_pb2.TASK_KIND_TRAIN for task in trained)
        assert job.predicted_round is not None
        assert job.predicted_round[0] == 2
