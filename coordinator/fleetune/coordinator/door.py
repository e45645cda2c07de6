"""The port for those who have no certificate yet: some connections for each address, none for long, and a place for one more.

gRPC counts connections, but not by where they come from, and holds what says nothing until its handshake's deadline. So the port is
ours: a connection that has sent its first bytes is handed on, byte by byte, to gRPC's server on loopback, which does the TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from fleetune.coordinator import tokens
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.rpc.refusals import Refusals
from fleetune.waiting import within

PER_SOURCE = 32
"""Connections of one address (of IPv6: one /64) at a time. A join takes two, one after the other; boards behind one router share."""

CONNECTIONS_MAX = 128
"""Of all. Each that speaks holds three descriptors: its own, and both ends of the way to gRPC."""

FIRST_BYTES_S = 3.0
"""A client of TLS speaks first, and at once."""

VISIT_S = 20.0
"""A whole connection: a join takes well under a second, on a slow link a few."""

LAST_BYTES_S = 1.0
PIECE_BYTES = 16 * 1024
BACKLOG = 128

LOOPBACK = "127.0.0.1"
_METHOD = "join port"


@dataclass(eq=False)
class _Visit:
    """One connection."""

    source: str
    writer: asyncio.StreamWriter
    task: asyncio.Task[None] | None = None


class Door:
    """Used on the event loop. `close` ends every connection."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._refusals = Refusals(monotonic)
        # The oldest first.
        self._visits: dict[_Visit, None] = {}
        self._of: dict[str, dict[_Visit, None]] = {}
        self._behind: dict[int, str] = {}
        self._inner_port = 0
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._visits)

    def source_of(self, peer: str) -> str:
        """Where a call comes from whose gRPC peer is `peer`: the address before this door, without a port."""
        port = peer.rpartition(":")[2]
        behind = self._behind.get(int(port)) if port.isdecimal() and peer.startswith(f"ipv4:{LOOPBACK}:") else None
        return behind if behind is not None else tokens.source(peer)

    def leads_to(self, port: int) -> None:
        """Hand connections on to this port of loopback, gRPC's. Those that come before are ended."""
        self._inner_port = port

    async def open(self, listen: str) -> int:
        """Listen there; the port that it has then. MachineError for a taken one."""
        host, _, number = listen.rpartition(":")
        host, port = host.strip("[]"), int(number)
        try:
            for bound in _sockets(host, port):
                self._servers.append(await asyncio.start_server(self._enter, sock=bound, limit=PIECE_BYTES, backlog=BACKLOG))
        except OSError as error:
            await self.close()
            raise MachineError(
                f"the address {listen} cannot be listened on: it is taken, or not one of this machine's.",
                "Stop what uses it, or choose another with --join-listen (port 0 takes any free one).",
            ) from error
        return int(self._servers[0].sockets[0].getsockname()[1])

    async def close(self) -> None:
        """End all of it."""
        for server in self._servers:
            server.close()
        for visit in list(self._visits):
            self._end(visit)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()  # who has ended, but was not counted off yet

    # -- one connection

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if not peer:  # it was gone before it was taken
            writer.transport.abort()
            return
        visit = _Visit(tokens.source_of_host(str(peer[0])), writer)
        self._make_room(visit.source)
        self._visits[visit] = self._of.setdefault(visit.source, {})[visit] = None
        visit.task = asyncio.get_running_loop().create_task(self._serve(visit, reader), name="at the door")
        self._tasks.add(visit.task)
        visit.task.add_done_callback(self._tasks.discard)

    async def _serve(self, visit: _Visit, reader: asyncio.StreamReader) -> None:
        try:
            await within(VISIT_S, self._hand_on(visit, reader))
        except (OSError, EOFError, asyncio.TimeoutError):
            pass  # either end has gone, or it took too long: both are the other side's to notice
        finally:
            self._leave(visit)
            visit.writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                # What gRPC said last; who does not take it must not hold the descriptor.
                await within(LAST_BYTES_S, visit.writer.wait_closed())
            visit.writer.transport.abort()

    def _make_room(self, source: str) -> None:
        """End a connection where there are too many: the oldest of this source, or, of all, of the source that has most.

        So whoever comes alone is kept in front of any number of connections from fewer addresses than there are places.
        """
        if len(self._of.get(source, ())) >= PER_SOURCE:
            self._refusals.note(source, _METHOD, f"more than {PER_SOURCE} connections at once")
            self._end(next(iter(self._of[source])))
        elif len(self._visits) >= CONNECTIONS_MAX:
            # Among equals the one whose first connection is the oldest: dictionaries keep the order.
            most = max(self._of, key=lambda known: len(self._of[known]))
            self._refusals.note(most, _METHOD, f"more than {CONNECTIONS_MAX} connections at once, most of them from here")
            self._end(next(iter(self._of[most])))

    def _end(self, visit: _Visit) -> None:
        self._leave(visit)
        visit.writer.transport.abort()
        if visit.task is not None:
            visit.task.cancel()

    def _leave(self, visit: _Visit) -> None:
        if visit not in self._visits:
            return
        del self._visits[visit]
        own = self._of[visit.source]
        del own[visit]
        if not own:
            del self._of[visit.source]

    async def _hand_on(self, visit: _Visit, reader: asyncio.StreamReader) -> None:
        first = await within(FIRST_BYTES_S, reader.read(PIECE_BYTES))
        if not first:
            return
        inner_reader, inner = await asyncio.open_connection(LOOPBACK, self._inner_port, limit=PIECE_BYTES)
        port = int(inner.get_extra_info("sockname")[1])
        # Before gRPC reads a byte of it.
        self._behind[port] = visit.source
        try:
            inner.write(first)
            ways = [asyncio.create_task(_carry(reader, inner)), asyncio.create_task(_carry(inner_reader, visit.writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            inner.transport.abort()
            del self._behind[port]


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()


def _sockets(host: str, port: int) -> list[socket.socket]:
    """Listening on each address of the host, all on one port. OSError where the first cannot be had."""
    if host in ("", "::"):
        return [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=socket.has_dualstack_ipv6(), backlog=BACKLOG)]
    found: list[socket.socket] = []
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        taken = port or (found[0].getsockname()[1] if found else 0)
        try:
            found.append(socket.create_server((address[0], taken, *address[2:]), family=family, backlog=BACKLOG))
        except OSError:
            if not found:
                raise
    return found
