"""The supervisor: what ends badly is started again, what ends well or by its settings is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.coordinator.testbed import supervise

SUPERVISE = supervise.__file__


def _supervised(script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", str(SUPERVISE), "/bin/sh", "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_who_is_killed_is_started_again(tmp_path: Path) -> None:
    with _supervised(f'if [ -e {tmp_path}/second ]; then echo again; exit 0; fi; touch {tmp_path}/second; kill -9 "$$"') as process:
        assert process.stdout is not None
        assert process.stdout.read() == "testbed: ended by signal SIGKILL; started again in 1 s\nagain\n"
    assert process.returncode == 0


@pytest.mark.parametrize("code", supervise.HOPELESS)
def test_who_ends_well_or_by_its_settings_is_not(code: int) -> None:
    with _supervised(f"echo once; exit {code}") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "once\n"
    assert process.returncode == code


def test_sigterm_ends_the_program_and_then_the_supervisor() -> None:
    with _supervised('trap "echo told; exit 0" TERM; echo ready; while :; do sleep 0.05; done') as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "told\n"
    assert process.returncode == 0
