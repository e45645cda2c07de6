"""The demo's processes: started, watched, and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.faults import MachineError

STOP_GRACE_S = 20.0
"""Daemons end within their own grace; whoever needs longer hangs, and is killed."""

RUN_S = 60.0
"""What ends by itself takes a few seconds on a busy machine."""

TAIL_LINES = 15

_TETHER = Path(__file__).with_name("tether.py")


@dataclass(frozen=True)
class Member:
    """One process, with the file that its output goes to."""

    name: str
    process: asyncio.subprocess.Process
    log: Path


class Crew:
    """Owns the child processes: none outlives it."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._stopping = False

    async def start(self, name: str, module: str, arguments: Sequence[str], log: Path) -> Member:
        """Starts `python -m module arguments`; output to `log`.

        In a session of its own, or a terminal's Ctrl-C would reach it at the same time as us and nothing would end in order.
        """
        command = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), sys.executable, "-m", module, *arguments]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=_environment(),
            )
        member = Member(name, process, log)
        self._members.append(member)
        return member

    async def run(self, name: str, module: str, arguments: Sequence[str], log: Path, stdin: str) -> None:
        """Runs `python -m module arguments` to its end, which must be a good one; output to `log`. MachineError otherwise."""
        command = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), sys.executable, "-m", module, *arguments]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=_environment(),
            )
        member = Member(name, process, log)
        try:
            await asyncio.wait_for(process.communicate(stdin.encode()), RUN_S)
        except asyncio.TimeoutError:
            raise MachineError(f"{name} did not end within {RUN_S:.0f} s.", f"All it wrote is in {log}.") from None
        finally:
            if process.returncode is None:
                _signal_group(member, signal.SIGKILL)
                await process.wait()
        if process.returncode:
            raise died(member)

    async def death(self) -> MachineError:
        """Waits until a member ends by itself, and says which, how, and what it wrote last."""
        waits = {asyncio.ensure_future(member.process.wait()): member for member in self._members}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return died(waits[done.pop()])

    async def stop(self) -> None:
        """Agents first, the last started first of all, then the coordinator: SIGTERM, and SIGKILL after the grace."""
        self._stopping = True
        try:
            await asyncio.gather(*(_end(member) for member in self._members[1:]))
            for member in self._members[:1]:
                await _end(member)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends whoever is left at once, with the processes it started."""
        for member in self._members:
            if member.process.returncode is None:
                _signal_group(member, signal.SIGKILL)


def died(member: Member) -> MachineError:
    """What to tell of a member that ended by itself."""
    code = member.process.returncode
    how = f"was ended by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
    last = tail(member.log)
    said = f" It wrote last:\n\n{last}\n" if last else " It wrote nothing."
    return MachineError(f"{member.name} {how}.{said}", f"All it wrote is in {member.log}.")


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    with contextlib.suppress(FileNotFoundError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode("utf-8", "replace")
        return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])
    return ""


async def _end(member: Member) -> None:
    if member.process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        member.process.terminate()
    try:
        await asyncio.wait_for(member.process.wait(), STOP_GRACE_S)
    except asyncio.TimeoutError:
        _signal_group(member, signal.SIGKILL)
        await member.process.wait()


def _signal_group(member: Member, number: signal.Signals) -> None:
    # Its session's group has its own id; the training child of an agent is in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(member.process.pid, number)


def _environment() -> dict[str, str]:
    """Ours without settings meant for other daemons of this person; and no way to a model hub, which the demo never needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
