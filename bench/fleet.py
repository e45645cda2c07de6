"""A real coordinator and real agents as processes on this machine, started for a benchmark and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType

import enrolling

from fleetune.coordinator.client import Client
from fleetune.wire.identity import Identity

READY_S = 60.0
STOP_S = 15.0
LOOK_S = 0.01
TAIL_BYTES = 2000


class Fleet:
    """Used with `async with`: ready when entered, and everything has ended when left, also after Ctrl-C.

    `options` are further ones of `serve`, `agent_options` of the `run` of the agent with that number; `route` gets the coordinator's
    address and gives the one that agents dial.
    """

    def __init__(
        self,
        folder: Path,
        agents: int,
        *,
        options: Sequence[str] = (),
        route: Callable[[str], Awaitable[str]] | None = None,
        plaintext: bool = False,
        agent_options: Callable[[int], Sequence[str]] | None = None,
    ) -> None:
        self._folder = folder
        self._count = agents
        self._options = tuple(options)
        self._route = route
        self._agent_options = agent_options
        self.plaintext = plaintext
        self.operator: Identity | None = None
        """As whom the coordinator is asked; None in plaintext, and before the fleet is entered."""
        self._dialled = ""
        self.before: tuple[str, ...] = ()
        """Put before the coordinator's command at its next start: a tracer that becomes it, such as `strace -D`."""
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: list[subprocess.Popen[bytes]] = []
        self.address = ""
        self.started_s = 0.0
        """By the monotonic clock, just before the coordinator was started."""

    @property
    def state_dir(self) -> Path:
        """The coordinator's."""
        return self._folder / "coordinator"

    def log_of(self, agent: int) -> Path:
        """Where an agent writes, over all its starts."""
        return self._folder / f"{_name(agent)}.log"

    async def start_coordinator(self) -> None:
        """Start it, on the port that it had before, and wait until it is ready."""
        address = self.state_dir / "address"
        address.unlink(missing_ok=True)  # a killed one leaves it behind
        serve = ["fleetune.coordinator.cli", "serve", "--listen", self.address or "127.0.0.1:0", "--state-dir", str(self.state_dir)]
        # The port after ours may be anybody's.
        serve += ["--plaintext"] if self.plaintext else ["--join-listen", "127.0.0.1:0"]
        self._coordinator = self._start("coordinator", [*serve, *self._options], self.before)
        self.address = await self._address(address)

    def kill_coordinator(self) -> None:
        """SIGKILL, and gone when this returns."""
        assert self._coordinator is not None
        self._coordinator.kill()
        self._coordinator.wait()

    async def stop_coordinator(self) -> tuple[int, float]:
        """SIGTERM: its exit code, and how many seconds it took to end. RuntimeError where it does not."""
        assert self._coordinator is not None
        begun_s = time.monotonic()
        self._coordinator.terminate()
        while (code := self._coordinator.poll()) is None:
            if time.monotonic() - begun_s > READY_S:
                raise RuntimeError(f"the coordinator did not end within {READY_S:g} s of SIGTERM")
            await asyncio.sleep(LOOK_S)
        return code, time.monotonic() - begun_s

    def replace_agent(self, number: int) -> None:
        """SIGKILL, and started again at once."""
        self._agents[number].kill()
        self._agents[number].wait()
        self._agents[number] = self._start_agent(number)

    def _start_agent(self, number: int) -> subprocess.Popen[bytes]:
        run = ["fleetune.agent.cli", "run", "--coordinator", self._dialled, "--name", _name(number)]
        run += ["--plaintext"] if self.plaintext else []
        run += self._agent_options(number) if self._agent_options is not None else []
        return self._start(_name(number), [*run, "--state-dir", str(self._folder / _name(number))])

    @property
    def coordinator(self) -> int:
        assert self._coordinator is not None
        return self._coordinator.pid

    @property
    def exit_code(self) -> int | None:
        """The coordinator's; None while it runs."""
        assert self._coordinator is not None
        return self._coordinator.poll()

    @property
    def agents(self) -> list[int]:
        return [agent.pid for agent in self._agents]

    def client(self) -> Client:
        """A connection as an operator of this fleet."""
        return Client(self.address, self.operator)

    async def __aenter__(self) -> Fleet:
        if not self.plaintext:
            self.operator = await asyncio.to_thread(enrolling.initialised, self.state_dir, self._folder / "operator")
        self.started_s = time.monotonic()
        try:
            await self.start_coordinator()
            if self.operator is not None and self._count:
                begun_s = time.monotonic()
                line = await enrolling.line_for(self.address, self.operator, self._count)
                await asyncio.to_thread(enrolling.enrolled, line, [(_name(n), self._folder / _name(n)) for n in range(self._count)])
                # Done once in a device's life: no part of a start.
                self.started_s += time.monotonic() - begun_s
            self._dialled = await self._route(self.address) if self._route is not None else self.address
            for number in range(self._count):
                self._agents.append(self._start_agent(number))
        except BaseException:
            self.end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def check(self) -> None:
        """RuntimeError with the end of its log where a process has ended."""
        names = ["coordinator", *(_name(number) for number in range(len(self._agents)))]
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

    def _start(self, name: str, arguments: list[str], before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        kept = {variable: value for variable, value in os.environ.items() if not variable.startswith("FLEETUNE_")}
        with (self._folder / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches this process only, which ends the others in order.
            return subprocess.Popen([*before, sys.executable, "-m", *arguments], stdout=log, stderr=log, env=kept, start_new_session=True)

    async def _address(self, file: Path) -> str:
        deadline_s = time.monotonic() + READY_S
        while not (address := _text(file)):
            self.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the coordinator was not ready within {READY_S:g} s")
            await asyncio.sleep(LOOK_S)
        return address


def _name(agent: int) -> str:
    return f"bench-{agent:03d}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
