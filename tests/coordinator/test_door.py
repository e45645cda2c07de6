"""The port for those who have no certificate: what is carried, who is ended, and that whoever comes alone is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from fleetune.coordinator import door
from fleetune.coordinator.door import Door
from fleetune.coordinator.faults import MachineError
from support import loopclock

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is ended for what a busy machine takes; what is about that says so itself."""
    monkeypatch.setattr(door, "FIRST_BYTES_S", 3600.0)
    monkeypatch.setattr(door, "VISIT_S", 3600.0)


@dataclass
class Entry:
    """A door with a server behind it that says everything twice."""

    door: Door
    port: int = 0
    peers: list[str] = field(default_factory=list[str])
    """Of the connections that reached the server, where the door says they come from."""
    opened: list[asyncio.StreamWriter] = field(default_factory=list[asyncio.StreamWriter])

    async def knock(self, source: str = "127.0.0.1", first: bytes = b"") -> asyncio.StreamReader:
        """A connection from one of this machine's addresses."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        self.opened.append(writer)
        writer.write(first)
        return reader

    async def reaches(self, source: str) -> bool:
        """Whether somebody who comes from there is served."""
        reader = await self.knock(source, b"ping")
        return await asyncio.wait_for(reader.read(8), WAIT_S) == b"pingping"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("peername")
        with contextlib.suppress(OSError):
            piece = await reader.read(100)
            # Known with the first byte, as gRPC's handlers come after a handshake.
            self.peers.append(self.door.source_of(f"ipv4:{host}:{port}"))
            writer.write(2 * piece)
            while piece := await reader.read(100):
                writer.write(2 * piece)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def standing(listen: str = "127.0.0.1:0") -> AsyncGenerator[Entry]:
    entry = Entry(Door())
    inner = await asyncio.start_server(entry.serve, "127.0.0.1", 0)
    entry.port = await entry.door.open(listen)
    entry.door.leads_to(inner.sockets[0].getsockname()[1])
    try:
        yield entry
    finally:
        await entry.door.close()
        for writer in entry.opened:
            writer.close()
        inner.close()
        assert len(entry.door) == 0 and not entry.door._tasks and not entry.door._behind


async def ended(reader: asyncio.StreamReader) -> bool:
    """True once the other end has closed; nothing must come before."""
    try:
        return await asyncio.wait_for(reader.read(1), WAIT_S) == b""
    except ConnectionResetError:
        return True


async def until(entry: Entry, connections: int) -> None:
    while len(entry.door) != connections:  # noqa: ASYNC110  # what nobody announces
        await asyncio.sleep(0.005)


async def test_bytes_go_both_ways_and_it_is_known_whose_they_are() -> None:
    async with standing() as entry:
        reader = await entry.knock("127.0.0.7", b"a")
        assert await asyncio.wait_for(reader.readexactly(2), WAIT_S) == b"aa"
        large = bytes(range(256)) * 4000
        entry.opened[0].write(large)
        back = await asyncio.wait_for(reader.readexactly(2 * len(large)), WAIT_S)
        assert (len(back), back.count(b"\x07")) == (2 * len(large), 8000)
        assert entry.peers == ["127.0.0.7"]
        # Whoever is on this machine may come to the inner port by itself, as itself.
        assert entry.door.source_of("ipv4:127.0.0.1:1") == "127.0.0.1"
        assert entry.door.source_of("ipv6:%5B2001:db8::1%5D:9") == "2001:db8::/64"


async def test_who_says_nothing_is_ended_soon_and_never_reaches_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "FIRST_BYTES_S", 0.05)
    async with standing() as entry:
        silent = [await entry.knock() for _ in range(5)]
        assert all([await ended(reader) for reader in silent])
        assert (entry.peers, len(entry.door)) == ([], 0)


async def test_nobody_stays_for_longer_than_a_visit() -> None:
    async with standing() as entry:
        with loopclock.held() as clock:
            reader = await entry.knock(first=b"a")
            assert await asyncio.wait_for(reader.readexactly(2), WAIT_S) == b"aa"
            clock.forward(door.VISIT_S + 1)
            assert await ended(reader)


async def test_of_one_address_the_oldest_goes_where_it_has_too_many(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "PER_SOURCE", 4)
    caplog.set_level(logging.WARNING)
    async with standing() as entry:
        crowd = []
        for count in range(1, 5):
            crowd.append(await entry.knock("127.0.0.2"))
            await until(entry, count)
        other = await entry.knock("127.0.0.3", b"b")
        assert await asyncio.wait_for(other.readexactly(2), WAIT_S) == b"bb"
        assert await entry.reaches("127.0.0.2")
        assert await ended(crowd[0])
        assert await entry.reaches("127.0.0.2")
        assert await ended(crowd[1])
        entry.opened[4].write(b"c")
        assert await asyncio.wait_for(other.readexactly(2), WAIT_S) == b"cc"
    told = [record.getMessage() for record in caplog.records]
    assert told == ["refused caller='127.0.0.2' method=join port reason='more than 4 connections at once'"]


async def test_who_comes_alone_is_kept_however_many_come_from_fewer_addresses_than_there_are_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "CONNECTIONS_MAX", 12)
    monkeypatch.setattr(door, "PER_SOURCE", 6)
    async with standing() as entry:
        for number in range(12):
            await entry.knock(f"127.0.0.{2 + number % 4}", b"x")
        await until(entry, 12)
        alone = await entry.knock("127.0.0.99", b"a")
        assert await asyncio.wait_for(alone.readexactly(2), WAIT_S) == b"aa"
        mine = entry.opened[-1]
        for number in range(60):
            await entry.knock(f"127.0.0.{2 + number % 10}", b"x")
        assert await entry.reaches("127.0.0.200")
        mine.write(b"b")
        assert await asyncio.wait_for(alone.readexactly(2), WAIT_S) == b"bb"
        assert len(entry.door) <= 12


async def test_a_port_that_is_taken_is_told() -> None:
    async with standing() as entry:
        other = Door()
        with pytest.raises(MachineError, match="cannot be listened on"):
            await other.open(f"127.0.0.1:{entry.port}")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_all_addresses_of_both_families_are_listened_on() -> None:
    async with standing("[::]:0") as entry:
        assert await entry.reaches("127.0.0.8")
        reader, writer = await asyncio.open_connection("::1", entry.port)
        entry.opened.append(writer)
        writer.write(b"6")
        assert await asyncio.wait_for(reader.readexactly(2), WAIT_S) == b"66"
        assert entry.peers == ["127.0.0.8", "::/64"]


async def test_a_name_stands_for_all_its_addresses_on_one_port() -> None:
    async with standing("localhost:0") as entry:
        assert await entry.reaches("127.0.0.1")
        assert len({bound.getsockname()[1] for server in entry.door._servers for bound in server.sockets}) == 1
