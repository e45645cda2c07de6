"""Uploads of planned rounds: what was not asked for is refused, the rest is one step of AdamW, and rates follow who sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fleetune.coordinator.history import reader
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.v1 import blob_pb2, fleet_pb2, messages_pb2
from support import planned_agent
from support.coordinating import Coordinator, committed, coordinating
from support.echo_agent import ANSWER_S, chunks, values
from support.planned_agent import NAMES, VALUES, PlannedAgent, file_of

ONES = np.ones(VALUES, np.float32)


@pytest.fixture(autouse=True)
def _hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_agent.hosted(monkeypatch)


async def training(coordinator: Coordinator, agents: Sequence[PlannedAgent], toml: str) -> tuple[LiveJob, list[messages_pb2.Task]]:
    """A job whose first round has measured all agents, and each agent's train task."""
    job = await coordinator.submit(toml)
    for agent in agents:
        await agent.answer(await agent.next_task())
    return job, [await agent.next_task() for agent in agents]


@pytest.mark.parametrize(
    ("names", "kind", "complaint"),
    [
        (NAMES[:2], "gradient", "'layer.2.weight', which is not of its blocks (layer.3)"),
        (NAMES[1:], "gradient", "which are not of its blocks (layer.3)"),
        (NAMES[:1], "delta", "holds deltas; gradients are asked for"),
        (NAMES[:1], "state", "holds states; gradients are asked for"),
    ],
    ids=["another block too", "other blocks", "a delta", "a state"],
)
async def test_what_was_not_asked_for_is_refused_and_named(tmp_path: Path, names: Sequence[str], kind: str, complaint: str) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "abcd"]
        job, tasks = await training(coordinator, agents, planned_agent.job(tmp_path, rounds=1, minimum=4))
        entry = job.machine.round
        assert entry is not None
        assert entry.plan is not None
        first = next(part.device_id for part in entry.plan.parts if part.depths == (1,))
        agent, task = next(pair for pair in zip(agents, tasks, strict=True) if pair[0].device_id == first)
        receipt = await agent.upload(task, file_of([(name, ONES) for name in names], **{"fleetune.update": kind}))
        assert receipt.status == messages_pb2.RECEIPT_STATUS_REFUSED
        assert complaint in receipt.reason
        failure = job.machine.last_failure
        assert failure is not None
        assert (failure.kind, failure.stage) == ("model", "upload")


async def test_an_update_that_lacks_a_part_of_its_blocks_is_refused(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, PlannedAgent(coordinator.address, "a") as agent:
        toml = planned_agent.job(tmp_path, rounds=1, method='layout = "single"')
        _, (task,) = await training(coordinator, [agent], toml)
        receipt = await agent.upload(task, file_of([(name, ONES) for name in NAMES[1:]], **{"fleetune.update": "gradient"}))
        assert receipt.status == messages_pb2.RECEIPT_STATUS_REFUSED
        assert "lacks 'layer.3.weight' of its blocks (layer.3, layer.2, layer.1, layer.0)" in receipt.reason


async def test_rounds_of_gradients_are_steps_of_adamw(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        for name in "abcd":
            (await stack.enter_async_context(PlannedAgent(coordinator.address, name))).serve()
        job = await coordinator.ended(await coordinator.submit(planned_agent.job(tmp_path, rounds=3, minimum=4)))
        assert job.machine.status == "completed", job.machine.message
        assert job.machine.optimizer is not None
        entry = committed(job, 3)
        assert entry.update_norm == pytest.approx(np.sqrt(4 * VALUES))
        assert all(task.update is not None and task.update.kind == "gradient" for task in entry.trained())
        assert all(task.update is not None and task.update.ready_s > 0 and task.update.sent_s >= 0 for task in entry.trained())
        assert entry.state is not None
        # The same gradient each time: every step is as long as the rate, 0.001.
        np.testing.assert_allclose(values(coordinator.engine.blobs.path(entry.state.digest).read_bytes()), -0.003, rtol=1e-5)
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


class Sending:
    """An upload that has begun and is not done."""

    def __init__(self, agent: PlannedAgent, task: messages_pb2.Task, data: bytes) -> None:
        self.agent, self.task, self.data = agent, task, data
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.done = asyncio.create_task(agent.stream(self._requests()), name="upload")

    async def _requests(self) -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(header=self.agent.header(self.task, self.data))
        yield blob_pb2.UploadRequest(chunk=chunks(self.data[:10], 0, 10)[0])
        await self.go_on.wait()
        for chunk in chunks(self.data, 10, len(self.data)):
            yield blob_pb2.UploadRequest(chunk=chunk)

    async def rate(self) -> float:
        """The next one that its agent is told."""
        told = await asyncio.wait_for(self.agent.rates.get(), ANSWER_S)
        assert told.task_id == self.task.task_id
        return told.rate.bits_per_s

    async def finished(self) -> messages_pb2.Receipt:
        self.go_on.set()
        return await asyncio.wait_for(self.done, ANSWER_S)


async def begun(agent: PlannedAgent, task: messages_pb2.Task) -> Sending:
    return Sending(agent, task, await agent.trained(task))


async def test_who_sends_gets_what_the_others_do_not_use(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name, up_bits_per_s=8e6)) for name in "abcd"]
        toml = planned_agent.job(tmp_path, rounds=1, minimum=4, method='layout = "blocks"\nresource = "airtime"')
        job, tasks = await training(coordinator, agents, toml)
        one = await begun(agents[0], tasks[0])
        assert await one.rate() == pytest.approx(8e6)
        two = await begun(agents[1], tasks[1])
        shares = [task.uplink.bits_per_s for task in tasks[:2]]
        assert await one.rate() == pytest.approx(8e6 * shares[0] / sum(shares))
        assert await two.rate() == pytest.approx(8e6 * shares[1] / sum(shares))
        # It dies in the middle of its upload, and comes back.
        two.done.cancel()
        assert await one.rate() == pytest.approx(8e6)
        again = await begun(agents[1], tasks[1])
        assert await one.rate() < 8e6
        assert await again.rate() < 8e6
        assert (await one.finished()).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        assert await again.rate() == pytest.approx(8e6)
        assert (await again.finished()).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        for agent, task in zip(agents[2:], tasks[2:], strict=True):
            await agent.answer(task)
        await coordinator.ended(job)
        assert job.machine.status == "completed"


async def test_hard_shares_are_told_with_the_task_and_stay(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(PlannedAgent(coordinator.address, name)) for name in "abcd"]
        toml = planned_agent.job(tmp_path, rounds=1, minimum=4, method='uplink_mbps = 4\nsharing = "hard"')
        job, tasks = await training(coordinator, agents, toml)
        assert sum(task.uplink.bits_per_s for task in tasks) <= 4e6 * (1 + 1e-9)
        for agent, task in zip(agents, tasks, strict=True):
            sending = await begun(agent, task)
            assert await sending.rate() == pytest.approx(task.uplink.bits_per_s)
            await sending.finished()
        await coordinator.ended(job)
        assert all(agent.rates.empty() for agent in agents)


async def test_how_long_a_task_took_is_not_told_of_one_that_was_sent_before_a_restart(tmp_path: Path) -> None:
    toml = planned_agent.job(tmp_path, rounds=1, method='layout = "single"')
    async with coordinating(tmp_path) as coordinator, PlannedAgent(coordinator.address, "a") as agent:
        _, (task,) = await training(coordinator, [agent], toml)
        data = await agent.trained(task)
    async with coordinating(tmp_path) as coordinator:
        again = PlannedAgent(coordinator.address, "a")
        await again.connect(held={task.task_id: fleet_pb2.HELD_STAGE_RUNNING})
        assert (await again.upload(task, data)).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        (job,) = coordinator.engine.jobs.values()
        await coordinator.ended(job)
        (trained,) = committed(job, 1).trained()
        assert trained.update is not None
        assert trained.update.ready_s == 0
        assert trained.update.sent_s > 0
        await again.cut()
