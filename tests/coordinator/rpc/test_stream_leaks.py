"""Streams that are opened and dropped in their thousands leave no handler, no task and no descriptor behind on either side."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc.aio
import pytest
from sqlalchemy import text

from fleetune.v1 import blob_pb2, blob_pb2_grpc, control_pb2, control_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from fleetune.wire import channel
from support.coordinating import WAIT_S, Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent

STREAMS = 1000
"""Of each of three kinds."""

AT_ONCE = 50
RECONNECTS = 200
DESCRIPTORS_SLACK = 5


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def held(c: Coordinator, tasks: int, files: int) -> tuple[int, int, int]:
    """Sessions, tasks and descriptors, once they are no more than these (and no session) or the wait is over."""
    deadline_s = asyncio.get_running_loop().time() + WAIT_S
    while True:
        now = len(c.fleet.lines), len(asyncio.all_tasks()), descriptors()
        if (now[0] == 0 and now[1] <= tasks and now[2] <= files) or asyncio.get_running_loop().time() > deadline_s:
            return now
        await asyncio.sleep(0.02)


async def session(opened: grpc.aio.Channel, number: int) -> None:
    """A stream that says Hello, and is dropped at once."""
    call = fleet_pb2_grpc.FleetServiceStub(opened).Session()
    try:
        if number % 2:
            name = f"dropped-{number % AT_ONCE}"
            hello = fleet_pb2.Hello(
                protocol_major=channel.PROTOCOL_MAJOR, device_id=f"device-{name}", device_name=name, instance_id=name, methods=["echo"]
            )
            await call.write(fleet_pb2.SessionRequest(hello=hello))
            await call.read()
    finally:
        call.cancel()


async def watch(opened: grpc.aio.Channel, job_id: str) -> None:
    call = control_pb2_grpc.ControlServiceStub(opened).WatchJob(control_pb2.WatchJobRequest(job_id=job_id))
    try:
        await call.read()
    finally:
        call.cancel()


async def download(opened: grpc.aio.Channel, digest: str) -> None:
    call = blob_pb2_grpc.BlobServiceStub(opened).Download(blob_pb2.DownloadRequest(digest=digest))
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):  # more at once than are served
            raise
    finally:
        call.cancel()


async def blob_of(c: Coordinator) -> tuple[str, str]:
    """A job that waits and a state of a MiB that can be fetched."""
    async with EchoAgent(c.address, "maker") as maker:
        maker.serve()
        await c.ended(await c.submit(echo_job(rounds=1, state_mib=1), "the-made-job"))
    digest = await c.engine._database.read(lambda found: found.execute(text("SELECT state_digest FROM rounds")).scalar_one())
    return (await c.submit(echo_job(rounds=1, minimum=9), "the-waiting-job")).job_id, str(digest)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_three_thousand_dropped_streams_leave_nothing_behind(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c:
        job_id, digest = await blob_of(c)
        opened = channel.open_channel(c.address)
        await session(opened, 1)
        await held(c, sys.maxsize, sys.maxsize)
        tasks, files = len(asyncio.all_tasks()), descriptors() + DESCRIPTORS_SLACK
        for first in range(0, STREAMS, AT_ONCE):
            numbers = range(first, first + AT_ONCE)
            await asyncio.gather(*(session(opened, number) for number in numbers))
            await asyncio.gather(*(watch(opened, job_id) for _ in numbers))
            await asyncio.gather(*(download(opened, digest) for _ in numbers))
        sessions, after, open_files = await held(c, tasks, files)
        assert sessions == 0
        assert after <= tasks, sorted(task.get_name() for task in asyncio.all_tasks())
        assert open_files <= files
        await opened.close()


async def test_two_hundred_reconnects_leave_nothing_behind(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as c:
        agent = EchoAgent(c.address, "comes-and-goes")
        for _ in range(3):
            await agent.connect()
            await agent.cut()
        await held(c, sys.maxsize, sys.maxsize)
        tasks, files = len(asyncio.all_tasks()), descriptors() + DESCRIPTORS_SLACK
        for _ in range(RECONNECTS):
            await agent.connect()
            await agent.cut()
        sessions, after, open_files = await held(c, tasks, files)
        assert sessions == 0
        assert after <= tasks, sorted(task.get_name() for task in asyncio.all_tasks())
        assert open_files <= files
