"""Bulk transfers against a real gRPC server that cuts, damages and refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from blake3 import blake3

from fleetune.agent.bulk import STRANGE_TRIES_MAX, TransferError
from fleetune.agent.domain import Blob, FailureKind, Receipt, ReceiptStatus, Update
from fleetune.agent.downlink import Downlink
from fleetune.agent.links import Line
from fleetune.agent.uplink import Uplink
from fleetune.errors import DiskFullError
from fleetune.v1 import messages_pb2
from fleetune.wire import channel
from support.fake_coordinator import CHUNK_BYTES, FakeCoordinator


@dataclass
class Heard:
    """What the uplink told."""

    receipts: asyncio.Queue[Receipt] = field(default_factory=asyncio.Queue[Receipt])
    failures: asyncio.Queue[tuple[str, FailureKind, str]] = field(default_factory=asyncio.Queue[tuple[str, FailureKind, str]])


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    await fake.start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture
async def bulk(coordinator: FakeCoordinator) -> AsyncIterator[Line]:
    opened = Line(lambda: channel.open_channel(coordinator.address))
    yield opened
    await opened.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def uplink(bulk: Line, heard: Heard) -> AsyncIterator[Uplink]:
    made = Uplink(
        bulk,
        "device",
        heard.receipts.put_nowait,
        lambda update, kind, message: heard.failures.put_nowait((update.task_id, kind, message)),
        lambda update, sent, total: None,
    )
    made.chunk_bytes = CHUNK_BYTES
    yield made
    await made.close()


@pytest_asyncio.fixture
async def downlink(bulk: Line) -> AsyncIterator[Downlink]:
    made = Downlink(bulk)
    yield made
    made.close()


def an_update(folder: Path, size_bytes: int = 10 * CHUNK_BYTES + 7, task_id: str = "t1") -> tuple[Update, Path, bytes]:
    data = os.urandom(size_bytes)
    path = folder / f"{task_id}.safetensors"
    path.write_bytes(data)
    report = messages_pb2.UpdateReport(samples=3).SerializeToString()
    return Update(task_id, 2, 1, Blob(blake3(data).hexdigest(), size_bytes), path.name, report), path, data


async def soon(queue: asyncio.Queue[Receipt]) -> Receipt:
    return await asyncio.wait_for(queue.get(), 20)


@pytest.mark.parametrize("size_bytes", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 20 * CHUNK_BYTES])
async def test_a_fresh_update_goes_in_one_stream_without_a_question(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path, size_bytes: int
) -> None:
    update, path, data = an_update(tmp_path, size_bytes)
    uplink.send(update, path, fresh=True)
    assert await soon(heard.receipts) == Receipt("t1", 2, ReceiptStatus.ACCEPTED)
    received = coordinator.updates["t1"]
    assert received.data == data
    assert (received.streams, coordinator.status_asked) == (1, [])
    assert (received.header.device_id, received.header.lease, received.header.epoch) == ("device", 2, 1)
    assert received.header.report.samples == 3


async def test_a_cut_upload_goes_on_where_the_coordinator_holds_it(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    coordinator.cut_uploads = [3 * CHUNK_BYTES, 7 * CHUNK_BYTES + 5]
    update, path, data = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    await soon(heard.receipts)
    received = coordinator.updates["t1"]
    # Every byte came once: the fake takes only the next offset.
    assert received.data == data
    assert (received.streams, coordinator.status_asked) == (3, ["t1", "t1"])


async def test_an_update_found_at_start_asks_first_and_sends_only_what_is_missing(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    coordinator.cut_uploads = [4 * CHUNK_BYTES]
    update, path, data = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    await coordinator.until(lambda: bool(coordinator.updates) and not coordinator.cut_uploads)
    uplink.withdraw("t1")
    uplink.send(update, path, fresh=False)
    await soon(heard.receipts)
    assert coordinator.updates["t1"].data == data


async def test_an_update_that_was_committed_before_needs_no_bytes(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    update, path, _ = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    await soon(heard.receipts)
    uplink.send(update, path, fresh=False)
    assert await soon(heard.receipts) == Receipt("t1", 2, ReceiptStatus.DUPLICATE)
    assert coordinator.updates["t1"].streams == 1


async def test_an_answer_before_all_bytes_were_sent_is_taken(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    update, path, _ = an_update(tmp_path, 200 * CHUNK_BYTES)
    uplink.send(update, path, fresh=True)
    await soon(heard.receipts)
    uplink.send(update, path, fresh=True)
    assert (await soon(heard.receipts)).status is ReceiptStatus.DUPLICATE


async def test_an_update_waits_for_a_coordinator_that_is_away(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    await coordinator.stop()
    update, path, data = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    await asyncio.sleep(0)
    await coordinator.start()
    await soon(heard.receipts)
    assert coordinator.updates["t1"].data == data


async def test_a_status_that_will_not_change_is_reported(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    coordinator.upload_abort = (grpc.StatusCode.PERMISSION_DENIED, "this device was removed")
    update, path, _ = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    task_id, kind, message = await asyncio.wait_for(heard.failures.get(), 20)
    assert (task_id, kind) == ("t1", FailureKind.TRANSFER)
    assert "this device was removed" in message


async def test_a_file_that_is_gone_is_reported(uplink: Uplink, heard: Heard, tmp_path: Path) -> None:
    update, path, _ = an_update(tmp_path)
    path.unlink()
    uplink.send(update, path, fresh=True)
    _, kind, message = await asyncio.wait_for(heard.failures.get(), 20)
    assert kind is FailureKind.TRANSFER
    assert path.name in message


async def test_a_withdrawn_update_is_not_sent_on(coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path) -> None:
    coordinator.cut_uploads = [CHUNK_BYTES] * 3
    update, path, _ = an_update(tmp_path)
    uplink.send(update, path, fresh=True)
    await coordinator.until(lambda: bool(coordinator.updates))
    uplink.withdraw("t1")
    second, second_path, _ = an_update(tmp_path, task_id="t2")
    uplink.send(second, second_path, fresh=False)
    assert (await soon(heard.receipts)).task_id == "t2"
    assert coordinator.finished() == ["t2"]


async def test_a_blob_arrives_whole_and_under_its_name(coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path) -> None:
    data = os.urandom(5 * CHUNK_BYTES + 3)
    ref = coordinator.add_blob(data)
    heard: list[tuple[int, int]] = []
    await downlink.fetch(
        Blob(ref.digest, ref.size_bytes),
        tmp_path / "partial",
        tmp_path / "final",
        durable=True,
        on_bytes=lambda done, total: heard.append((done, total)),
    )
    assert (tmp_path / "final").read_bytes() == data
    assert not (tmp_path / "partial").exists()
    assert heard[-1] == (len(data), len(data))
    assert heard == sorted(heard)


async def test_a_cut_download_goes_on_at_its_offset(coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path) -> None:
    data = os.urandom(10 * CHUNK_BYTES)
    ref = coordinator.add_blob(data)
    coordinator.cut_downloads = [3 * CHUNK_BYTES, 7 * CHUNK_BYTES]
    await downlink.fetch(Blob(ref.digest, ref.size_bytes), tmp_path / "partial", tmp_path / "final", durable=False)
    assert (tmp_path / "final").read_bytes() == data
    offsets = [request.offset for request in coordinator.downloads]
    assert offsets == sorted(offsets)
    assert offsets[-1] > 0


async def test_a_damaged_chunk_is_asked_for_again(coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    ref = coordinator.add_blob(data)
    coordinator.damage_downloads = 1
    await downlink.fetch(Blob(ref.digest, ref.size_bytes), tmp_path / "partial", tmp_path / "final", durable=False)
    assert (tmp_path / "final").read_bytes() == data


async def test_a_blob_that_stays_damaged_is_given_up_after_a_few_tries(
    coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path
) -> None:
    ref = coordinator.add_blob(b"x" * CHUNK_BYTES)
    coordinator.damage_downloads = 1000
    with pytest.raises(TransferError, match="checksum"):
        await downlink.fetch(Blob(ref.digest, ref.size_bytes), tmp_path / "partial", tmp_path / "final", durable=False)
    assert len(coordinator.downloads) == STRANGE_TRIES_MAX
    assert not (tmp_path / "final").exists()


async def test_a_blob_that_nobody_has_is_an_error_at_once(coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="NOT_FOUND"):
        await downlink.fetch(Blob("0" * 64, 5), tmp_path / "partial", tmp_path / "final", durable=False)
    assert len(coordinator.downloads) == 1


async def test_a_blob_larger_than_the_disk_is_refused_before_a_byte_is_taken(
    coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path
) -> None:
    with pytest.raises(DiskFullError):
        await downlink.fetch(Blob("0" * 64, 1 << 60), tmp_path / "partial", tmp_path / "final", durable=False)
    assert coordinator.downloads == []


async def test_a_cancelled_download_leaves_what_it_has_for_the_next_try(
    coordinator: FakeCoordinator, downlink: Downlink, tmp_path: Path
) -> None:
    data = os.urandom(6 * CHUNK_BYTES)
    ref = coordinator.add_blob(data)
    coordinator.cut_downloads = [3 * CHUNK_BYTES]
    blob = Blob(ref.digest, ref.size_bytes)
    fetching = asyncio.create_task(downlink.fetch(blob, tmp_path / "partial", tmp_path / "final", durable=False))
    await coordinator.until(lambda: bool(coordinator.downloads) and not coordinator.cut_downloads)
    fetching.cancel()
    await asyncio.wait([fetching])
    await downlink.fetch(blob, tmp_path / "partial", tmp_path / "final", durable=False)
    assert (tmp_path / "final").read_bytes() == data
