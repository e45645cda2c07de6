"""A real fleet on loopback: a coordinator and agents as processes of their own, whose end is checked for orphans."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import grpc
import psutil

from fleetune.v1 import control_pb2, control_pb2_grpc, messages_pb2
from fleetune.wire.identity import Identity
from support import enrolling
from support.ports import HeldPort

READY_S = 180.0
"""From a process's start until it serves or is connected; only a hang takes longer."""

CALL_S = 180.0
JOB_S = 360.0
"""Longest wait for a state of a job; below a test's own limit, so that the logs are told."""

STOP_S = 180.0
TAIL_LINES = 60
MARK = "FLEET_OF_A_TEST"

ENDED = frozenset({control_pb2.JOB_STATE_COMPLETED, control_pb2.JOB_STATE_FAILED, control_pb2.JOB_STATE_CANCELLED})

JobView = control_pb2.JobView


@dataclass(frozen=True)
class Agent:
    """One device of a fleet. `data` maps a name to "train[,validation]"; `settings` are further settings of agent.toml."""

    data: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    prelude: str = ""
    """Python that runs in the agent's process before the agent does: makes it another version than ours."""


@dataclass
class Running:
    """A started process and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path


class FleetError(AssertionError):
    """The fleet did not do what the test waits for; the message ends with the logs."""


class Fleet:
    """Used with `with`: starts everything, waits until it is ready, and ends all of it in order.

    The port stays the same over restarts of the coordinator, so that agents find it again.
    """

    def __init__(
        self,
        folder: Path,
        agents: Mapping[str, Agent],
        *,
        coordinator: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_agents: bool = True,
        plaintext: bool = False,
    ) -> None:
        """With mutual TLS, unless `plaintext`: the fleet gets an authority, and each agent joins before its first start."""
        self.folder = folder
        self.agents = dict(agents)
        self.address = ""
        self._coordinator_options = tuple(coordinator)
        self._start_agents = start_agents
        self._plaintext = plaintext
        self._operator: Identity | None = None
        self._mark = uuid.uuid4().hex
        # Settings of whoever runs the tests have no business here, nor has a model hub.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEETUNE_", "STATE_DIRECTORY", "XDG_"))}
        self._environment = {
            **kept,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
            MARK: self._mark,
            **(environment or {}),
        }
        self._running: dict[str, Running] = {}
        self._channel: grpc.Channel | None = None
        self._port: HeldPort | None = None

    # -- life

    def __enter__(self) -> Fleet:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._plaintext:
            self._operator = enrolling.initialised(self.coordinator_state, self.operator_folder)
        try:
            self.start_coordinator()
            if self._start_agents:
                self.enrol(*self.agents)
                for name in self.agents:
                    self.start(name, wait=False)
                self.online(*self.agents)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        codes = self._end()
        if kind is not None:
            # pytest shows what is printed of a failed test only.
            print(self.logs())
            return
        left = self.left_behind()
        self._kill_left()
        assert not left, f"processes outlived the fleet: {left}\n{self.logs()}"
        assert not any(codes.values()), f"a stopped daemon exits with 0: {codes}\n{self.logs()}"

    def _end(self) -> dict[str, int]:
        """Agents first, then the coordinator; the exit codes of those that were still running."""
        codes: dict[str, int] = {}
        self.disconnect()
        names = [name for name in self._running if name != "coordinator"]
        for name in names:
            if self.alive(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid(name), signal.SIGCONT)
                self._running[name].process.terminate()
        for name in [*names, "coordinator"]:
            if not self.alive(name):
                continue
            process = self._running[name].process
            if name == "coordinator":
                process.terminate()
            try:
                codes[name] = process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        if self._port is not None:
            self._port.close()
        return codes

    # -- processes

    def start_coordinator(self) -> None:
        """On the port it had before, if it had one."""
        state = self.coordinator_state
        if self._port is None:
            # Nobody else's while the coordinator is away: agents dial it, and other tests look for free ports.
            self._port = HeldPort()
        else:
            # Of the coordinator before, where that was killed. At the first start a file would be that of another one on this folder.
            (state / "address").unlink(missing_ok=True)
        arguments = ["serve", "--listen", self._port.address, "--state-dir", str(state)]
        # The port after ours may be anybody's.
        arguments += ["--plaintext"] if self._plaintext else ["--join-listen", "127.0.0.1:0"]
        arguments += self._coordinator_options
        self._spawn("coordinator", ["-m", "fleetune.coordinator.cli", *arguments], {})
        self.poll(lambda: (state / "address").exists() or not self.alive("coordinator"), "the coordinator to be ready")
        if not self.alive("coordinator"):
            raise FleetError(f"the coordinator did not start\n{self.logs()}")
        self.address = (state / "address").read_text(encoding="ascii").strip()

    def stop_coordinator(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the coordinator by a signal; its exit code."""
        self.disconnect()
        process = self._running["coordinator"].process
        process.send_signal(number)
        return process.wait(STOP_S)

    def restart_coordinator(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it by `number` and starts it on the same state and port."""
        self.stop_coordinator(number)
        self.start_coordinator()

    def start(self, name: str, *, wait: bool = True) -> None:
        """Start an agent, new or stopped before; with `wait`, until it is connected."""
        self.enrol(name)
        agent = self.agents[name]
        arguments = ["run", "--coordinator", self.address, "--name", name, "--state-dir", str(self.state_of(name))]
        for data, files in agent.data.items():
            arguments += ["--data", f"{data}={files}"]
        if agent.tags:
            arguments += ["--set", f"tags={','.join(agent.tags)}"]
        for setting, value in {"training.cores": 1, **agent.settings}.items():
            arguments += ["--set", f"{setting}={value}"]
        if self._plaintext:
            arguments.append("--plaintext")
        start = ["-m", "fleetune.agent.cli"]
        if agent.prelude:
            start = ["-c", f"{agent.prelude}; from fleetune.agent.cli import main; main()"]
        self._spawn(name, [*start, *arguments, *agent.options], agent.environment)
        if wait:
            self.online(name)

    def enrol(self, *names: str) -> None:
        """Let agents join that have not; nothing in plaintext."""
        if self._operator is not None:
            enrolling.joined(self.address, self._operator, [(name, self.state_of(name)) for name in names])

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """End an agent by a signal; its exit code."""
        process = self._running[name].process
        process.send_signal(number)
        return process.wait(STOP_S)

    def kill9(self, name: str) -> None:
        """What a power cut does to an agent or the coordinator."""
        self._running[name].process.kill()
        self._running[name].process.wait()

    def freeze(self, name: str) -> None:
        """Stop an agent's process where it stands; its connection stays open."""
        os.kill(self.pid(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGCONT)

    def child_of(self, name: str) -> psutil.Process | None:
        """The child process that computes for an agent or the coordinator, if there is one."""
        children = psutil.Process(self.pid(name)).children()
        return children[0] if children else None

    def pid(self, name: str) -> int:
        return self._running[name].process.pid

    def alive(self, name: str) -> bool:
        return name in self._running and self._running[name].process.poll() is None

    def wait_exit(self, name: str, timeout_s: float = READY_S) -> int:
        """The exit code of a process that ends by itself."""
        try:
            return self._running[name].process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FleetError(f"{name} has not ended by itself\n{self.logs()}") from None

    # -- places

    @property
    def operator_folder(self) -> Path:
        """Identity of the operator as whom the test and `cli` ask."""
        return self.folder / "operator"

    @property
    def coordinator_state(self) -> Path:
        return self.folder / "coordinator"

    def state_of(self, name: str) -> Path:
        return self.folder / "agents" / name

    def job_folder(self, job_id: str) -> Path:
        return self.coordinator_state / "jobs" / job_id

    def log_of(self, name: str) -> str:
        """Everything that a process has written, over all its starts."""
        return self._log(name).read_text(encoding="utf-8", errors="replace") if self._log(name).exists() else ""

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        parts: list[str] = []
        for name in self._running:
            lines = self.log_of(name).splitlines()[-TAIL_LINES:]
            parts.append(f"--- {name}\n" + "\n".join(lines))
        return "\n".join(parts)

    # -- jobs

    @property
    def control(self) -> control_pb2_grpc.ControlServiceStub:
        if self._channel is None:
            self._channel = enrolling.dialled(self.address, self._operator)
        return control_pb2_grpc.ControlServiceStub(self._channel)

    def disconnect(self) -> None:
        """Close the test's own connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def submit(self, toml: str) -> str:
        """The new job's id; an AssertionError with the complaints where the file is wrong."""
        answer = self.control.SubmitJob(
            control_pb2.SubmitJobRequest(job_toml=toml, submit_id=uuid.uuid4().hex), timeout=CALL_S, wait_for_ready=True
        )
        assert not answer.complaints, f"{answer.complaints}\n{toml}"
        return answer.job_id

    def view(self, job_id: str) -> JobView:
        """The job with its history."""
        return self.control.GetJob(control_pb2.GetJobRequest(job_id=job_id), timeout=CALL_S, wait_for_ready=True).job

    def until(self, job_id: str, wanted: Callable[[JobView], bool], what: str, timeout_s: float = JOB_S) -> JobView:
        """Follow the job until `wanted`; woken by the coordinator at each change. FleetError when it ends before or takes too long."""
        deadline = time.monotonic() + timeout_s
        view = self.view(job_id)
        while not wanted(view):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or view.state in ENDED:
                raise FleetError(f"waited for {what}, but: {words(view)}\n{self.logs()}")
            stream = self.control.WatchJob(control_pb2.WatchJobRequest(job_id=job_id), timeout=left_s)
            try:
                for answer in stream:
                    view = answer.job
                    if wanted(view):
                        return view
            except grpc.RpcError:
                # What is raised here is the call itself, which grpc's types do not tell.
                if stream.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            finally:
                stream.cancel()
            view = self.view(job_id)
        return view

    def wait(self, job_id: str, timeout_s: float = JOB_S) -> JobView:
        """The job once it has ended, with its history."""
        self.until(job_id, lambda view: view.state in ENDED, "the job's end", timeout_s)
        return self.view(job_id)

    def completed(self, toml: str) -> JobView:
        """Run a job to its end, which must be a good one."""
        view = self.wait(self.submit(toml))
        if view.state != control_pb2.JOB_STATE_COMPLETED:
            raise FleetError(f"the job did not complete: {words(view)}\n{self.logs()}")
        return view

    def pause(self, job_id: str) -> None:
        """No further round is opened; one that is open goes on."""
        self.control.PauseJob(control_pb2.PauseJobRequest(job_id=job_id), timeout=CALL_S, wait_for_ready=True)

    def resume(self, job_id: str) -> None:
        self.control.ResumeJob(control_pb2.ResumeJobRequest(job_id=job_id), timeout=CALL_S, wait_for_ready=True)

    def published(self, view: JobView) -> Path:
        """The final adapter's folder; it is written after the commit that the view tells of."""
        folder = self.job_folder(view.job_id) / "final"
        self.poll(lambda: (folder / "manifest.json").exists(), f"{folder} to be written")
        return folder

    def devices(self) -> dict[str, control_pb2.DeviceView]:
        answer = self.control.ListDevices(control_pb2.ListDevicesRequest(), timeout=CALL_S, wait_for_ready=True)
        return {device.name: device for device in answer.devices}

    def online(self, *names: str) -> None:
        """Wait until these agents are connected."""

        def there() -> bool:
            dead = [name for name in names if not self.alive(name)]
            if dead:
                raise FleetError(f"{dead} ended before being connected\n{self.logs()}")
            known = self.devices()
            return all(name in known and known[name].online for name in names)

        self.poll(there, f"{', '.join(names)} to be online")

    def offline(self, name: str) -> None:
        """Wait until the coordinator knows that an agent is gone."""
        self.poll(lambda: not self.devices()[name].online, f"{name} to be offline")

    # -- waiting

    def poll(self, reached: Callable[[], bool], what: str, timeout_s: float = READY_S) -> None:
        """For what tells nobody that it has happened."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline:
                raise FleetError(f"waited for {what}\n{self.logs()}")
            time.sleep(0.02)

    # -- what a person types

    def cli(self, *words_: str, stdin: str | None = None, timeout_s: float = JOB_S) -> subprocess.CompletedProcess[str]:
        """`fleetune WORDS` against this coordinator."""
        who = {"FLEETUNE_PLAINTEXT": "1"} if self._plaintext else {"FLEETUNE_IDENTITY": str(self.operator_folder)}
        return subprocess.run(
            [sys.executable, "-m", "fleetune.coordinator.cli", "--coordinator", self.address, *words_],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**self._environment, **who},
            check=False,
        )

    # -- orphans

    def left_behind(self, grace_s: float = 30.0) -> list[str]:
        """Processes of this fleet that still run although every daemon has ended; by the mark in their environment."""
        deadline = time.monotonic() + grace_s
        while found := [process for process in self._marked() if process.pid not in self._daemon_pids()]:
            if time.monotonic() > deadline:
                return [f"{process.pid} {' '.join(_command(process))}" for process in found]
            time.sleep(0.05)
        return []

    def _daemon_pids(self) -> set[int]:
        return {running.process.pid for running in self._running.values() if running.process.poll() is None}

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def _kill_left(self) -> None:
        for process in self._marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    # -- small parts

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _spawn(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with self._log(name).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self._environment, **environment},
                start_new_session=True,
            )
        self._running[name] = Running(process, self._log(name))


def words(view: JobView) -> str:
    """A job's state for a failure message."""
    failure = f" failure: {view.failure.message}\n{view.failure.traceback}" if view.HasField("failure") else ""
    state = control_pb2.JobState.Name(view.state)
    return f"job {view.job_id} is {state} after {view.rounds_committed} of {view.rounds_total} rounds: {view.message}{failure}"


def metric(view: control_pb2.RoundView, name: str) -> float:
    """A figure of a round's evaluation."""
    return {item.name: item.value for item in view.metrics}[name]


def task_of(
    view: control_pb2.RoundView, device: str, kind: messages_pb2.TaskKind.ValueType = messages_pb2.TASK_KIND_TRAIN
) -> control_pb2.DeviceTask:
    """A device's training or evaluation in a round."""
    return next(task for task in view.tasks if task.device_name == device and task.kind == kind)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def toml(document: Mapping[str, Mapping[str, object] | str | int]) -> str:
    """A job file: scalars at the top, one level of tables. JSON's strings, numbers, booleans and arrays are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if not isinstance(value, Mapping)]
    for key, table in document.items():
        if isinstance(table, Mapping):
            lines += [f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"
