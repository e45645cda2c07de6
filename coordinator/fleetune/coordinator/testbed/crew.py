"""The members that run as processes of this machine: started under a supervisor each, joined to the fleet, watched and ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import procs
from fleetune.coordinator.testbed.backend import COORDINATOR, Life, Place
from fleetune.coordinator.testbed.material import config_file
from fleetune.coordinator.testbed.statefile import write_json

READY_S = 180.0
"""A board of half a core takes its time to start Python."""

STOP_S = 30.0
CALL_S = 120.0
LOOK_S = 0.2
ASK_S = 1.0
TAIL_BYTES = 4000
LOG_BYTES = 64_000
JOIN_USES_S = "1h"

MARK = "TESTBED_MEMBER"
"""In the environment of every process of a member, so that it is found again and nobody else's is taken for it."""

_SUPERVISE = Path(__file__).with_name("supervise.py")


class Ground(Protocol):
    """Where the processes run: this machine as it is, or hosts of their own."""

    @property
    def listen(self) -> str:
        """HOST:PORT of the coordinator."""
        ...

    @property
    def join_listen(self) -> str: ...

    def inside(self, member: str, command: Sequence[str]) -> list[str]:
        """`command` as it has to be started to run on a member's host, within its quotas."""
        ...

    def beside(self, command: Sequence[str]) -> list[str]:
        """`command` as it has to be started to reach the coordinator, within no quota."""
        ...

    def pids(self, member: str) -> list[int]:
        """All processes of a member, but for its supervisor."""
        ...

    def state_dir(self, member: str) -> Path: ...


@dataclass(frozen=True)
class Supervisor:
    """Of one member, as its file says."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        return procs.alive(self.pid, self.start_ticks)


class Crewed:
    """The part of a backend that its crew does."""

    _crew: Crew

    def stop(self) -> None:
        self._crew.stop()

    def check(self) -> list[dict[str, Any]]:
        return self._crew.check()

    def verb(self, *arguments: str) -> Sequence[str]:
        return self._crew.verb(*arguments)

    def log(self, member: str) -> str:
        return self._crew.log(member)

    def kill(self, member: str) -> None:
        self._crew.kill(member)

    def restart(self, member: str) -> None:
        self._crew.start(member)

    def pause(self, member: str) -> None:
        self._crew.pause(member)

    def resume(self, member: str) -> None:
        self._crew.resume(member)


class Crew:
    """All that the backends `netns` and `process` do alike. Remembers in DIR/backend, so that another process goes on."""

    def __init__(self, place: Place, ground: Ground) -> None:
        self._place = place
        self._ground = ground
        self._members = place.own / "members"
        self._logs = place.own / "logs"

    def enrol(self, say: Callable[[str], None]) -> None:
        """Everything from an empty folder to agents that are online. MachineError where that fails."""
        self._members.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(exist_ok=True)
        say("making the coordinator")
        self._ask("init", "--state-dir", str(self._ground.state_dir(COORDINATOR)), "--address", self._ground.listen)
        self.start(COORDINATOR)
        address = self._ground.state_dir(COORDINATOR) / "address"
        self._until(address.exists, "the coordinator is ready", (COORDINATOR,))
        names = self._place.spec.names
        line = json.loads(self._ask("token", "create", "--uses", str(len(names)), "--ttl", JOIN_USES_S, "--json"))["line"]
        say("joining the devices")
        for name in names:
            self._join(name, line)
        for name in names:
            self.start(name)
        say("waiting for the devices")
        self._until(lambda: self.online() >= set(names), "all devices are online", (COORDINATOR, *names), pause_s=ASK_S)

    def start(self, member: str) -> None:
        """Its supervisor, detached from this process; a running one stays as it is."""
        if (found := self.supervisor(member)) is not None and found.alive:
            return
        command = [sys.executable, "-I", "-S", str(_SUPERVISE), *self._ground.inside(member, self._command(member))]
        environment = {**_environment(), "FLEETUNE_IDENTITY": str(self._identity), MARK: self.mark(member)}
        log = str(self._logs / f"{member}.log")
        # Not a Popen: nobody waits for it here. A session of its own, so that Ctrl-C and the terminal's end do not reach it.
        pid = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        facts = procs.facts(pid)
        # It has ended at once where there are none; then its file names nobody.
        ticks = facts.start_ticks if facts is not None else -1
        write_json(self._members / f"{member}.json", {"pid": pid, "start_ticks": ticks})

    def kill(self, member: str) -> None:
        """SIGKILL for its supervisor and all it has started, which are gone when this returns."""
        if (found := self.supervisor(member)) is not None and found.alive:
            procs.send([found.pid], signal.SIGKILL)
            procs.gone(found.pid, found.start_ticks, procs.END_S)
        deadline_s = time.monotonic() + procs.END_S
        while pids := self._ground.pids(member):
            procs.send(pids, signal.SIGKILL)
            if time.monotonic() > deadline_s:
                raise MachineError(f"processes {pids} of {member} do not end.", "See what holds them, for example a hung disk.")
            time.sleep(procs.LOOK_S)

    def pause(self, member: str) -> None:
        """SIGSTOP for all its processes, also those that are just being made."""
        for _ in range(10):
            pids = [pid for pid in self._ground.pids(member) if (facts := procs.facts(pid)) is not None and facts.state not in "TZ"]
            if not pids:
                return
            procs.send(pids, signal.SIGSTOP)
            time.sleep(procs.LOOK_S)

    def resume(self, member: str) -> None:
        procs.send(self._ground.pids(member), signal.SIGCONT)

    def life(self, member: str) -> Life:
        found = self.supervisor(member)
        if found is None:
            return "missing"
        states = [facts.state for pid in self._ground.pids(member) if (facts := procs.facts(pid)) is not None and facts.state != "Z"]
        if not states:
            return "ended"
        return "paused" if all(state == "T" for state in states) else "running"

    def stop(self) -> list[str]:
        """Agents first, then the coordinator: SIGTERM, and SIGKILL for what is left. Who was there, in words."""
        ended: list[str] = []
        names = [file.stem for file in sorted(self._members.glob("*.json"))] if self._members.is_dir() else []
        for wave in ([name for name in names if name != COORDINATOR], [name for name in names if name == COORDINATOR]):
            there = [(name, found) for name in wave if (found := self.supervisor(name)) is not None and found.alive]
            for name, _ in there:
                self.resume(name)  # one that is paused hears nothing
            procs.send([found.pid for _, found in there], signal.SIGTERM)
            deadline_s = time.monotonic() + STOP_S
            for _, found in there:
                procs.gone(found.pid, found.start_ticks, max(0.0, deadline_s - time.monotonic()))
            for name in wave:
                self.kill(name)
            ended += [name for name, _ in there]
        return ended

    def online(self) -> set[str]:
        """Names of the devices that the coordinator hears."""
        devices: list[dict[str, Any]] = json.loads(self._ask("devices", "--json"))["devices"]
        return {str(device["name"]) for device in devices if device["online"]}

    def verb(self, *arguments: str) -> list[str]:
        """The command for `fleetune ARGUMENTS...` as this testbed's operator."""
        kept = ["-u", "FLEETUNE_COORDINATOR", "-u", "FLEETUNE_PLAINTEXT", f"FLEETUNE_IDENTITY={self._identity}", "HF_HUB_OFFLINE=1"]
        return self._ground.beside(["env", *kept, sys.executable, "-m", "fleetune.coordinator.cli", *arguments])

    def check(self) -> list[dict[str, Any]]:
        """Violations in what the stopped coordinator has left."""
        state = self._ground.state_dir(COORDINATOR)
        if not state.is_dir():
            raise MachineError(f"nothing of the coordinator is left in {state}.")
        command = [sys.executable, "-m", "fleetune.coordinator.cli", "check", str(state), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CALL_S, env=_environment())
        document = json.loads(done.stdout or "{}")
        if "violations" not in document:
            raise MachineError(f"the history could not be checked: {(done.stdout + done.stderr).strip()[-TAIL_BYTES:]}")
        return list(document["violations"])

    def log(self, member: str) -> str:
        try:
            with (self._logs / f"{member}.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def supervisor(self, member: str) -> Supervisor | None:
        """None where it was never started."""
        try:
            document = json.loads((self._members / f"{member}.json").read_text(encoding="utf-8"))
            return Supervisor(int(document["pid"]), int(document["start_ticks"]))
        except FileNotFoundError:
            return None

    def mark(self, member: str) -> str:
        return f"{self._place.prefix}-{member}"

    @property
    def _identity(self) -> Path:
        return self._place.own / "operator"

    def _command(self, member: str) -> list[str]:
        state = str(self._ground.state_dir(member))
        if member == COORDINATOR:
            ways = ["--listen", self._ground.listen, "--join-listen", self._ground.join_listen]
            return [sys.executable, "-m", "fleetune.coordinator.cli", "serve", "--state-dir", state, *ways]
        config = str(config_file(self._place.folder, member))
        return [sys.executable, "-m", "fleetune.agent.cli", "run", "--config", config, "--state-dir", state]

    def _join(self, name: str, line: str) -> None:
        # Beside the quotas: joining is no part of what is looked at, and a board takes long to start Python.
        arguments = ["join", "--config", str(config_file(self._place.folder, name)), "--state-dir", str(self._ground.state_dir(name)), "-"]
        self._run(self._ground.beside([sys.executable, "-m", "fleetune.agent.cli", *arguments]), f"{name} could not join", f"{line}\n")

    def _ask(self, *arguments: str) -> str:
        return self._run(self.verb(*arguments), f"`fleetune {' '.join(arguments[:2])}` failed")

    def _run(self, command: Sequence[str], what: str, stdin: str = "") -> str:
        try:
            done = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=CALL_S,
                env=_environment(),
                cwd=self._place.folder,
            )
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"{what}: no end within {CALL_S:g} s.") from error
        if done.returncode:
            raise MachineError(f"{what}: {(done.stderr or done.stdout).strip()[-TAIL_BYTES:]}")
        return done.stdout

    def _until(self, there: Callable[[], bool], what: str, members: Sequence[str], pause_s: float = LOOK_S) -> None:
        deadline_s = time.monotonic() + READY_S
        while not there():
            for member in members:
                found = self.supervisor(member)
                if found is None or not found.alive:
                    raise MachineError(f"{member} has ended. It wrote last:\n{self.log(member)[-TAIL_BYTES:]}")
            if time.monotonic() > deadline_s:
                raise MachineError(f"not within {READY_S:g} s: {what}.", "`fleetune testbed down` clears away; a smaller testbed may do.")
            time.sleep(pause_s)


def environment_facts() -> dict[str, Any]:
    """What this machine is, for the record."""
    release = os.uname()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": cores, "memory_mib": memory >> 20, "kernel": release.release, "machine": release.machine, "missing": []}


def remove_tree(folder: Path) -> bool:
    """Whether there was one."""
    there = folder.exists()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    return there


def _environment() -> Mapping[str, str]:
    """Ours without settings meant for other daemons of this person; and no way to a model hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
