"""A device measures its way up: what it sends is counted and thrown away, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fleetune.coordinator.principal import LOCAL, Principal
from fleetune.coordinator.rpc import blob
from fleetune.coordinator.rpc.limits import PROBES_AT_ONCE, PROBES_BURST, PROBES_PER_S, Probes
from fleetune.coordinator.rpc.streams import Readable, next_message
from fleetune.v1 import blob_pb2, blob_pb2_grpc
from fleetune.wire import channel
from support import loopclock
from support.coordinating import coordinating

PI = Principal("agent", "pi")
KIB = 1 << 10


async def probed(address: str, sizes: list[int]) -> blob_pb2.ProbeResponse:
    async def requests() -> AsyncIterator[blob_pb2.ProbeRequest]:
        for size in sizes:
            yield blob_pb2.ProbeRequest(data=bytes(size))

    async with channel.open_channel(address) as opened:
        stub: blob_pb2_grpc.BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(opened)
        return await stub.Probe(requests())


async def test_what_is_sent_is_counted_and_kept_nowhere(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        answer = await probed(coordinator.address, [64 * KIB] * 4)
        assert answer.received_bytes == 256 * KIB
        assert answer.seconds >= 0
        assert coordinator.spooled() == []
        assert (await probed(coordinator.address, [])).received_bytes == 0


@pytest.mark.parametrize(
    ("sizes", "code"),
    [([64 * KIB + 1], grpc.StatusCode.INVALID_ARGUMENT), ([64 * KIB] * 65, grpc.StatusCode.RESOURCE_EXHAUSTED)],
    ids=["a large message", "too much"],
)
async def test_more_than_is_needed_is_refused(tmp_path: Path, sizes: list[int], code: grpc.StatusCode) -> None:
    async with coordinating(tmp_path) as coordinator:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await probed(coordinator.address, sizes)
        assert caught.value.code() == code


async def test_a_link_that_stands_still_is_told_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = asyncio.Event()

    async def noted(context: Readable, within_s: float, kind: type[blob_pb2.ProbeRequest]) -> blob_pb2.ProbeRequest | None:
        message = await next_message(context, within_s, kind)
        came.set()
        return message

    monkeypatch.setattr(blob, "next_message", noted)
    async with coordinating(tmp_path) as coordinator, channel.open_channel(coordinator.address) as opened:
        stub: blob_pb2_grpc.BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(opened)
        with loopclock.held() as clock:
            call = stub.Probe()
            await call.write(blob_pb2.ProbeRequest(data=bytes(KIB)))
            await came.wait()
            clock.forward(blob.PROBE_S + 1)
            assert (await call).received_bytes == KIB


def test_a_device_that_asks_too_often_waits_and_the_others_do_not() -> None:
    probes = Probes()
    assert [probes.objection(PI, 0.0) for _ in range(int(PROBES_BURST))] == [""] * int(PROBES_BURST)
    assert "try again later" in probes.objection(PI, 1.0)
    assert probes.objection(Principal("agent", "other"), 1.0) == ""
    assert probes.objection(PI, 1.0 + 1 / PROBES_PER_S) == ""
    assert probes.objection(PI, 1.0 + 1 / PROBES_PER_S) != ""


def test_no_more_than_a_few_devices_measure_at_once() -> None:
    probes = Probes()
    probes.open = PROBES_AT_ONCE
    assert "measuring their links" in probes.objection(LOCAL, 0.0)
    probes.open -= 1
    assert all(probes.objection(LOCAL, 0.0) == "" for _ in range(100))
