"""The cache: fetched once, checked, bounded, and never taking away what a task needs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from fleetune.agent import cache as cache_module
from fleetune.agent.cache import Cache
from fleetune.agent.domain import Base, Blob
from fleetune.agent.downlink import Downlink
from fleetune.agent.links import Line
from fleetune.v1 import messages_pb2
from fleetune.wire import basefiles, channel
from support.fake_coordinator import FakeCoordinator

MIB = 1 << 20
MakeCache = Callable[..., Cache]


def nobody(done: int, total: int) -> None:
    """Progress that no one listens to."""


def blob(ref: messages_pb2.BlobRef) -> Blob:
    return Blob(ref.digest, ref.size_bytes)


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    await fake.start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture
async def make_cache(coordinator: FakeCoordinator, tmp_path: Path) -> AsyncIterator[MakeCache]:
    opened = Line(lambda: channel.open_channel(coordinator.address))
    downlink = Downlink(opened)

    def make(limit_bytes: int = 100 * MIB, models: dict[str, Path] | None = None, hub_cache: Path | None = None) -> Cache:
        return Cache(tmp_path / "cache", limit_bytes, downlink, models or {}, hub_cache)

    yield make
    downlink.close()
    await opened.close()


def a_base(coordinator: FakeCoordinator, hub_id: str = "org/tiny") -> tuple[Base, dict[str, bytes]]:
    contents = {"config.json": b'{"hidden": 1}', "model.safetensors": os.urandom(300_000), "tokenizer.json": b"{}"}
    files: list[basefiles.BaseFile] = []
    for name, data in contents.items():
        ref = coordinator.add_blob(data)
        files.append(basefiles.BaseFile(name, ref.digest, ref.size_bytes))
    return Base(basefiles.base_digest(files), hub_id, "main", tuple(files)), contents


def in_folder(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


async def test_a_state_is_fetched_once(coordinator: FakeCoordinator, make_cache: MakeCache) -> None:
    cache, ref = make_cache(), coordinator.add_blob(b"state" * 1000)
    first = await cache.state(blob(ref), nobody)
    assert await cache.state(blob(ref), nobody) == first
    assert first.read_bytes() == b"state" * 1000
    assert len(coordinator.downloads) == 1


async def test_a_state_that_was_damaged_while_the_agent_was_down_is_fetched_again(
    coordinator: FakeCoordinator, make_cache: MakeCache
) -> None:
    ref = coordinator.add_blob(b"state" * 1000)
    path = await make_cache().state(blob(ref), nobody)
    path.write_bytes(b"STATE" * 1000)
    assert (await make_cache().state(blob(ref), nobody)).read_bytes() == b"state" * 1000


async def test_what_was_used_longest_ago_goes_first_and_what_is_held_stays(coordinator: FakeCoordinator, make_cache: MakeCache) -> None:
    cache = make_cache(limit_bytes=3 * MIB)
    refs = [coordinator.add_blob(bytes([number]) * MIB) for number in range(4)]
    paths = [await cache.state(blob(ref), nobody) for ref in refs[:3]]
    for age_s, path in zip((30, 20, 10), paths, strict=True):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
    with cache.holding([refs[0].digest]):
        await cache.state(blob(refs[3]), nobody)
    assert [path.exists() for path in paths] == [True, False, True]


async def test_a_task_may_exceed_the_bound_rather_than_fail(coordinator: FakeCoordinator, make_cache: MakeCache) -> None:
    cache, ref = make_cache(limit_bytes=1000), coordinator.add_blob(bytes(MIB))
    assert (await cache.state(blob(ref), nobody)).stat().st_size == MIB


async def test_a_base_is_fetched_file_by_file_and_then_stays(coordinator: FakeCoordinator, make_cache: MakeCache) -> None:
    base, contents = a_base(coordinator)
    heard: list[tuple[int, int]] = []
    folder = await make_cache().base(base, lambda done, total: heard.append((done, total)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert heard[-1][0] == heard[-1][1] == sum(len(data) for data in contents.values())
    assert await make_cache().base(base, nobody) == folder
    assert len(coordinator.downloads) == len(contents)


async def test_only_the_damaged_file_of_a_base_is_fetched_again(coordinator: FakeCoordinator, make_cache: MakeCache) -> None:
    base, contents = a_base(coordinator)
    folder = await make_cache().base(base, nobody)
    (folder / "tokenizer.json").write_bytes(b"[]")
    await make_cache().base(base, nobody)
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert len(coordinator.downloads) == len(contents) + 1


@pytest.mark.parametrize("name", ["org/tiny", "tiny", "anything"])
async def test_a_configured_folder_with_the_same_files_is_used_as_it_is(
    coordinator: FakeCoordinator, make_cache: MakeCache, tmp_path: Path, name: str
) -> None:
    base, contents = a_base(coordinator)
    local = in_folder(tmp_path / "local", contents)
    assert await make_cache(models={name: local}).base(base, nobody) == local
    assert coordinator.downloads == []


async def test_a_configured_folder_with_other_files_is_not_used(
    coordinator: FakeCoordinator, make_cache: MakeCache, tmp_path: Path
) -> None:
    base, contents = a_base(coordinator)
    local = in_folder(tmp_path / "local", {**contents, "config.json": b'{"hidden": 2}'})
    assert await make_cache(models={"org/tiny": local}).base(base, nobody) != local


async def test_a_copy_in_the_hub_s_own_cache_is_used(coordinator: FakeCoordinator, make_cache: MakeCache, tmp_path: Path) -> None:
    base, contents = a_base(coordinator)
    snapshot = in_folder(tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc", contents)
    assert await make_cache(hub_cache=tmp_path / "hub").base(base, nobody) == snapshot


async def test_a_thousand_rounds_leave_a_bounded_number_of_states_behind(
    coordinator: FakeCoordinator, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache_module, "STATES_MAX", 10)
    cache = make_cache()
    base, _ = a_base(coordinator)
    folder, newest = await cache.base(base, nobody), Path()
    for number in range(40):
        ref = coordinator.add_blob(f"state {number}".encode())
        with cache.holding([ref.digest, base.digest]):
            newest = await cache.state(blob(ref), nobody)
    left = list((tmp_path / "cache" / "blobs").iterdir())
    assert len(left) == 10 and newest in left
    assert (folder / "model.safetensors").is_file()
    assert sizes(cache) == {"_held": 0, "_verified": 11}


async def test_states_that_fit_are_fetched_without_another_look_at_the_folder(
    coordinator: FakeCoordinator, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, looks = make_cache(limit_bytes=8 * 1000), 0
    entries = cache._entries  # pyright: ignore[reportPrivateUsage]

    def counted() -> Iterator[object]:
        nonlocal looks
        looks += 1
        return entries()

    monkeypatch.setattr(cache, "_entries", counted)
    for _ in range(8):
        await cache.state(blob(coordinator.add_blob(os.urandom(1000))), nobody)
    assert looks == 1


async def test_the_bound_on_bytes_holds_over_many_states(coordinator: FakeCoordinator, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache(limit_bytes=8 * 1000)
    for number in range(30):
        newest = await cache.state(blob(coordinator.add_blob(os.urandom(500 + 40 * number))), nobody)
        held = sum(path.stat().st_size for path in (tmp_path / "cache" / "blobs").iterdir())
        assert held <= 8 * 1000 and newest.is_file()


def sizes(cache: Cache) -> dict[str, int]:
    """What its structures in memory hold."""
    return {name: len(getattr(cache, name)) for name in ("_held", "_verified")}
