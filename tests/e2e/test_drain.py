"""SIGTERM while updates are on their way, and a log that cannot be written: what was begun is ended, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleetune.v1 import blob_pb2, control_pb2, control_pb2_grpc, messages_pb2
from fleetune.wire import channel
from support.coordinating import echo_job
from support.echo_agent import EchoAgent, chunks
from support.ports import HeldPort

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

READY_S = 180.0
RESTARTS = 2


@dataclass
class Served:
    process: asyncio.subprocess.Process
    address: str


@asynccontextmanager
async def serving(state_dir: Path, listen: str, stderr: Path | None = None) -> AsyncGenerator[Served]:
    """A coordinator in plaintext that is ready; it must have ended by itself or by the test when this is left, or it is killed."""
    address = state_dir / "address"
    address.unlink(missing_ok=True)
    words = ["-m", "fleetune.coordinator.cli", "serve", "--plaintext", "--listen", listen, "--state-dir", str(state_dir)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    with (stderr or state_dir.with_suffix(".log")).open("ab") as log:
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=log, stdout=log, env=environment)
    try:
        while not address.exists():
            assert process.returncode is None
            await asyncio.sleep(0.02)
        yield Served(process, address.read_text().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def submitted(address: str, toml: str, submit_id: str) -> str:
    async with channel.open_channel(address) as opened:
        request = control_pb2.SubmitJobRequest(job_toml=toml, submit_id=submit_id)
        return (await control_pb2_grpc.ControlServiceStub(opened).SubmitJob(request)).job_id


async def completed(address: str) -> control_pb2.JobView:
    """The newest job, once it is completed."""
    async with channel.open_channel(address) as opened:
        control = control_pb2_grpc.ControlServiceStub(opened)
        while True:
            job = (await control.GetJob(control_pb2.GetJobRequest(job_id="last"))).job
            if job.state == control_pb2.JOB_STATE_COMPLETED:
                return job
            await asyncio.sleep(0.02)


async def health(address: str) -> int:
    async with channel.open_channel(address) as opened:
        stub: Any = health_pb2_grpc.HealthStub(opened)  # Any: its stubs give the class no methods
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=READY_S)).status)


async def test_uploads_under_way_end_within_the_grace_and_count_after_the_restart(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with HeldPort() as port:
        for number in range(RESTARTS):
            await drained_and_started_again(state, port.address, number)


async def drained_and_started_again(state: Path, listen: str, number: int) -> None:
    async with serving(state, listen) as served:
        await submitted(served.address, echo_job(rounds=1, minimum=2, state_mib=0.5), f"the-drained-job-{number}")
        async with EchoAgent(served.address, "a") as a, EchoAgent(served.address, "b") as b:
            tasks = [await agent.next_task() for agent in (a, b)]
            updates = [await agent.trained(task) for agent, task in zip((a, b), tasks, strict=True)]

            async def slowly(agent: EchoAgent, task: messages_pb2.Task, data: bytes, told: asyncio.Event) -> messages_pb2.Receipt:
                async def requests() -> AsyncIterator[blob_pb2.UploadRequest]:
                    yield blob_pb2.UploadRequest(header=agent.header(task, data))
                    first, *rest = chunks(data, 0, len(data))
                    yield blob_pb2.UploadRequest(chunk=first)
                    told.set()
                    await asyncio.wait_for(agent.draining.wait(), READY_S)
                    for chunk in rest:
                        yield blob_pb2.UploadRequest(chunk=chunk)

                return await agent.stream(requests())

            begun = asyncio.Event(), asyncio.Event()
            uploads = [
                asyncio.create_task(slowly(agent, task, data, told))
                for agent, task, data, told in zip((a, b), tasks, updates, begun, strict=True)
            ]
            await asyncio.gather(*(told.wait() for told in begun))
            # The coordinator has the first bytes of both: their status says so.
            for agent, task, data in zip((a, b), tasks, updates, strict=True):
                while not (await agent.status(task, data)).offset:  # noqa: ASYNC110  # written by a thread of the other process
                    await asyncio.sleep(0.01)
            served.process.send_signal(signal.SIGTERM)
            receipts = await asyncio.gather(*uploads)
            assert [receipt.status for receipt in receipts] == [messages_pb2.RECEIPT_STATUS_ACCEPTED] * 2
        assert await asyncio.wait_for(served.process.wait(), READY_S) == 0
    async with serving(state, listen) as served:
        job = await completed(served.address)
        # Both acknowledged updates, and nobody had to send or train anything again.
        assert (job.rounds_committed, job.history[0].updates_folded) == (1, 2)
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(served.process.wait(), READY_S) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
async def test_a_log_on_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    async with serving(state, "127.0.0.1:0", stderr=Path("/dev/full")) as served:
        job_id = await submitted(served.address, echo_job(rounds=3), "the-job-nobody-reads-of")
        async with EchoAgent(served.address, "a") as a:
            a.serve()
            assert (await completed(served.address)).job_id == job_id
        assert await health(served.address) == health_pb2.HealthCheckResponse.SERVING
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(served.process.wait(), READY_S) == 0
