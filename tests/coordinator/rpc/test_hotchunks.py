"""Chunks kept in memory: bounded, the latest blob's first of all, and let go after a while."""

from __future__ import annotations

import asyncio

from fleetune.coordinator.rpc.hotchunks import BLOBS_MAX, HotChunks, Response


def filled(chunks: HotChunks, digest: str, *sizes: int) -> None:
    chunks.of(digest)
    position = 0
    for size in sizes:
        chunks.put(digest, position, Response(bytes(size), position + size))
        position += size


async def test_a_response_is_found_at_its_position() -> None:
    chunks = HotChunks(100)
    known = chunks.of("a")
    chunks.put("a", 10, Response(b"xyz", 13))
    assert known[10] == Response(b"xyz", 13) and 13 not in known
    chunks.close()


async def test_a_newer_blob_takes_the_room_of_the_one_asked_for_least_lately() -> None:
    chunks = HotChunks(100)
    filled(chunks, "a", 40)
    filled(chunks, "b", 40)
    chunks.of("a")
    filled(chunks, "c", 40)
    assert (list(chunks.of("a")), list(chunks.of("b")), list(chunks.of("c"))) == ([0], [], [0])
    assert chunks.held_bytes == 80
    chunks.close()


async def test_what_does_not_fit_beside_its_own_blob_s_is_not_kept() -> None:
    chunks = HotChunks(100)
    filled(chunks, "a", 60, 60)
    assert list(chunks.of("a")) == [0] and chunks.held_bytes == 60
    chunks.close()


async def test_only_so_many_blobs_are_kept_however_small_they_are() -> None:
    chunks = HotChunks(10_000)
    for number in range(3 * BLOBS_MAX):
        filled(chunks, str(number), *([1] if number % 2 else []))
    assert (len(chunks._blobs), chunks.held_bytes) == (BLOBS_MAX, BLOBS_MAX // 2)
    assert not chunks.of("0") and list(chunks.of(str(3 * BLOBS_MAX - 1))) == [0]
    chunks.close()


async def test_the_same_response_counts_once() -> None:
    chunks = HotChunks(100)
    filled(chunks, "a", 60)
    filled(chunks, "a", 60)
    assert chunks.held_bytes == 60
    chunks.close()


async def test_what_nobody_asks_for_any_more_goes() -> None:
    chunks = HotChunks(100, kept_s=0.01)
    filled(chunks, "a", 60)
    while chunks.held_bytes:  # noqa: ASYNC110  # nothing tells it but the figure itself
        await asyncio.sleep(0.01)
    assert not chunks.of("a")
    chunks.close()
