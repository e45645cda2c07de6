"""The parent's side of a child process: start it, ask it, end it, and tell how it died."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fleetune.child import answers, oomkills
from fleetune.errors import FleetuneError, WireError

LINE_BYTES_MAX = 1 << 20
"""One JSON line; larger ones are a bug of the child."""

TERM_GRACE_S = 3.0
STDERR_BYTES_KEPT = 8 * 1024

OnEvent = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class Death:
    """How a child ended that nobody asked to end."""

    exit_code: int | None
    signal_name: str
    out_of_memory: bool
    stderr_tail: str

    def sentence(self) -> str:
        if self.out_of_memory:
            return "the child process was ended by the system for lack of memory"
        if self.signal_name:
            return f"the child process was ended by {self.signal_name}"
        return f"the child process ended by itself with exit code {self.exit_code}"


class ChildDied(FleetuneError):
    """The child ended while it worked on a request."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.sentence())
        self.death = death


class ChildError(FleetuneError):
    """The child answered a request with an error; `kind` is one of the protocol's error kinds."""

    def __init__(self, kind: str, stage: str, message: str, traceback: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.stage = stage
        self.traceback = traceback


class ChildProcess:
    """One child, one request at a time. Owned by one task of the parent's event loop."""

    def __init__(self, module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._arguments = tuple(arguments)
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None
        self._stderr_task: asyncio.Task[None] | None = None
        self._stderr = bytearray()
        self._oom_kills_before = 0
        self._next_id = 1
        self.on_stderr: Callable[[str], None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.alive and self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Spawn the child; returns once the process exists, not once it has imported its packages."""
        if self.alive:
            return
        await self.stop()
        self._stderr.clear()
        self._oom_kills_before = oomkills.count()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            env={**os.environ, **self._environment},
            # A group of its own: Ctrl-C in the terminal reaches the daemon only, which ends its children in order.
            start_new_session=True,
        )
        self._stderr_task = asyncio.create_task(self._drain_stderr(self._process), name=f"stderr of {self._module}")

    async def request(self, op: str, fields: Mapping[str, object], on_event: OnEvent | None = None) -> dict[str, object]:
        """Ask and wait for the result. Raises ChildError, or ChildDied when the process ends first.

        Cancelling this coroutine ends the child: half a training has no other way to stop.
        """
        await self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        request_id = self._next_id
        self._next_id += 1
        try:
            await _write(process.stdin, json.dumps({"id": request_id, "op": op, **fields}).encode() + b"\n")
            while True:
                line = await _line(process.stdout)
                if not line:
                    raise ChildDied(await self._death())
                match answers.read(line, request_id):
                    case answers.Result(fields=result):
                        return result
                    case answers.Error(kind, stage, message, traceback):
                        raise ChildError(kind, stage, message, traceback)
                    case answers.Event(fields=event) if on_event is not None:
                        on_event(event)
                    case _:
                        pass
        except WireError as error:
            # Whatever it says next would be half of something.
            await self.stop(grace_s=0.0)
            raise ChildError("internal", op, str(error), "") from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChildDied(await self._death()) from error
        except asyncio.CancelledError:
            await self.stop(grace_s=0.0)
            raise

    async def stop(self, grace_s: float = TERM_GRACE_S) -> None:
        """End the child and its group: EOF and SIGTERM, then SIGKILL after `grace_s`. Safe to call twice."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
            try:
                await asyncio.wait_for(process.wait(), grace_s or TERM_GRACE_S)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if self._stderr_task is not None:
            await self._stderr_task
            self._stderr_task = None
        if process.stdin is not None:
            process.stdin.close()
        # asyncio closes the pipe transports only when it is told to or at collection, which warns.
        transport = getattr(process, "_transport", None)
        if transport is not None:
            transport.close()
        self._process = None

    async def _death(self) -> Death:
        process = self._process
        assert process is not None
        # It closed its end of the protocol, so it is of no more use even if it still runs.
        await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=TERM_GRACE_S)
        # Its own children (data loaders) would keep standard error open, and the wait for its end without one.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if self._stderr_task is not None:
            await self._stderr_task
        code = process.returncode
        name = ""
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
        killed = code == -signal.SIGKILL and oomkills.count() > self._oom_kills_before
        tail = self._stderr.decode("utf-8", "replace")
        return Death(code if code is not None and code >= 0 else None, name, killed, tail)

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            block = await process.stderr.read(4096)
            if not block:
                return
            self._stderr += block
            del self._stderr[:-STDERR_BYTES_KEPT]
            if self.on_stderr is not None:
                self.on_stderr(block.decode("utf-8", "replace"))


async def _write(pipe: asyncio.StreamWriter, data: bytes) -> None:
    try:
        pipe.write(data)
    except RuntimeError as error:
        # What uvloop raises, and asyncio's own loop does not, for a pipe whose other end is gone already.
        raise BrokenPipeError(str(error)) from error
    await pipe.drain()


async def _line(pipe: asyncio.StreamReader) -> bytes:
    try:
        return await pipe.readline()
    except ValueError as error:
        raise WireError(f"The child process sent a line of more than {LINE_BYTES_MAX} bytes.") from error
