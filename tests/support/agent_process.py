"""A real agent daemon as a process of its own, for tests that kill it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import psutil

from fleetune.wire import identity as identities
from fleetune.wire.identity import Identity

WAIT_S = 60.0
"""Longest wait for anything a test expects of an agent, its start among it; only a bug takes longer."""


PROGRAM = ("-m", "fleetune.agent.cli")

PATIENT_PROGRAM = (
    "-c",
    # The environment as the command line sets it before it imports gRPC.
    "import os; os.environ.update(GRPC_VERBOSITY='NONE', GRPC_ENABLE_FORK_SUPPORT='0'); "
    f"from fleetune.agent import cli, session; session.LEAVE_DEADLINE_S = {WAIT_S}; cli.main()",
)
"""The same agent, which waits for a busy machine to hear its goodbye."""


class AgentProcess:
    """`fleetune-agent run` on a state folder; its log is kept in `log_file`."""

    def __init__(
        self,
        state_dir: Path,
        address: str,
        *arguments: str,
        identity: Identity | None = None,
        plaintext: bool = True,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.state_dir = state_dir
        self.log_file = state_dir.with_suffix(".log")
        who = ["--plaintext"] if plaintext and identity is None else []
        if identity is not None:
            identities.store(state_dir / "identity", identity)
        self._command = [
            *(sys.executable, *program, "run", *(("--coordinator", address) if address else ())),
            *("--name", state_dir.name, "--state-dir", str(state_dir), "--log-level", "debug", *who, *arguments),
        ]
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log_file.open("ab") as log:
            # Settings of the person who runs the tests have no business here.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
            environment["HOME"] = str(self.state_dir.parent)
            self.process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def logged(self, text: str, within_s: float = WAIT_S, *, times: int = 1) -> None:
        """Return once `text` stands in the log: what an agent did after its last message is seen nowhere else."""
        deadline_s = time.monotonic() + within_s
        while self.log.count(text) < times:
            assert time.monotonic() < deadline_s, f"{text!r} was not logged within {within_s:g} s"
            await asyncio.sleep(0.02)

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    async def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), WAIT_S)

    async def ended(self) -> int:
        """The exit status of an agent that ends by itself."""
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), WAIT_S)


@contextlib.asynccontextmanager
async def agent(
    state_dir: Path,
    address: str,
    *arguments: str,
    identity: Identity | None = None,
    plaintext: bool = True,
    program: Sequence[str] = PROGRAM,
) -> AsyncGenerator[AgentProcess, None]:
    """An agent that runs, in plaintext without an identity unless told otherwise; killed at the end if it still does."""
    running = AgentProcess(state_dir, address, *arguments, identity=identity, plaintext=plaintext, program=program)
    await running.start()
    try:
        yield running
    finally:
        process = running.process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
