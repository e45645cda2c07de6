"""The coordinator's wall clock is set while it runs: leases, sessions and rounds without a deadline do not notice."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from fleetune.coordinator import daemon
from fleetune.coordinator.rounds.engine import Engine
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent

HOUR_S = 3600.0


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S, 10 * 365 * 24 * HOUR_S, -24 * HOUR_S])
async def test_a_wall_clock_that_jumps_ends_no_session_and_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    ahead_s = 0.0

    def wall() -> float:
        return time.time() + ahead_s

    # Only the coordinator's: the agents are in this process, and gRPC's client reckons its deadlines by the clock.
    monkeypatch.setattr(daemon, "Engine", functools.partial(Engine, wall=wall))
    async with coordinating(tmp_path) as c, EchoAgent(c.address, "a") as a, EchoAgent(c.address, "b") as b:
        job = await c.submit(echo_job(rounds=3, minimum=2), "the-job-of-the-clock")
        task = await a.next_task()
        update = await a.trained(task)
        ahead_s = jump_s
        began_unix_s = job.submitted_unix_s
        b.serve()
        assert (await a.upload(task, update)).status
        a.serve()
        await c.ended(job)
        assert (job.machine.status, job.machine.committed) == ("completed", 3)
        # It was the new time that the engine went by.
        assert abs(job.machine.ended_unix_s - began_unix_s - jump_s) < HOUR_S / 2
        assert sorted(c.engine.registry.sessions) == ["device-a", "device-b"]
        assert not a.ended.is_set() and not b.ended.is_set()
        # Nobody was left behind, and nothing was given out a second time.
        assert [len(entry.trained()) for number in (1, 2, 3) if (entry := job.history.get(number)) is not None] == [2, 2, 2]
