"""Pages of jobs: every job once, newest pages first, whatever comes and goes between two of them."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.client import Client
from fleetune.coordinator.rpc import convert, jobpages
from fleetune.v1 import control_pb2
from support.coordinating import coordinating, echo_job


@dataclass(frozen=True)
class Job:
    job_id: str
    submitted_unix_s: float
    size: int = 10


@dataclass(frozen=True)
class View:
    job: Job

    def ByteSize(self) -> int:
        return self.job.size


def paged(jobs: list[Job], size: int, bytes_max: int = 10_000) -> list[list[str]]:
    """Every page, as the ids in it."""
    found: list[list[str]] = []
    token = ""
    while True:
        views, token = jobpages.page(jobs, size, token, View, bytes_max=bytes_max)
        found.append([view.job.job_id for view in views])
        if not token:
            return found


def test_pages_go_back_in_time_and_each_has_its_oldest_first() -> None:
    jobs = [Job(f"j{number}", float(number)) for number in range(7)]
    assert paged(jobs, 3) == [["j4", "j5", "j6"], ["j1", "j2", "j3"], ["j0"]]
    assert paged(jobs, 7) == paged(jobs, 0) == paged(jobs, 2**32 - 1) == [[f"j{number}" for number in range(7)]]
    assert paged([], 3) == [[]]


def test_an_answer_is_never_larger_than_a_message_and_never_empty_before_the_end() -> None:
    jobs = [Job(f"j{number}", float(number), size) for number, size in enumerate((5, 5000, 5, 5, 5))]
    assert paged(jobs, 0, bytes_max=45) == [["j2", "j3", "j4"], ["j1"], ["j0"]]
    many = [Job(f"j{number}", float(number)) for number in range(jobpages.PAGE_MAX + 1)]
    assert [len(one) for one in paged(many, 0, bytes_max=10**9)] == [jobpages.PAGE_MAX, 1]


@given(st.lists(st.tuples(st.text("ab/é ", min_size=1, max_size=4), st.floats(0, 3)), unique=True), st.integers(0, 4), st.integers(0, 60))
def test_each_job_comes_once_also_where_many_were_submitted_at_one_time(found: list[tuple[str, float]], size: int, room: int) -> None:
    jobs = [Job(name, time_s) for name, time_s in found]
    random.shuffle(jobs)
    told = [job_id for one in reversed(paged(jobs, size, bytes_max=room)) for job_id in one]
    assert told == [job.job_id for job in sorted(jobs, key=lambda job: (job.submitted_unix_s, job.job_id))]


def test_jobs_that_come_and_go_between_two_pages_shift_nothing() -> None:
    jobs = [Job(f"j{number}", float(number)) for number in range(6)]
    _, token = jobpages.page(jobs, 2, "", View, bytes_max=1000)
    later = [*jobs[:3], *jobs[5:], Job("new", 9.0)]  # the one that the token stands for is gone, too
    views, _ = jobpages.page(later, 2, token, View, bytes_max=1000)
    assert [view.job.job_id for view in views] == ["j1", "j2"]


@pytest.mark.parametrize("token", ["x", "é", "A" * 1000, base64.urlsafe_b64encode(b"nothing").decode(), base64.b64encode(b"1.0").decode()])
def test_a_token_that_no_page_has_given_is_refused(token: str) -> None:
    with pytest.raises(jobpages.TokenError):
        jobpages.page([Job("j", 1.0)], 1, token, View, bytes_max=1000)


async def test_a_coordinator_tells_its_jobs_in_pages_and_a_client_that_knows_none_gets_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with coordinating(tmp_path) as c, Client(c.address) as client:
        ids = [(await c.submit(echo_job(name=f"job-{number}"))).job_id for number in range(7)]
        first = await c.control.ListJobs(control_pb2.ListJobsRequest(page_size=3))
        second = await c.control.ListJobs(control_pb2.ListJobsRequest(page_size=3, page_token=first.next_page_token))
        assert [job.job_id for job in (*second.jobs, *first.jobs)] == ids[1:]
        assert [job.job_id for job in await client.jobs(2)] == ids[-2:]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await c.control.ListJobs(control_pb2.ListJobsRequest(page_token="nonsense"))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        # As many as a message holds: what asks without a size, as before there were pages, is answered whatever the number of jobs.
        room = sum(job.ByteSize() + 8 for job in (await c.control.ListJobs(control_pb2.ListJobsRequest())).jobs) // 2
        monkeypatch.setattr(convert, "ANSWER_BYTES_MAX", room)
        old = await c.control.ListJobs(control_pb2.ListJobsRequest())
        assert 0 < len(old.jobs) < len(ids) and old.jobs[-1].job_id == ids[-1]
        assert [job.job_id for job in await client.jobs()] == ids
