"""A fleet whose coordinator is put back to a backup while its real agents come from the future that was lost."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.coordinator import backup, restore
from fleetune.v1 import control_pb2
from support.fleet import Agent, Fleet, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 100_000
"""Of milliseconds each: the job is never over by itself."""

MORE = 20
"""Rounds after the restore, at least."""


def outbox(fleet: Fleet, name: str) -> list[tuple[str, int]]:
    """Task ids and epochs of what an agent has in its outbox."""
    with closing(sqlite3.connect(fleet.state_of(name) / "outbox" / "outbox.sqlite")) as raw:
        return raw.execute("SELECT task_id, epoch FROM results").fetchall()


def frozen_with_a_result(fleet: Fleet) -> bool:
    """Freeze the coordinator; False, and it runs on, where no agent has anything for it at that moment."""
    os.kill(fleet.pid("coordinator"), signal.SIGSTOP)
    time.sleep(0.3)
    if any(outbox(fleet, name) for name in ("a", "b")):
        return True
    os.kill(fleet.pid("coordinator"), signal.SIGCONT)
    return False


def test_agents_with_results_of_the_lost_future_are_told_and_train_again(tmp_path: Path) -> None:
    job = toml({"name": "link", "method": {"name": "echo", "state_mib": 0.1}, "rounds": {"count": ROUNDS}, "devices": {"minimum": 2}})
    # A lease that outlasts every try to come back: no round closes without one of them.
    lease = ("--heartbeat-s", "0.5", "--lease-s", "60")
    with Fleet(tmp_path / "fleet", {"a": Agent(), "b": Agent()}, coordinator=lease) as fleet:
        job_id = fleet.submit(job)
        fleet.until(job_id, lambda view: view.rounds_committed >= 3, "three rounds")
        backup.make(fleet.coordinator_state, tmp_path / "b.tar")
        before = fleet.view(job_id).rounds_committed
        fleet.until(job_id, lambda view: view.rounds_committed >= before + 3, "rounds after the backup")
        fleet.poll(lambda: frozen_with_a_result(fleet), "a result without a receipt")
        fleet.disconnect()
        fleet.kill9("coordinator")
        lost = {task_id for name in ("a", "b") for task_id, _ in outbox(fleet, name)}
        os.replace(fleet.coordinator_state, tmp_path / "lost")

        done = restore.restore(tmp_path / "b.tar", fleet.coordinator_state)
        fleet.start_coordinator()
        fleet.until(job_id, lambda view: view.rounds_committed >= before + MORE, "rounds after the restore")
        # Between two rounds: everything that was begun is folded then.
        fleet.pause(job_id)
        view = fleet.until(job_id, lambda view: view.state == control_pb2.JOB_STATE_PAUSED, "the job to stand")
        rounds = view.rounds_committed

        assert f"epochs than {done.epoch} are refused" in fleet.log_of("coordinator")
        fleet.poll(lambda: not any(outbox(fleet, name) for name in ("a", "b")), "empty outboxes")
        told = "".join(fleet.log_of(name) for name in ("a", "b"))
        for task_id in lost:
            # Refused, or given up for the new task of that id where this one came first.
            refused = re.search(rf"result refused task={task_id} .*older state was restored", told)
            assert refused or told.count(f"task received task={task_id} ") == 2, fleet.logs()
        with closing(sqlite3.connect(fleet.coordinator_state / "coordinator.sqlite")) as raw:
            counted = raw.execute("SELECT count(*), count(DISTINCT task_id) FROM updates WHERE status = 'accepted'").fetchone()
        assert counted == (2 * rounds, 2 * rounds)
