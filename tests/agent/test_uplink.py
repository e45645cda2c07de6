"""Bulk transfers against a real gRPC server that cuts, damages and refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from blake3 import blake3

from fleetune.agent import pacing
from fleetune.agent import uplink as uplinks
from fleetune.agent.bulk import STRANGE_TRIES_MAX, TransferError
from fleetune.agent.domain import Blob, FailureKind, Receipt, ReceiptStatus, Update
from fleetune.agent.downlink import Downlink
from fleetune.agent.links import Line
from fleetune.agent.uplink import CLEAR_BYTES, PROBE_PIECE_BYTES, Uplink
from fleetune.errors import DiskFullError
from fleetune.v1 import blob_pb2, blob_pb2_grpc, messages_pb2
from fleetune.wire import channel, chunks
from support.fake_coordinator import CHUNK_BYTES, FakeCoordinator

WAIT_S = 60.0


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
    return await asyncio.wait_for(queue.get(), WAIT_S)


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
    task_id, kind, message = await asyncio.wait_for(heard.failures.get(), WAIT_S)
    assert (task_id, kind) == ("t1", FailureKind.TRANSFER)
    assert "this device was removed" in message


async def test_a_file_that_is_gone_is_reported(uplink: Uplink, heard: Heard, tmp_path: Path) -> None:
    update, path, _ = an_update(tmp_path)
    path.unlink()
    uplink.send(update, path, fresh=True)
    _, kind, message = await asyncio.wait_for(heard.failures.get(), WAIT_S)
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


async def test_a_longer_update_keeps_its_chunks_until_its_turn(
    coordinator: FakeCoordinator, bulk: Line, heard: Heard, tmp_path: Path
) -> None:
    sent: list[int] = []
    uplink = Uplink(
        bulk, "device", heard.receipts.put_nowait, lambda update, kind, message: None, lambda update, held, total: sent.append(held)
    )
    uplink.hears_turns = True
    coordinator.turn = asyncio.Event()
    update, path, data = an_update(tmp_path, uplinks.UNASKED_BYTES + 1)
    uplink.send(update, path, fresh=True)
    await coordinator.until(lambda: "t1" in coordinator.updates)
    async with bulk.use() as opened:  # behind whatever the upload has written
        request = blob_pb2.UploadStatusRequest(device_id="device", task_id="t1", blob=coordinator.updates["t1"].header.blob)
        stub: blob_pb2_grpc.BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(opened)
        await stub.UploadStatus(request, timeout=WAIT_S)
    assert not any(sent)
    coordinator.turn.set()
    assert (await soon(heard.receipts)).status is ReceiptStatus.ACCEPTED
    assert coordinator.updates["t1"].data == data
    await uplink.close()


@pytest.mark.parametrize(("rate", "step_bytes"), [(1 << 60, 2 * uplinks.SLOW_PIECE_BYTES), (0, 2 * chunks.CHUNK_BYTES)])
async def test_an_upload_that_turns_out_slow_goes_on_in_smaller_pieces(
    coordinator: FakeCoordinator, bulk: Line, heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, step_bytes: int
) -> None:
    monkeypatch.setattr(uplinks, "SLOW_AFTER_S", -1.0)
    monkeypatch.setattr(uplinks, "SLOW_BYTES_PER_S", rate)
    sent: list[int] = []
    uplink = Uplink(
        bulk, "device", heard.receipts.put_nowait, lambda update, kind, message: None, lambda update, held, total: sent.append(held)
    )
    uplink.hears_turns = True
    coordinator.turn = asyncio.Event()
    coordinator.turn.set()
    update, path, data = an_update(tmp_path, 6 * chunks.CHUNK_BYTES)
    uplink.send(update, path, fresh=True)
    assert (await soon(heard.receipts)).status is ReceiptStatus.ACCEPTED
    assert coordinator.updates["t1"].data == data
    assert sent[-1] - sent[-2] == step_bytes
    await uplink.close()


async def test_an_update_that_waits_for_its_turn_hears_that_it_is_known(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    uplink.hears_turns = True
    update, path, _ = an_update(tmp_path, uplinks.UNASKED_BYTES + 1)
    for status in (ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE):
        uplink.send(update, path, fresh=True)
        if status is ReceiptStatus.ACCEPTED:
            coordinator.turn = asyncio.Event()
            coordinator.turn.set()
        assert (await soon(heard.receipts)).status is status


async def test_an_update_that_is_refused_before_its_turn_hears_why(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    uplink.hears_turns = True
    coordinator.upload_abort = (grpc.StatusCode.INVALID_ARGUMENT, "not like this")
    update, path, _ = an_update(tmp_path, uplinks.UNASKED_BYTES + 1)
    uplink.send(update, path, fresh=True)
    _, kind, message = await asyncio.wait_for(heard.failures.get(), WAIT_S)
    assert (kind, "not like this" in message) == (FailureKind.TRANSFER, True)


async def test_a_paced_update_goes_in_pieces_at_its_rate(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path
) -> None:
    slept: list[float] = []

    class Patient(pacing.Pace):
        async def admit(self, size_bytes: int) -> None:
            assert size_bytes <= pacing.PIECE_BYTES_MAX + 128
            slept.append(self.bucket.wait_s(size_bytes))
            self.bucket.take(size_bytes)

    update, path, data = an_update(tmp_path, 2 * CHUNK_BYTES)
    uplink.set_rate("t1", 8e6)
    patient = uplink._paces["t1"] = Patient(8e6)  # pyright: ignore[reportPrivateUsage]  # which does not wait
    patient.bucket = pacing.TokenBucket(8e6, lambda: 0.0)  # nor does time pass, however long the upload takes
    uplink.send(update, path, fresh=True)
    await soon(heard.receipts)
    assert coordinator.updates["t1"].data == data
    # Pieces of a twentieth of a second each.
    assert len(slept) == 3
    assert min(slept) > 0


async def test_a_rate_that_is_lifted_frees_an_upload_that_waits(
    coordinator: FakeCoordinator, bulk: Line, heard: Heard, tmp_path: Path
) -> None:
    begun = asyncio.Event()
    uplink = Uplink(bulk, "device", heard.receipts.put_nowait, lambda update, kind, message: None, lambda update, sent, total: begun.set())
    update, path, data = an_update(tmp_path, 4 * CHUNK_BYTES)
    # Ten minutes for all of it.
    uplink.set_rate("t1", 8 * 4 * CHUNK_BYTES / 600)
    uplink.send(update, path, fresh=True)
    await asyncio.wait_for(begun.wait(), WAIT_S)
    uplink.set_rate("t1", 0.0)
    await soon(heard.receipts)
    await uplink.close()
    assert coordinator.updates["t1"].data == data


async def test_an_update_of_before_a_restart_keeps_to_its_rate_until_another_is_told(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    async def admit(pace: pacing.Pace, size_bytes: int) -> None:
        rates.append(8 * pace.bucket.bytes_per_s)

    monkeypatch.setattr(pacing.Pace, "admit", admit)
    kept, path, _ = an_update(tmp_path)
    uplink.send(replace(kept, uplink_bits_per_s=8e6), path, fresh=False)
    await soon(heard.receipts)
    told, path, _ = an_update(tmp_path, task_id="t2")
    uplink.set_rate("t2", 4e6)
    uplink.send(replace(told, uplink_bits_per_s=8e6), path, fresh=False)
    await soon(heard.receipts)
    assert (rates[0], rates[-1]) == (8e6, 4e6)


async def test_an_unpaced_upload_has_no_pace_at_all(
    coordinator: FakeCoordinator, uplink: Uplink, heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: object, size_bytes: int) -> None:
        raise AssertionError(f"{size_bytes} bytes were held back")

    monkeypatch.setattr(pacing.Pace, "admit", never)
    update, path, data = an_update(tmp_path)
    uplink.set_rate("t1", 0.0)
    uplink.set_rate("another", 1e6)
    uplink.send(update, path, fresh=True)
    await soon(heard.receipts)
    assert coordinator.updates["t1"].data == data


async def test_what_an_upload_shows_of_the_link_is_told(coordinator: FakeCoordinator, bulk: Line, heard: Heard, tmp_path: Path) -> None:
    samples: list[tuple[int, float, float, bool]] = []
    made = Uplink(
        bulk,
        "device",
        heard.receipts.put_nowait,
        lambda update, kind, message: None,
        lambda update, sent, total: None,
        lambda size_bytes, seconds, limit, at_least: samples.append((size_bytes, seconds, limit, at_least)),
    )
    made.chunk_bytes = CHUNK_BYTES
    long, long_path, _ = an_update(tmp_path, 10 * CHUNK_BYTES)
    made.send(long, long_path, fresh=True)
    await soon(heard.receipts)
    short, short_path, _ = an_update(tmp_path, CHUNK_BYTES, "t2")
    made.send(short, short_path, fresh=True)
    await soon(heard.receipts)
    made.set_rate("t3", 1e9)
    paced, paced_path, _ = an_update(tmp_path, 4 * CHUNK_BYTES, "t3")
    made.send(paced, paced_path, fresh=True)
    await soon(heard.receipts)
    await made.close()
    # Without the first two chunks, which may have waited for their turn.
    assert (samples[0][0], samples[0][3]) == (8 * CHUNK_BYTES, 8 * CHUNK_BYTES < CLEAR_BYTES)
    assert (samples[1][0], samples[1][3]) == (CHUNK_BYTES, True)
    assert samples[2][2] == 1e9 / 8


async def test_the_way_up_is_measured_by_the_coordinators_clock(coordinator: FakeCoordinator, uplink: Uplink) -> None:
    assert await uplink.probe() == (4 * PROBE_PIECE_BYTES, 0.5)
    assert coordinator.probed_bytes == [5 * PROBE_PIECE_BYTES]


async def test_a_coordinator_that_does_not_measure_now_says_so(coordinator: FakeCoordinator, uplink: Uplink) -> None:
    coordinator.probe_abort = (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
    with pytest.raises(grpc.aio.AioRpcError, match="too many"):
        await uplink.probe()


async def test_what_a_download_shows_of_the_link_is_told(coordinator: FakeCoordinator, bulk: Line, tmp_path: Path) -> None:
    samples: list[tuple[int, float, float, bool]] = []
    made = Downlink(bulk, on_sample=lambda size_bytes, seconds, limit, at_least: samples.append((size_bytes, seconds, limit, at_least)))
    for size_bytes in (5 * CHUNK_BYTES, CHUNK_BYTES):
        ref = coordinator.add_blob(os.urandom(size_bytes))
        await made.fetch(Blob(ref.digest, ref.size_bytes), tmp_path / "partial", tmp_path / str(size_bytes), durable=False)
    made.close()
    assert [(size, at_least) for size, _, _, at_least in samples] == [(4 * CHUNK_BYTES, False), (CHUNK_BYTES, True)]
