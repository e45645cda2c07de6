"""`fleetune serve` as a process: started, refused, stopped, killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fleetune.coordinator.exitcodes import ExitCode
from fleetune.v1 import control_pb2, control_pb2_grpc

pytestmark = pytest.mark.e2e

READY_S = 180.0
"""Only a hang takes longer, also on a loaded machine."""

JOB = 'name = "waits"\n[method]\nname = "echo"\n[devices]\nminimum = 1\n'


@dataclass
class Served:
    process: subprocess.Popen[str]
    state_dir: Path
    log: Path

    @property
    def address(self) -> str:
        return (self.state_dir / "address").read_text().strip()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(READY_S)


def command(state_dir: Path, *options: str) -> list[str]:
    serve = [sys.executable, "-m", "fleetune.coordinator.cli", "serve", "--plaintext"]
    return [*serve, "--listen", "127.0.0.1:0", "--state-dir", str(state_dir), *options]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE")}


@contextlib.contextmanager
def serving(state_dir: Path, *options: str) -> Iterator[Served]:
    """A coordinator that is ready; killed at the end if it still runs."""
    log = state_dir.parent / f"{state_dir.name}.log"
    (state_dir / "address").unlink(missing_ok=True)  # a killed one leaves it
    with log.open("w") as stderr:
        process = subprocess.Popen(command(state_dir, *options), stderr=stderr, stdout=stderr, text=True, env=environment())
    served = Served(process, state_dir, log)
    try:
        deadline = time.monotonic() + READY_S
        while not (state_dir / "address").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def refused(state_dir: Path, *options: str) -> tuple[int, str]:
    """Exit code and standard error of a coordinator that does not start."""
    done = subprocess.run(command(state_dir, *options), capture_output=True, text=True, timeout=READY_S, env=environment(), check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@contextlib.contextmanager
def operator(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_coordinator_in_order(tmp_path: Path, number: int) -> None:
    with serving(tmp_path / "state") as served:
        with operator(served.address) as channel:
            assert control_pb2_grpc.ControlServiceStub(channel).ServerInfo(control_pb2.ServerInfoRequest()).protocol_major == 1
        assert served.stop(number) == 0
        assert not (served.state_dir / "address").exists()
        text = served.log.read_text()
        assert "Traceback" not in text
        assert "ready address=" in text
        assert text.rstrip().endswith("stopped")


def test_a_watcher_does_not_keep_the_coordinator_from_stopping(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as served, operator(served.address) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=JOB, submit_id="watched-job"))
        watch = control.WatchJob(control_pb2.WatchJobRequest(job_id="last"))
        assert next(iter(watch)).job.name == "waits"
        assert served.stop() == 0
        assert "Traceback" not in served.log.read_text()


def test_health_and_reflection_answer(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as served, operator(served.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # Any: the stubs know the asyncio flavour only
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        for service in ("", "fleetune.v1.FleetService", "fleetune.v1.BlobService", "fleetune.v1.ControlService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=READY_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=READY_S)
        names = {service.name for service in answer.list_services_response.service}
        assert {"fleetune.v1.FleetService", "fleetune.v1.BlobService", "fleetune.v1.ControlService", "grpc.health.v1.Health"} <= names
        assert served.stop() == 0


def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, text = refused(tmp_path / "state", "--listen", address)
    assert code == ExitCode.MACHINE
    assert address in text
    assert "--listen" in text
    assert not (tmp_path / "state" / "address").exists()


def test_a_second_coordinator_on_one_state_dir_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as served:
        address = served.address
        code, text = refused(tmp_path / "state")
        assert code == ExitCode.MACHINE
        assert str(served.process.pid) in text
        assert served.address == address
        assert served.stop() == 0


def test_plaintext_is_refused_on_an_address_for_everybody(tmp_path: Path) -> None:
    code, text = refused(tmp_path / "state", "--listen", "0.0.0.0:0")
    assert code == ExitCode.USAGE
    assert "loopback" in text and "fleetune init" in text


def test_a_damaged_database_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "coordinator.sqlite").write_bytes(b"no database" * 1000)
    code, text = refused(tmp_path / "state")
    assert code == ExitCode.USAGE
    assert "not a database" in text


def test_a_killed_coordinator_lists_its_jobs_again(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as served:
        with operator(served.address) as channel:
            control = control_pb2_grpc.ControlServiceStub(channel)
            first = control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=JOB, submit_id="killed-job"))
        assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    with serving(tmp_path / "state") as served:
        with operator(served.address) as channel:
            control = control_pb2_grpc.ControlServiceStub(channel)
            again = control.SubmitJob(control_pb2.SubmitJobRequest(job_toml=JOB, submit_id="killed-job"))
            assert again.job_id == first.job_id, "a submit that is sent twice makes one job"
            (job,) = control.ListJobs(control_pb2.ListJobsRequest()).jobs
            assert job.job_id == first.job_id
            assert job.state in {control_pb2.JOB_STATE_QUEUED, control_pb2.JOB_STATE_PREPARING, control_pb2.JOB_STATE_WAITING}
        assert served.stop() == 0
