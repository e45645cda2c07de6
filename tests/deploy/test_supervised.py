"""Both daemons as processes of their own under a supervisor that listens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs sockets of the file system")]

WATCHDOG_USEC = "30000000"
"""So seldom that pings which nobody reads do not fill the socket: what comes then is not sent a second time."""


class Supervised:
    """A daemon and what it tells; killed at the end."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener.bind(str(folder / "notify"))
        self._listener.settimeout(60)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
        told = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": WATCHDOG_USEC, "HOME": str(folder)}
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen([sys.executable, "-m", *words], env={**kept, **told}, stdout=self._log, stderr=self._log)

    def hear(self, beginning: str) -> dict[str, str]:
        """The next message that begins so, as a table."""
        while True:
            text = self._listener.recv(4096).decode()
            if text.startswith(beginning):
                return dict(line.split("=", 1) for line in text.split("\n"))

    def end(self) -> int:
        self.process.terminate()
        assert self.hear("STOPPING=1")["STATUS"]
        return self.process.wait(180)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._listener.close()
        self._log.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Supervised]:
    # Nothing listens on port 1: an agent without its coordinator is ready all the same.
    words = ["run", "--plaintext", "--coordinator", "127.0.0.1:1", "--name", "oak", "--state-dir", str(tmp_path / "state")]
    running = Supervised(tmp_path, ["fleetune.agent.cli", *words])
    yield running
    running.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Supervised]:
    words = ["serve", "--plaintext", "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    running = Supervised(tmp_path, ["fleetune.coordinator.cli", *words])
    yield running
    running.close()


def test_an_agent_tells_that_it_is_up_pings_and_tells_that_it_stops(agent: Supervised) -> None:
    assert agent.hear("READY=1")["STATUS"] == "not connected to 127.0.0.1:1, idle"
    agent.hear("WATCHDOG=1")
    assert agent.end() == 0


def test_a_coordinator_tells_that_it_is_up_pings_and_tells_that_it_stops(coordinator: Supervised) -> None:
    words = coordinator.hear("READY=1")["STATUS"]
    assert words.startswith("listens on 127.0.0.1:") and words.endswith(", 0 devices connected, no job")
    coordinator.hear("WATCHDOG=1")
    assert coordinator.end() == 0
