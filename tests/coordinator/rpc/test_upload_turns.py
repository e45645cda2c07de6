"""An upload hears when its turn comes, and not before: until then its device keeps the chunks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc.aio
import pytest

from fleetune.coordinator.rpc import blob
from fleetune.v1 import blob_pb2, blob_pb2_grpc, messages_pb2
from fleetune.wire import channel
from fleetune.wire.identity import Identity
from support.coordinating import WAIT_S, Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent, chunks
from support.secured import DEVICE, secured


class CertifiedAgent(EchoAgent):
    identity: Identity

    def open(self) -> grpc.aio.Channel:
        return channel.open_channel(self.address, self.identity)


@contextlib.asynccontextmanager
async def one_place(folder: Path, *, tls: bool) -> AsyncGenerator[tuple[Coordinator, EchoAgent]]:
    """A coordinator that moves one blob at a time, and a device of its own."""
    if not tls:
        async with coordinating(folder, transfers_at_once=1) as coordinator:
            async with EchoAgent(coordinator.address, "a") as agent:
                yield coordinator, agent
        return
    async with secured(folder, transfers_at_once=1) as fleet:
        certified = CertifiedAgent(fleet.coordinator.address, "a", device_id=DEVICE)
        certified.identity = await fleet.join(await fleet.token(), "a")
        async with certified:
            yield fleet.coordinator, certified


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
async def test_an_upload_is_told_its_turn_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    monkeypatch.setattr(blob, "QUICK_S", 3600.0)
    async with one_place(tmp_path, tls=tls) as (coordinator, agent):
        job = await coordinator.submit(echo_job(rounds=1))
        task = await agent.next_task()
        data = await agent.trained(task)
        header = agent.header(task, data)
        turns = coordinator.blob_service.transfers
        async with agent.open() as opened:
            stub: blob_pb2_grpc.BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(opened)
            async with turns.one():
                call = stub.Upload(timeout=WAIT_S)
                await call.write(blob_pb2.UploadRequest(header=header))
                told = asyncio.ensure_future(call.initial_metadata())
                while not turns.waiting:  # noqa: ASYNC110  # a plain count: whoever waits tells nobody
                    await asyncio.sleep(0.001)
                # On the same connection, hence behind whatever the upload has been told.
                request = blob_pb2.UploadStatusRequest(device_id=agent.device_id, task_id=task.task_id, blob=header.blob)
                assert (await stub.UploadStatus(request, timeout=WAIT_S)).offset == 0
                assert not told.done()
            await asyncio.wait_for(told, WAIT_S)
            for chunk in chunks(data, 0, len(data)):
                await call.write(blob_pb2.UploadRequest(chunk=chunk))
            await call.done_writing()
            assert (await call).receipt.status == messages_pb2.RECEIPT_STATUS_ACCEPTED
        await coordinator.ended(job)
