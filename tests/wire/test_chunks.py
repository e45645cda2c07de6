"""The spool assembles exactly the declared blob, whatever the cuts, repetitions and damages on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import zlib
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import DiskFullError, WireError
from fleetune.v1 import blob_pb2
from fleetune.wire import chunks, frames
from fleetune.wire.chunks import Spool, SpoolBusyError, chunk_bytes_at, read_chunk

BLOB = bytes(range(256)) * 4


def chunk_of(blob: bytes, begin: int, end: int) -> blob_pb2.Chunk:
    data = blob[begin:end]
    return blob_pb2.Chunk(offset=begin, data=data, crc32=zlib.crc32(data))


def spool_of(path: Path, blob: bytes = BLOB) -> Spool:
    return Spool(path, blake3(blob).hexdigest(), len(blob))


@settings(deadline=None)
@given(st.data())
def test_any_cuts_repetitions_and_resumptions_give_the_blob(data: st.DataObject) -> None:
    blob = data.draw(st.binary(min_size=1, max_size=400))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closed_at_the_end:
        path = Path(folder) / "spool"
        spool = closed_at_the_end.enter_context(spool_of(path, blob))
        while not spool.complete:
            begin = data.draw(st.integers(0, spool.position))
            goes_on = data.draw(st.booleans())  # else most chunks repeat what is there, once little of the blob is missing
            end = data.draw(st.integers((spool.position if goes_on else begin) + 1, len(blob)))
            before = spool.position
            spool.add(chunk_of(blob, begin, end))
            assert spool.position == max(before, end)
            if data.draw(st.booleans()):
                spool.close()
                spool = closed_at_the_end.enter_context(spool_of(path, blob))
                assert spool.position == max(before, end)
        spool.finish(fsync=False)
        assert path.read_bytes() == blob


@settings(deadline=None)
@given(st.data())
def test_a_damaged_chunk_changes_nothing(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, spool_of(Path(folder) / "spool") as spool:
        held = data.draw(st.integers(1, len(BLOB) - 1))
        spool.add(chunk_of(BLOB, 0, held))
        begin = data.draw(st.integers(0, len(BLOB) - 1))
        chunk = chunk_of(BLOB, begin, data.draw(st.integers(begin + 1, len(BLOB))))
        damage = data.draw(st.sampled_from(["bit", "offset", "checksum", "gap", "end"]))
        if damage == "bit":
            flipped = bytearray(chunk.data)
            flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            chunk.data = bytes(flipped)
        elif damage == "checksum":
            chunk.crc32 ^= 1
        elif damage == "offset":  # right checksum, but not the bytes that were received from there before
            chunk = chunk_of(BLOB[1:] + b"x", 0, held)
        elif damage == "gap":
            chunk.offset = held + 1
        else:
            chunk.offset = len(BLOB)
        with pytest.raises(WireError):
            spool.add(chunk)
        assert spool.position == held
        spool.add(chunk_of(BLOB, held, len(BLOB)))
        spool.finish(fsync=False)
        assert (Path(folder) / "spool").read_bytes() == BLOB


def test_wrong_bytes_with_right_checksums_never_become_a_blob(tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool")
    spool.add(chunk_of(b"x" + BLOB[1:], 0, len(BLOB)))
    with pytest.raises(WireError, match="has the digest"):
        spool.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_blob_cannot_be_finished(tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool")
    spool.add(chunk_of(BLOB, 0, 5))
    with pytest.raises(WireError, match="ended at byte 5 of 1024"):
        spool.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_chunk_and_one_past_the_limit_are_refused(tmp_path: Path) -> None:
    blob = bytes(chunks.CHUNK_BYTES + chunks.TAIL_BYTES + 1)
    spool = spool_of(tmp_path / "spool", blob)
    with pytest.raises(WireError, match="A chunk of 0 bytes"):
        spool.add(chunk_of(blob, 0, 0))
    with pytest.raises(WireError, match="A chunk of 1114113 bytes"):
        spool.add(chunk_of(blob, 0, len(blob)))
    spool.discard()


def test_an_offset_beyond_every_file_is_refused(tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool")
    with pytest.raises(WireError, match="reaches byte"):
        spool.add(blob_pb2.Chunk(offset=2**64 - 1, data=b"x", crc32=zlib.crc32(b"x")))
    spool.discard()


def test_a_blob_larger_than_allowed_takes_no_file(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="declares 1099511627776 bytes; 1 to 1024 are allowed"):
        Spool(tmp_path / "spool", "0" * 64, 1 << 40, limit_bytes=1024)
    with pytest.raises(WireError, match="declares 0 bytes"):
        Spool(tmp_path / "spool", "0" * 64, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", ["", "0" * 63, "A" * 64, "../" + "0" * 61, "0" * 64 + "\n"])
def test_only_lower_case_hex_is_a_digest(tmp_path: Path, digest: str) -> None:
    with pytest.raises(WireError, match="is not a digest"):
        Spool(tmp_path / "spool", digest, 1)


def test_a_blob_larger_than_the_free_disk_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="Make room"):
        Spool(tmp_path / "spool", "0" * 64, 1 << 60)
    with pytest.raises(DiskFullError, match="in reserve"):
        Spool(tmp_path / "spool", "0" * 64, 1, reserve_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_was_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = spool_of(tmp_path / "spool")
    spool.add(chunk_of(BLOB, 0, 100))
    real = os.pwrite

    def half_then_full(fd: int, data: memoryview, offset: int) -> int:
        if offset > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", half_then_full)
    with pytest.raises(DiskFullError):
        spool.add(chunk_of(BLOB, 100, 1024))
    assert spool.position == 100
    assert (tmp_path / "spool").read_bytes() == BLOB[:100]
    monkeypatch.setattr(os, "pwrite", real)
    spool.add(chunk_of(BLOB, 100, 1024))
    spool.finish()
    assert (tmp_path / "spool").read_bytes() == BLOB


def test_a_file_longer_than_the_blob_is_started_anew(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(BLOB + b"more")
    spool = spool_of(tmp_path / "spool")
    assert spool.position == 0
    spool.discard()


def test_a_second_stream_waits_for_the_first(tmp_path: Path) -> None:
    first = spool_of(tmp_path / "spool")
    first.add(chunk_of(BLOB, 0, 10))
    with pytest.raises(SpoolBusyError):
        spool_of(tmp_path / "spool")
    first.close()
    second = spool_of(tmp_path / "spool")
    assert second.position == 10
    second.discard()
    assert list(tmp_path.iterdir()) == []


def test_closing_without_a_byte_leaves_no_file(tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool")
    spool.close()
    spool.close()
    spool.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_spool_moves_to_its_place(tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool")
    spool.add(chunk_of(BLOB, 0, len(BLOB)))
    spool.finish(move_to=tmp_path / "blob")
    spool.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_many_megabytes_arrive_whole(tmp_path: Path) -> None:
    blob = os.urandom(3 * chunks.WRITEBACK_BYTES + 12345)
    (tmp_path / "source").write_bytes(blob)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        spool = spool_of(tmp_path / "spool", blob)
        while not spool.complete:
            spool.add(read_chunk(fd, spool.position, len(blob)))
        spool.finish()
    finally:
        os.close(fd)
    assert (tmp_path / "spool").read_bytes() == blob


def test_the_last_chunk_takes_a_short_rest_with_it(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BLOB)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        assert len(read_chunk(fd, 0, 1024, 1000).data) == 1024
        assert len(read_chunk(fd, 0, 1024, 900).data) == 900
    finally:
        os.close(fd)


def test_a_chunk_ends_where_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BLOB)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        assert read_chunk(fd, 1000, 1024, 100) == frames.chunk_of(1000, BLOB[1000:])
        assert read_chunk(fd, 0, 1024, 100) == frames.chunk_of(0, BLOB[:100])
        with pytest.raises(WireError, match="No chunk lies between"):
            read_chunk(fd, 1024, 1024)
        with pytest.raises(WireError, match="ends at byte 1024; byte 2000 was promised"):
            read_chunk(fd, 0, 2000)
    finally:
        os.close(fd)


def test_chunks_take_half_a_second_of_the_link() -> None:
    assert chunk_bytes_at(0) == chunks.CHUNK_BYTES
    assert chunk_bytes_at(1e9) == chunks.CHUNK_BYTES
    assert chunk_bytes_at(200_000) == 100_000
    assert chunk_bytes_at(1000) == chunks.MIN_CHUNK_BYTES
