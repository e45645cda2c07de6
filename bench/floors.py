"""The floors of a round: bare grpc.aio processes that move the same bytes as a round does, with nothing of Fleetune in them.

A server process and one process for each client, all on uvloop where it is installed. In each round every client downloads the state
(slices of 1 MiB that the server reads from a file) and uploads as much in messages of 1 MiB; a round is over when the server has
acknowledged the last upload. Rounds are called over a stream that stays open: nothing sleeps and nothing is started inside a round.

    net      the server adds what arrives to one float32 accumulator
    durable  the same, and of each update one sha256, one file written and one fsync before it is acknowledged

    python bench/floors.py --agents 4 --mib 16 --rounds 7
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

MIB = 1 << 20
WRITEBACK_BYTES = 8 * MIB
WRITERS = 8
"""Threads that hash, write and fsync: more only take turns on two cores, fewer wait for the disk one after the other."""

END_S = 10.0

Stream = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]

_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.so_reuseport", 0)]


@dataclass(frozen=True)
class Floor:
    """What the server process measured. `seconds` has one entry a round, in order, without the warm-up rounds."""

    seconds: tuple[float, ...]
    cpu_s_per_round: float
    peak_rss_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(agents: int, mib: int, rounds: int, warmup: int, folder: Path, *, durable: bool) -> Floor:
    """Run one floor with its files under `folder`; all its processes have ended when this returns or raises."""
    with tempfile.TemporaryDirectory(prefix="fleetune-floor-", dir=folder) as place:
        return _measure(agents, mib, rounds, warmup, place, durable=durable)


def _measure(agents: int, mib: int, rounds: int, warmup: int, folder: str, *, durable: bool) -> Floor:
    command = [sys.executable, str(Path(__file__).resolve())]
    sizes = ["--agents", str(agents), "--mib", str(mib), "--rounds", str(rounds), "--warmup", str(warmup), "--folder", folder]
    server = subprocess.Popen(
        [*command, "--role", "server", *sizes, *(["--durable"] if durable else [])],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    clients: list[subprocess.Popen[bytes]] = []
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the floor's server ended with code {server.wait()} before it listened")
        for index in range(agents):
            arguments = ["--role", "client", "--address", f"127.0.0.1:{port}", "--mib", str(mib), "--index", str(index)]
            clients.append(subprocess.Popen([*command, *arguments], start_new_session=True))
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the floor's server ended with code {server.wait()} before its rounds were over")
        found = json.loads(answer)
        return Floor(tuple(found["seconds"]), found["cpu_s_per_round"], found["peak_rss_bytes"])
    finally:
        _end([*clients, server])
        if server.stdout is not None:
            server.stdout.close()


def _end(processes: list[subprocess.Popen[bytes] | subprocess.Popen[str]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- the server ---------------------------------------------------------------------------------------------------------------------


class _Server:
    """Owner of the accumulator and of the rounds' clock; everything but hashing and disk happens on the event loop."""

    def __init__(self, agents: int, mib: int, folder: Path, *, durable: bool) -> None:
        self._agents = agents
        self._total = mib * MIB
        self._folder = folder
        self._durable = durable
        self._accumulator = np.zeros(self._total // 4, np.float32)
        self._state = folder / "state"
        self._state.write_bytes(bytes(self._total))
        self._calls: list[asyncio.Queue[bytes]] = []
        self._joined = asyncio.Event()
        self._acknowledged = 0
        self._settled = asyncio.Event()
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._written: list[Path] = []

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "floor",
            {
                "Rounds": grpc.unary_stream_rpc_method_handler(self.rounds),
                "Download": grpc.unary_stream_rpc_method_handler(self.download),
                "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
            },
        )

    async def run(self, rounds: int, warmup: int) -> Floor:
        await self._joined.wait()
        seconds: list[float] = []
        cpu_before_s = 0.0
        for number in range(warmup + rounds):
            if number == warmup:
                cpu_before_s = time.process_time()
            self._acknowledged = 0
            self._settled.clear()
            self._accumulator[:] = 0
            started_s = time.perf_counter()
            for call in self._calls:
                call.put_nowait(b"go")
            await self._settled.wait()
            seconds.append(time.perf_counter() - started_s)
            if self._accumulator[0] != self._agents * (self._agents + 1) / 2:
                raise RuntimeError("the floor lost an update")
            while self._written:
                self._written.pop().unlink()
        cpu_s = (time.process_time() - cpu_before_s) / rounds
        for call in self._calls:
            call.put_nowait(b"")
        return Floor(tuple(seconds[warmup:]), cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    async def rounds(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One client's stream: a message begins a round, its end is the end."""
        calls: asyncio.Queue[bytes] = asyncio.Queue()
        self._calls.append(calls)
        if len(self._calls) == self._agents:
            self._joined.set()
        while message := await calls.get():
            await context.write(message)

    async def download(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        fd = os.open(self._state, os.O_RDONLY)
        try:
            for offset in range(0, self._total, MIB):
                await context.write(os.pread(fd, MIB, offset))
        finally:
            os.close(fd)

    async def upload(self, _: object, context: Any) -> bytes:  # Any: the stubs leave the end of the stream out
        loop = asyncio.get_running_loop()
        update = _Update(self._folder, self._total) if self._durable else None
        writing: asyncio.Future[None] | None = None
        offset = 0
        while isinstance(piece := await context.read(), bytes):
            if update is not None:
                if writing is not None:
                    await writing
                # The last piece goes with its fsync: one turn of the thread for a small update.
                writing = loop.run_in_executor(self._writers, update.add, piece)
            part = np.frombuffer(piece, np.float32)
            begin = offset // 4
            np.add(self._accumulator[begin : begin + len(part)], part, out=self._accumulator[begin : begin + len(part)])
            offset += len(piece)
        if writing is not None:
            await writing
        if update is not None:
            self._written.append(update.path)
        self._acknowledged += 1
        if self._acknowledged == self._agents:
            self._settled.set()
        return b"ok"


class _Update:
    """One update on its way to the disk; used by one thread at a time."""

    def __init__(self, folder: Path, total: int) -> None:
        self.path = folder / f"update-{time.monotonic_ns()}"
        self._total = total
        self._fd = -1
        self._hash = hashlib.sha256()
        self._done = 0
        self._queued = 0

    def add(self, piece: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._hash.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(self._fd, view) :]
        self._done += len(piece)
        if self._done - self._queued >= WRITEBACK_BYTES:
            # The disk works while more arrives.
            os.posix_fadvise(self._fd, self._queued, self._done - self._queued, os.POSIX_FADV_DONTNEED)
            self._queued = self._done
        if self._done == self._total:
            self._hash.hexdigest()
            os.fsync(self._fd)
            os.close(self._fd)


async def _serve(agents: int, mib: int, rounds: int, warmup: int, folder: Path, *, durable: bool) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    floor = _Server(agents, mib, folder, durable=durable)
    server.add_generic_rpc_handlers((floor.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        print(port, flush=True)
        found = await floor.run(rounds, warmup)
        print(json.dumps(asdict(found)), flush=True)
    finally:
        await server.stop(1.0)


# --- a client -----------------------------------------------------------------------------------------------------------------------


async def _take_part(address: str, mib: int, index: int) -> None:
    # What a device would compute is none of the floor's business: its update lies ready. But it is all there, and so is the state that
    # it fetched, since bytes that never leave the processor's cache would move faster than any update does.
    update = [np.full(MIB // 4, index + 1, np.float32).tobytes() for _ in range(mib)]
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        rounds: Stream = channel.unary_stream("/floor/Rounds")
        download: Stream = channel.unary_stream("/floor/Download")
        upload: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/floor/Upload")
        async for _ in rounds(b""):
            coming: Any = download(b"")  # Any: the stubs leave the end of the stream out
            state: list[bytes] = []
            while isinstance(piece := await coming.read(), bytes):
                state.append(piece)
            going = upload()
            for piece in update:
                await going.write(piece)
            await going.done_writing()
            await going


# --- the command --------------------------------------------------------------------------------------------------------------------


def run_on_uvloop(main: Callable[[], Coroutine[object, object, None]]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=4, help="client processes")
    parser.add_argument("--mib", type=int, default=16, help="size of the state in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--role", choices=["server", "client"], help=argparse.SUPPRESS)
    parser.add_argument("--durable", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "server":
        run_on_uvloop(lambda: _serve(given.agents, given.mib, given.rounds, given.warmup, given.folder, durable=given.durable))
        return 0
    if given.role == "client":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        run_on_uvloop(lambda: _take_part(given.address, given.mib, given.index))
        return 0
    for durable in (False, True):
        found = measure(given.agents, given.mib, given.rounds, given.warmup, given.folder, durable=durable)
        print(
            f"{'durable' if durable else 'net':8} median {found.median_s:.3f} s ({min(found.seconds):.3f} to {max(found.seconds):.3f}), "
            f"server {found.cpu_s_per_round:.3f} CPU s a round, {found.peak_rss_bytes / MIB:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
