"""A coordinator whose state lies on a disk of a few MiB that runs full and gets room again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleetune.v1 import control_pb2, messages_pb2
from fleetune.wire import channel, digests
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DISK_MIB = 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={DISK_MIB}m".encode()) != 0:
        pytest.skip(f"mount is not permitted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        libc.umount2(os.fsencode(place), 2)


async def test_a_full_disk_refuses_uploads_by_name_and_the_job_goes_on_by_itself_once_there_is_room(small_disk: Path) -> None:
    async with coordinating(small_disk) as c, EchoAgent(c.address, "a") as a, channel.open_channel(c.address) as line:
        stub: Any = health_pb2_grpc.HealthStub(line)  # Any: grpc_health gives its stubs no methods
        uploads = stub.Watch(health_pb2.HealthCheckRequest(service="fleetune.v1.BlobService"))
        assert (await uploads.read()).status == health_pb2.HealthCheckResponse.SERVING
        job = await c.submit(echo_job(rounds=2, state_mib=1))
        task = await a.next_task()
        data = await a.trained(task)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            disk = os.statvfs(small_disk)
            file.write(bytes(disk.f_bavail * disk.f_frsize - 512 * 1024))
        assert (await uploads.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await a.upload(task, data)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not c.engine.blobs.has(digests.of_bytes(data)), "no half blob"
        assert c.spooled() == []
        view = (await c.control.GetJob(control_pb2.GetJobRequest(job_id="last"))).job
        assert view.state == control_pb2.JOB_STATE_RUNNING
        assert "is full" in view.message
        ballast.unlink()
        assert (await uploads.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await a.upload(task, data)).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        a.serve()
        await c.ended(job)
        assert job.machine.status == "completed"
        uploads.cancel()


async def test_a_disk_that_is_full_when_the_round_is_folded_holds_the_fold_up(small_disk: Path) -> None:
    async with coordinating(small_disk) as c, EchoAgent(c.address, "a") as a:
        c.engine.blobs._reserve_bytes = 0  # or the upload itself would be refused
        job = await c.submit(echo_job(rounds=1, state_mib=2))
        task = await a.next_task()
        data = await a.trained(task)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            disk = os.statvfs(small_disk)
            file.write(bytes(disk.f_bavail * disk.f_frsize - len(data) - 1024 * 1024))
        assert (await a.upload(task, data)).status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        await c.until(job, lambda job: "No space left" in c.engine.trouble)
        assert not job.ended
        ballast.unlink()
        await c.ended(job)
        assert job.machine.status == "completed"
