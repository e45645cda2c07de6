"""A plain synchronous client of a child process, in place of the daemon's asyncio side."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType
from typing import IO, Any


class ChildClient:
    """Starts a child module and asks it; `events` holds what came before the last answer."""

    def __init__(self, module: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.events: list[dict[str, Any]] = []  # JSON
        self._next_id = 1

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """The whole answer: with "result" or with "error"."""
        self.events.clear()
        self.send_raw(json.dumps({"id": self._next_id, "op": op, **fields}).encode() + b"\n")
        self._next_id += 1
        return self.answer()

    def send_raw(self, data: bytes) -> None:
        stdin = _pipe(self.process.stdin)
        stdin.write(data)
        stdin.flush()

    def answer(self) -> dict[str, Any]:
        for line in _pipe(self.process.stdout):
            message: dict[str, Any] = json.loads(line)
            if "event" not in message:
                return message
            self.events.append(message)
        raise AssertionError(f"the child ended without an answer: {_pipe(self.process.stderr).read().decode()}")

    def close_stdin(self) -> int:
        """End of requests; the child's exit code."""
        _pipe(self.process.stdin).close()
        return self.process.wait(timeout=30)

    def __enter__(self) -> ChildClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
