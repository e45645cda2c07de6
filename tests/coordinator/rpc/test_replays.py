"""Updates that come again and again, over restarts and other connections, and updates that belong nowhere: each counts once or never."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from fleetune.v1 import blob_pb2, fleet_pb2, messages_pb2
from support.coordinating import Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent, echoed

ACCEPTED = messages_pb2.RECEIPT_STATUS_ACCEPTED
DUPLICATE = messages_pb2.RECEIPT_STATUS_DUPLICATE
LATE = messages_pb2.RECEIPT_STATUS_LATE
REFUSED = messages_pb2.RECEIPT_STATUS_REFUSED

REPLAYS = 125
"""On each of two connections, before each of three restarts and after the last: a thousand."""


async def replayed(agent: EchoAgent, task: messages_pb2.Task, data: bytes, header: blob_pb2.UploadHeader) -> list[int]:
    """The answers to the same update, as often as said."""
    return [(await agent.upload(task, data, header=header)).status for _ in range(REPLAYS)]


async def rows(coordinator: Coordinator, question: str) -> list[tuple[object, ...]]:
    return await coordinator.engine._database.read(lambda c: [tuple(row) for row in c.execute(text(question))])


@pytest.mark.timeout(600)
async def test_an_update_that_is_sent_a_thousand_times_over_three_restarts_counts_once(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job = await c.submit(echo_job(rounds=1, minimum=2), "the-replayed-job")
        task = await a.next_task()
        await b.next_task()
        data = await a.trained(task)
        header = a.header(task, data)
        assert (await a.upload(task, data, header=header)).status == ACCEPTED
        job_id = job.job_id
        told = await replayed(a, task, data, header)
    for last in (False, False, True):
        # The other connection says who it is as well as the first one does.
        async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "again") as again:
            told += await replayed(again, task, data, header)
            told += await replayed(a, task, data, header)
            other = await a.upload(task, echoed(data, 5))
            assert (other.status, "received before" in other.reason) == (REFUSED, True)
            if last:
                told += await replayed(again, task, data, header)
                async with EchoAgent(c.address, "b") as b:
                    b.serve()
                    job = await c.ended(c.engine.jobs[job_id])
                assert job.machine.status == "completed"
            assert await rows(c, "SELECT status FROM updates WHERE device_id = 'device-a'") == [("accepted",)]
            assert await rows(c, "SELECT updates_accepted FROM devices WHERE name = 'a'") == [(1,)]
            assert await rows(c, "SELECT count(*) FROM events WHERE kind = 'UpdateArrived' AND body LIKE '%device-a%'") == [(1,)]
            assert c.spooled() == []
    assert (len(told), set(told)) == (8 * REPLAYS, {DUPLICATE})


async def test_an_update_for_what_is_not_open_is_answered_and_never_counts(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        job = await c.submit(echo_job(rounds=2), "the-stale-job")
        first = await a.next_task()
        data = await a.trained(first)
        assert (await a.upload(first, data)).status == ACCEPTED
        second = await a.next_task()
        wrong = {
            "a task that never was": a.header(second, data, task_id=second.task_id.replace("/2/", "/7/")),
            "a job that never was": a.header(second, data, task_id=f"no-{second.task_id}"),
            "another device": a.header(second, data, device_id="device-nobody"),
            "another run of the coordinator": a.header(second, data, epoch=7),
        }
        for what, header in wrong.items():
            receipt = await a.upload(second, data, header=header)
            assert (what, receipt.status) == (what, REFUSED)
            assert receipt.reason, what
        # The round before, with other bytes than those that counted.
        stale = await a.upload(first, echoed(data, 3))
        assert stale.status in (REFUSED, LATE)
        # None of that has touched the open round.
        assert (await a.upload(second, await a.trained(second))).status == ACCEPTED
        await c.ended(job)
        assert job.machine.status == "completed"
        assert await rows(c, "SELECT count(*) FROM updates WHERE status = 'accepted'") == [(2,)]
        assert c.spooled() == []


async def test_what_comes_under_a_lease_that_was_never_given_is_refused_and_the_task_stays_open(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a:
        job = await c.submit(echo_job(rounds=2), "the-job-of-leases")
        first = await a.next_task()
        data = await a.trained(first)
        for lease in (first.lease + 1, 2**64 - 1):
            receipt = await a.upload(first, data, header=a.header(first, data, lease=lease))
            assert (receipt.status, receipt.lease) == (REFUSED, lease)
            assert f"lease {lease} was never given out, the newest is {first.lease}" in receipt.reason
            failure = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_INTERNAL, message="no")
            await a.say(outcome=fleet_pb2.TaskOutcome(task_id=first.task_id, lease=lease, epoch=1, failure=failure))
            receipt = await a.next_receipt()
            assert (receipt.status, receipt.lease) == (REFUSED, lease)
        assert c.spooled() == []
        assert (await a.upload(first, data)).status == ACCEPTED
        # Of a round that is over: the newest lease of the job counts, and one after it is refused like any other.
        second = await a.next_task()
        late = await a.upload(first, data, header=a.header(first, data, lease=second.lease + 1))
        assert late.status == REFUSED
        assert (await a.upload(second, await a.trained(second))).status == ACCEPTED
        await c.ended(job)
        assert await rows(c, "SELECT count(*) FROM updates WHERE status = 'accepted'") == [(2,)]
        assert await rows(c, "SELECT failures FROM devices WHERE name = 'a'") == [(0,)]


async def test_the_result_of_an_older_lease_still_counts_once(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c:
        async with EchoAgent(c.address, "a") as a:
            job = await c.submit(echo_job(rounds=1), "the-job-of-an-old-lease")
            first = await a.next_task()
            data = await a.trained(first)
        # It says that it holds nothing, so the task comes again under a new lease; what was done under the old one is as good.
        async with EchoAgent(c.address, "a", instance_id="run-1") as a:
            again = await a.next_task()
            assert (again.task_id, again.lease > first.lease) == (first.task_id, True)
            assert (await a.upload(again, data, header=a.header(again, data, lease=first.lease))).status == ACCEPTED
            assert (await a.upload(again, data)).status in (DUPLICATE, LATE)
            await c.ended(job)
        assert await rows(c, "SELECT count(*) FROM updates") == [(1,)]
