"""Blobs are whole and under their digest, or not there."""

from __future__ import annotations

import errno
import os
import random
import threading
import zlib
from pathlib import Path

import pytest
from blake3 import blake3

from fleetune.coordinator.store import blobs
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import DiskFullError, WireError
from fleetune.v1 import blob_pb2, messages_pb2

DATA = b"some bytes" * 100
DIGEST = blake3(DATA).hexdigest()
REF = messages_pb2.BlobRef(digest=DIGEST, size_bytes=len(DATA))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "state")


def chunk(begin: int, end: int, data: bytes = DATA) -> blob_pb2.Chunk:
    return blob_pb2.Chunk(offset=begin, data=data[begin:end], crc32=zlib.crc32(data[begin:end]))


def spooled_files(store: BlobStore) -> list[Path]:
    return list((store.root / "spool").iterdir())


def test_bytes_come_back_under_their_digest(store: BlobStore) -> None:
    assert store.put_bytes(DATA) == DIGEST
    assert store.put_bytes(DATA) == DIGEST
    store.sync()
    assert store.path(DIGEST) == store.root / "blobs" / DIGEST
    assert store.path(DIGEST).read_bytes() == DATA
    assert (store.has(DIGEST), store.size(DIGEST), store.verify(DIGEST)) == (True, len(DATA), True)
    assert list(store.digests()) == [DIGEST]
    assert spooled_files(store) == []


def test_an_upload_is_resumed_and_adopted(store: BlobStore) -> None:
    first = store.spool("job/1/dev/train", REF)
    first.add(chunk(0, 400))
    first.close()
    assert store.spooled("job/1/dev/train", REF) == 400
    second = BlobStore(store.root).spool("job/1/dev/train", REF)
    assert second.position == 400
    assert not store.has(DIGEST)
    second.add(chunk(400, 1000))
    assert store.adopt(second) == DIGEST
    store.sync()
    assert store.path(DIGEST).read_bytes() == DATA
    assert spooled_files(store) == []


def test_another_result_of_the_same_task_starts_from_nothing(store: BlobStore) -> None:
    first = store.spool("task", REF)
    first.add(chunk(0, 400))
    first.close()
    other = bytes(1000)
    second = store.spool("task", messages_pb2.BlobRef(digest=blake3(other).hexdigest(), size_bytes=1000))
    assert second.position == 0
    second.discard()
    assert store.spooled("unknown", REF) == 0


def test_a_key_is_never_a_path(store: BlobStore) -> None:
    spool = store.spool("../../../etc/passwd\0\ud800", REF)
    assert spool.path.parent == store.root / "spool"
    spool.discard()


def test_a_spool_with_other_bytes_is_not_adopted(store: BlobStore) -> None:
    spool = store.spool("task", REF)
    spool.add(chunk(0, 1000, bytes(1000)))
    with pytest.raises(WireError):
        store.adopt(spool)
    assert not store.has(DIGEST)
    assert spooled_files(store) == []


def test_the_same_blob_from_two_devices_is_stored_once(store: BlobStore) -> None:
    for device in ("a", "b"):
        spool = store.spool(device, REF)
        spool.add(chunk(0, 1000))
        store.adopt(spool)
    assert list(store.digests()) == [DIGEST]


def test_sizes_are_limited_and_the_disk_keeps_a_reserve(tmp_path: Path, store: BlobStore) -> None:
    with pytest.raises(WireError, match="1 to 999 are allowed"):
        store.spool("task", REF, limit_bytes=999)
    with pytest.raises(DiskFullError):
        BlobStore(tmp_path / "other", reserve_bytes=1 << 60).spool("task", REF)


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "/", DIGEST[:-1]])
def test_only_a_digest_becomes_a_path(store: BlobStore, digest: str) -> None:
    for touch in (store.path, store.has, store.size, store.verify, store.delete):
        with pytest.raises(WireError, match="is not a digest"):
            touch(digest)
    with pytest.raises(WireError, match="is not a digest"):
        store.link_out(digest, store.root / "out")


@pytest.mark.parametrize("link", [True, False])
def test_a_file_is_stored_by_link_or_copy(store: BlobStore, tmp_path: Path, link: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert store.put_file(path, link=link) == DIGEST
    assert store.put_file(path, link=link, digest=DIGEST) == DIGEST
    assert store.path(DIGEST).samefile(path) is link
    assert store.verify(DIGEST)
    assert spooled_files(store) == []


@pytest.mark.parametrize("can_link", [True, False])
def test_a_blob_gets_a_second_name(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool) -> None:
    if not can_link:

        def refuse(source: object, target: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    store.put_bytes(DATA)
    target = tmp_path / "out" / "adapter.safetensors"
    target.parent.mkdir()
    target.write_text("what was there")
    store.link_out(DIGEST, target)
    store.link_out(DIGEST, target)
    assert target.read_bytes() == DATA
    assert store.path(DIGEST).samefile(target) is can_link
    assert [path.name for path in target.parent.iterdir()] == ["adapter.safetensors"]


def test_a_deleted_blob_is_gone_and_its_second_name_stays(store: BlobStore, tmp_path: Path) -> None:
    store.put_bytes(DATA)
    store.link_out(DIGEST, tmp_path / "kept")
    assert store.delete(DIGEST)
    assert not store.delete(DIGEST)
    store.sync()
    assert not store.has(DIGEST)
    assert not store.verify(DIGEST)
    assert (tmp_path / "kept").read_bytes() == DATA


def test_damage_at_rest_is_found(store: BlobStore) -> None:
    store.put_bytes(DATA)
    path = store.path(DIGEST)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"S")
    assert not store.verify(DIGEST)
    assert store.put_bytes(DATA) == DIGEST
    assert store.verify(DIGEST)


def test_two_hundred_damages_drawn_at_random_are_found(store: BlobStore) -> None:
    draw = random.Random(7)
    for _ in range(200):
        store.put_bytes(DATA)
        path, at = store.path(DIGEST), draw.randrange(len(DATA))
        path.chmod(0o644)
        damaged = bytearray(DATA)
        way = draw.choice(["a bit", "cut", "longer", "empty"])
        if way == "a bit":
            damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes({"a bit": bytes(damaged), "cut": DATA[:at], "longer": DATA + b"x", "empty": b""}[way])
        assert not store.verify(DIGEST), (way, at)
        path.unlink()


def test_only_idle_and_old_spools_are_cleaned(store: BlobStore) -> None:
    old = store.spool("old", REF)
    old.add(chunk(0, 10))
    old.close()
    os.utime(old.path, (1000, 1000))
    busy = store.spool("busy", REF)
    busy.add(chunk(0, 10))
    os.utime(busy.path, (1000, 1000))
    fresh = store.spool("fresh", REF)
    fresh.add(chunk(0, 10))
    fresh.close()
    os.utime(fresh.path, (1990, 1990))
    assert store.clean_spool(60, now_s=2000) == 1
    assert sorted(spooled_files(store)) == sorted([busy.path, fresh.path])
    busy.discard()


def test_a_full_disk_leaves_nothing_half_done(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFullError, match="No space left"):
        store.put_bytes(DATA)
    assert not store.has(DIGEST)
    assert spooled_files(store) == []


def test_one_sync_makes_several_blobs_durable(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.sync()
    for index in range(10):
        store.put_bytes(b"%d" % index)
    folders: list[Path] = []
    monkeypatch.setattr(blobs, "_fsync", folders.append)
    store.sync()
    assert sorted(folders) == [store.root / "blobs"]
    folders.clear()
    store.sync()
    assert folders == []


def test_a_sync_returns_only_when_names_given_before_are_durable(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.sync()
    store.put_bytes(DATA)
    inside, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        inside.set()
        assert go_on.wait(30)

    monkeypatch.setattr(blobs, "_fsync", slow)
    first = threading.Thread(target=store.sync)
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=store.sync)
    second.start()
    second.join(0.05)
    assert second.is_alive()  # the first has taken the folder but not yet written it
    go_on.set()
    first.join()
    second.join()
