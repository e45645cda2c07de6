"""The HTTP end of the metrics: few connections, short requests, short waits; whatever comes, the coordinator goes on."""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.metrics import request as requests
from fleetune.coordinator.metrics.request import Request
from fleetune.errors import ConfigError
from fleetune.waiting import within
from fleetune.wire import channel

log = logging.getLogger("fleetune.metrics")

CONNECTIONS_MAX = 16
"""At once. One more, and the oldest that has not asked yet is cut: a reader asks at once, whoever dawdles is none."""

BACKLOG = 32
ASK_S = 5.0
"""For the handshake and the request together."""

ANSWER_S = 30.0
"""For the other end to take the metrics."""

REFUSE_S = 2.0
"""For it to take any other answer."""

ACCEPT_AGAIN_S = 0.5
"""After a connection could not be taken, for want of descriptors for example."""

SECRET_BYTES_MAX = 1024
SECRET_BYTES_MIN = 16

PLAIN = "text/plain; charset=utf-8"

Answer = Callable[[Request], Awaitable[tuple[bytes, str, bool]]]
"""The text of the metrics, its type, and whether it is compressed."""


@dataclass(frozen=True)
class Pair:
    """Files of the certificate that is shown and of its key."""

    certificate: Path
    key: Path


@dataclass(eq=False)
class _Connection:
    """One reader. Written only by the listener."""

    socket: socket.socket
    task: asyncio.Task[None] | None = None
    begun: bool = False
    asked: bool = False


@dataclass
class Certificate:
    """The TLS of the listener, read again where the files have changed."""

    pair: Pair
    _mark: tuple[int, ...] = ()
    _context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """ConfigError where the files cannot be used and never could."""
        try:
            mark = tuple(part for path in (self.pair.certificate, self.pair.key) for part in _mark(path))
            if self._context is None or mark != self._mark:
                made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                made.minimum_version = ssl.TLSVersion.TLSv1_2
                made.load_cert_chain(self.pair.certificate, self.pair.key)
                self._context, self._mark = made, mark
        except (OSError, ssl.SSLError) as error:
            if self._context is None:
                raise ConfigError(
                    f"{self.pair.certificate} and its key cannot be used: {error}.", "Look at the files and their rights."
                ) from error
        return self._context


class Listener:
    """Serves one path. All its methods are called on the event loop."""

    def __init__(self, answer: Answer, certificate: Certificate | None, secret_file: Path | None) -> None:
        self.statuses: dict[int, int] = {200: 0}
        """HTTP status -> requests that were answered with it; 0 for those that were cut before."""
        self.port = 0
        self._answer = answer
        self._certificate = certificate
        self._secret_file = secret_file
        self._listening: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: list[_Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        """Of the connections, those included that are being cut."""
        self._complaint = ""

    async def open(self, listen: str) -> None:
        """Listen on every address that the host stands for. Raises MachineError where it is taken, ConfigError for unusable files."""
        if self._certificate is not None:
            self._certificate.context()
        if self._secret_file is not None:
            secret(self._secret_file)
        host, _, port = listen.rpartition(":")
        try:
            self._listening = await _bound(host.strip("[]"), int(port))
        except OSError as error:
            raise MachineError(
                f"the address {listen} cannot be listened on for metrics: {error.strerror or error}.",
                "Stop what uses it, or choose another with --metrics-listen (port 0 takes any free one).",
            ) from error
        self.port = int(self._listening[0].getsockname()[1])
        self._accepting = [asyncio.create_task(self._accept(found), name="metrics") for found in self._listening]

    async def close(self) -> None:
        """Cut whoever is connected; returns when nothing of it is left."""
        running = (*self._accepting, *self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for found in self._listening:
            found.close()
        self._listening.clear()

    # -- connections

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("a reader of metrics could not be let in: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            accepted.setblocking(False)
            self._make_room()
            if len(self._connections) >= CONNECTIONS_MAX:
                accepted.close()
                self._count(0)
                continue
            connection = _Connection(accepted)
            self._connections.append(connection)
            connection.task = asyncio.create_task(self._serve(connection), name="reader of metrics")
            self._tasks.add(connection.task)
            connection.task.add_done_callback(functools.partial(self._let_go, connection))

    def _let_go(self, connection: _Connection, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not connection.begun:  # cancelled before its first step: nobody else closes it
            connection.socket.close()

    def _make_room(self) -> None:
        """Cut the oldest that has not asked yet, where there is no place left."""
        if len(self._connections) < CONNECTIONS_MAX:
            return
        idle = next((one for one in self._connections if not one.asked), None)
        if idle is not None and idle.task is not None:
            self._connections.remove(idle)
            idle.task.cancel()

    async def _serve(self, connection: _Connection) -> None:
        connection.begun = True
        transport: asyncio.WriteTransport | None = None
        try:
            began_s = time.monotonic()
            reader, writer = await within(ASK_S, self._talk(connection.socket))
            transport = writer.transport
            left_s = max(0.1, ASK_S - (time.monotonic() - began_s))
            head = await within(left_s, _head(reader))
            connection.asked = True
            await self._reply(head, writer)
        except (asyncio.TimeoutError, OSError, EOFError):
            self._count(0)
        except asyncio.CancelledError:
            self._count(0)
            raise
        finally:
            if connection in self._connections:
                self._connections.remove(connection)
            if transport is not None:
                transport.abort()
            else:
                connection.socket.close()

    async def _talk(self, accepted: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Streams over the connection, after the handshake where there is one. OSError where that fails."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=requests.HEAD_BYTES_MAX)
        protocol = asyncio.StreamReaderProtocol(reader)
        context = self._certificate.context() if self._certificate is not None else None
        limit_s = ASK_S if context is not None else None
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=context, ssl_handshake_timeout=limit_s)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    # -- one request

    async def _reply(self, head: bytes | None, writer: asyncio.StreamWriter) -> None:
        status, body, content_type, gzipped, bare = await self._answered(head)
        writer.write(requests.answer_head(status, content_type, len(body), gzipped=gzipped))
        if not bare:
            writer.write(body)
        self._count(status.value)
        writer.close()  # once all of it is taken
        # Whoever gets no metrics may not hold a place for long by not listening either.
        await within(ANSWER_S if status is HTTPStatus.OK else REFUSE_S, writer.wait_closed())

    async def _answered(self, head: bytes | None) -> tuple[HTTPStatus, bytes, str, bool, bool]:
        """Status, body, its type, whether it is compressed, and whether the body is only to be counted."""
        asked = requests.parse(head) if head is not None else None
        if asked is None:
            status = HTTPStatus.BAD_REQUEST if head is not None else HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        else:
            status = asked.objection or self._verdict(asked)
        if asked is None or status is not HTTPStatus.OK:
            return status, f"{status.phrase}; metrics are at {requests.PATH}\n".encode(), PLAIN, False, False
        try:
            body, content_type, gzipped = await self._answer(asked)
        except Exception:  # a bug in the figures: it must not look as if the coordinator were gone
            log.exception("the metrics could not be told")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            return status, b"the coordinator's log says why\n", PLAIN, False, False
        return status, body, content_type, gzipped, asked.method == "HEAD"

    def _verdict(self, asked: Request) -> HTTPStatus:
        if self._secret_file is None:
            # A web page must not read them through a browser of this machine, under a name that leads here.
            ours = not asked.host or channel.is_loopback(asked.host)
            return HTTPStatus.OK if ours else HTTPStatus.MISDIRECTED_REQUEST
        try:
            # Read each time, so that a secret can be changed while the coordinator runs: a line of a local file.
            expected = secret(self._secret_file)
        except ConfigError as error:
            if self._complaint != str(error):  # once: whoever asks again and again must not fill the log
                self._complaint = str(error)
                log.error("nobody may read the metrics: %s", error)
            return HTTPStatus.UNAUTHORIZED
        self._complaint = ""
        return HTTPStatus.OK if hmac.compare_digest(asked.bearer.encode("latin-1"), expected) else HTTPStatus.UNAUTHORIZED

    def _count(self, status: int) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1


def secret(path: Path) -> bytes:
    """What readers have to send. ConfigError for a file that is missing, open to others, or holds no one long line."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(SECRET_BYTES_MAX + 2)
    except OSError as error:
        raise ConfigError(f"metrics.bearer_file {path} cannot be read: {error.strerror}.", "Make it: `openssl rand -hex 32`.") from error
    if mode & 0o077:
        raise ConfigError(f"metrics.bearer_file {path} can be read by others (mode {mode & 0o777:04o}).", f"chmod 600 {path}")
    found = text.strip()
    if not SECRET_BYTES_MIN <= len(found) <= SECRET_BYTES_MAX or any(not 0x21 <= byte <= 0x7E for byte in found):
        allowed = f"one line of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} printable characters without spaces"
        raise ConfigError(f"metrics.bearer_file {path} does not hold {allowed}.", "Make it: `openssl rand -hex 32`.")
    return found


async def _head(reader: asyncio.StreamReader) -> bytes | None:
    """The request up to its empty line; None for one that is too long. EOFError where it ends before."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


async def _bound(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            if found and port == 0:
                break  # the other addresses would get other ports
            made = socket.socket(family, kind, protocol)
            found.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.setblocking(False)
            made.bind(address)
            made.listen(BACKLOG)
    except OSError:
        for made in found:
            made.close()
        raise
    return found


def _mark(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size
