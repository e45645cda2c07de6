"""What the agent remembers of its tasks is bounded, also of those that never came to an end."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fleetune.agent import config, work
from fleetune.agent.credentials import Credentials
from fleetune.agent.daemon import UPLOADS_TOLD_MAX, Daemon
from fleetune.agent.domain import Blob, Task, TaskKind, Update


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    """One that does nothing with what it hears."""
    address = "127.0.0.1:7433"
    settings = config.load(None, {}, {"coordinator": address, "state_dir": str(tmp_path)})
    made = Daemon(settings, Credentials(tmp_path, None, address), "id", "test")
    made._dispatch = lambda event: None  # type: ignore[method-assign]
    return made


def test_tasks_that_are_withdrawn_again_and_again_are_forgotten(daemon: Daemon) -> None:
    for number in range(1, 1001):
        daemon.task(Task(f"job/{number}/id/train", number, 1, "job", number, TaskKind.TRAIN, "echo"))
        daemon.cancel(f"job/{number}/id/train", "the round is over")
    assert len(daemon._received_s) == work.RECENT_MAX
    assert "job/1000/id/train" in daemon._received_s


async def test_uploads_that_are_withdrawn_half_way_are_forgotten(daemon: Daemon) -> None:
    hear = daemon._upload_progress()
    throttles = inspect.getclosurevars(hear).nonlocals["throttles"]
    for number in range(100):
        hear(Update(f"job/{number}/id/train", number, 1, Blob("0" * 64, 10), "file", b""), 5, 10)
    assert len(throttles) == UPLOADS_TOLD_MAX
    for number in range(84, 100):
        hear(Update(f"job/{number}/id/train", number, 1, Blob("0" * 64, 10), "file", b""), 10, 10)
    assert not throttles
