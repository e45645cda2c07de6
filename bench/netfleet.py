"""A coordinator and unequal agents, each in a network namespace with a shaped link and a quota of processor time. Root only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fleetune.coordinator.testbed.hosts import Host, Hosts, Link
from fleetune.coordinator.testbed.limits import Limits

COORDINATOR = "co"
PORT = 7433
READY_S = 120.0
STOP_S = 20.0
CALL_S = 900.0
LOOK_S = 0.1
TAIL_BYTES = 2000


@dataclass(frozen=True)
class Board:
    """One device: cores it may use, solo link rates in bit/s, and its agent.toml."""

    name: str
    cpus: float
    up_bits_per_s: float
    down_bits_per_s: float
    memory_bytes: int | None = None
    settings: str = ""
    latency_ms: float = 0.0
    """In each direction."""


class NetFleet:
    """Ready when entered; all processes, namespaces and groups are gone when left."""

    def __init__(
        self, folder: Path, boards: Sequence[Board], *, serve: Sequence[str] = (), cpus: float = 2.0, cable: Path | None = None
    ) -> None:
        """`cable` is the program that carries the frames of links with a latency, where it is not the testbed's own."""
        self._folder = folder
        self._boards = tuple(boards)
        self._serve = tuple(serve)
        hosts = [
            Host(
                board.name,
                Limits(board.cpus, board.memory_bytes),
                Link(board.up_bits_per_s, board.down_bits_per_s, board.latency_ms),
            )
            for board in boards
        ]
        everyone = [Host(COORDINATOR, Limits(cpus)), *hosts]
        self.hosts = Hosts(everyone) if cable is None else Hosts(everyone, cable=cable)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return f"{self.hosts.address(COORDINATOR)}:{PORT}"

    def verb(self, *arguments: str, check: bool = True) -> str:
        """What `fleetune ...` prints, asked on the coordinator's host."""
        command = [sys.executable, "-m", "fleetune.coordinator.cli", *arguments]
        done = subprocess.run(
            self.hosts.command(COORDINATOR, command), capture_output=True, text=True, check=False, timeout=CALL_S, env=self._environment()
        )
        if check and done.returncode:
            raise RuntimeError(f"`fleetune {' '.join(arguments)}` ended with {done.returncode}: {done.stderr[-TAIL_BYTES:]}")
        return done.stdout

    def pid(self, name: str) -> int:
        """Of the process that `name` was started as, which the tools that put it on its host become."""
        return self._processes[name].pid

    def log_of(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def state_of(self, name: str) -> Path:
        return self._state(name)

    def online(self) -> int:
        """Devices that the coordinator sees."""
        return self._online()

    def stop_coordinator(self) -> None:
        """SIGKILL."""
        self.kill_agent(COORDINATOR)

    def start_coordinator(self) -> None:
        """Again, on the same address; ready when this returns."""
        state = self._state(COORDINATOR)
        (state / "address").unlink(missing_ok=True)
        serve = ["serve", "--state-dir", str(state), "--listen", self.address]
        self._start(COORDINATOR, ["fleetune.coordinator.cli", *serve, *self._serve])
        self._until(lambda: (state / "address").exists(), "the coordinator is ready")

    def start_agent(self, board: Board) -> None:
        arguments = ["run", "--coordinator", self.address, "--name", board.name, "--config", str(self._config(board))]
        self._start(board.name, ["fleetune.agent.cli", *arguments, "--state-dir", str(self._state(board.name))])

    def kill_agent(self, name: str) -> None:
        """SIGKILL for it and its child."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> NetFleet:
        self.hosts.__enter__()
        try:
            state = self._state(COORDINATOR)
            self.verb("init", "--state-dir", str(state), "--address", self.address)
            self.start_coordinator()
            line = json.loads(self.verb("token", "create", "--uses", str(len(self._boards)), "--json"))["line"]
            for board in self._boards:
                self._config(board).write_text(board.settings, encoding="utf-8")
                join = ["fleetune.agent.cli", "join", "--name", board.name, "--state-dir", str(self._state(board.name)), "-"]
                # On the coordinator's host: joining is no part of what is measured, and a board takes long to start Python.
                command = self.hosts.command(COORDINATOR, [sys.executable, "-m", *join])
                subprocess.run(command, input=line.encode(), check=True, capture_output=True, timeout=READY_S, env=self._environment())
            for board in self._boards:
                self.start_agent(board)
            self._until(lambda: self._online() == len(self._boards), "all devices are online")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Agents first, then the coordinator: SIGTERM, and what is left is killed with its group."""
        waves = [[name for name in self._processes if name != COORDINATOR], [COORDINATOR]]
        try:
            for wave in waves:
                there = [self._processes[name] for name in wave if name in self._processes]
                for process in there:
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()
                deadline_s = time.monotonic() + STOP_S
                for process in there:
                    try:
                        process.wait(max(0.1, deadline_s - time.monotonic()))
                    except subprocess.TimeoutExpired:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        finally:
            self.hosts.close()

    def check(self) -> None:
        """RuntimeError with the end of its log where a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                text = (self._folder / f"{name}.log").read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
                raise RuntimeError(f"{name} ended with code {process.returncode}. Its log ends with:\n{text}")

    def _online(self) -> int:
        devices = json.loads(self.verb("devices", "--json"))
        return sum(bool(device.get("online")) for device in devices.get("devices", devices))

    def _until(self, there: object, what: str) -> None:
        assert callable(there)
        deadline_s = time.monotonic() + READY_S
        while not there():
            self.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not within {READY_S:g} s: {what}")
            time.sleep(LOOK_S)

    def _start(self, name: str, arguments: list[str]) -> None:
        command = self.hosts.command(name, [sys.executable, "-m", *arguments])
        with (self._folder / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches this process only, which ends the others in order.
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment(), start_new_session=True)

    def _state(self, name: str) -> Path:
        return self._folder / name

    def _config(self, board: Board) -> Path:
        return self._folder / f"{board.name}.toml"

    def _environment(self) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
        identity = str(self._folder / "operator")
        return {**kept, "FLEETUNE_IDENTITY": identity, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
