"""A real coordinator and real agents as processes on this machine, started for a benchmark and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

READY_S = 60.0
STOP_S = 15.0
LOOK_S = 0.01
TAIL_BYTES = 2000


class Fleet:
    """Used with `async with`: ready when entered, and everything has ended when left, also after Ctrl-C."""

    def __init__(self, folder: Path, agents: int) -> None:
        self._folder = folder
        self._count = agents
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: list[subprocess.Popen[bytes]] = []
        self.address = ""
        self.started_s = 0.0
        """By the monotonic clock, just before the coordinator was started."""

    @property
    def coordinator(self) -> int:
        assert self._coordinator is not None
        return self._coordinator.pid

    @property
    def agents(self) -> list[int]:
        return [agent.pid for agent in self._agents]

    async def __aenter__(self) -> Fleet:
        self.started_s = time.monotonic()
        try:
            state = self._folder / "coordinator"
            serve = ["fleetune.coordinator.cli", "serve", "--listen", "127.0.0.1:0", "--state-dir", str(state)]
            self._coordinator = self._start("coordinator", serve)
            self.address = await self._address(state / "address")
            for number in range(self._count):
                name = f"bench-{number:03d}"
                run = ["fleetune.agent.cli", "run", "--coordinator", self.address, "--name", name]
                self._agents.append(self._start(name, [*run, "--state-dir", str(self._folder / name)]))
        except BaseException:
            self.end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def check(self) -> None:
        """RuntimeError with the end of its log where a process has ended."""
        names = ["coordinator", *(f"bench-{number:03d}" for number in range(len(self._agents)))]
        for name, process in zip(names, [self._coordinator, *self._agents], strict=True):
            if process is not None and process.poll() is not None:
                text = (self._folder / f"{name}.log").read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
                raise RuntimeError(f"{name} ended with code {process.returncode}. Its log ends with:\n{text}")

    def end(self) -> None:
        """Agents first, then the coordinator: SIGTERM, and SIGKILL for their whole groups after the grace."""
        processes = self._agents + ([self._coordinator] if self._coordinator is not None else [])
        for wave in (self._agents, processes):
            for process in wave:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            for process in wave:
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        kept = {variable: value for variable, value in os.environ.items() if not variable.startswith("FLEETUNE_")}
        with (self._folder / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches this process only, which ends the others in order.
            return subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log, env=kept, start_new_session=True)

    async def _address(self, file: Path) -> str:
        deadline_s = time.monotonic() + READY_S
        while not (address := _text(file)):
            self.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the coordinator was not ready within {READY_S:g} s")
            await asyncio.sleep(LOOK_S)
        return address


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
