"""Hundreds of rounds leave the coordinator with structures of the size that they had after a few dozen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import blob
from support.coordinating import Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent
from support.growth import grown, held

ROUNDS = 300


def sizes(coordinator: Coordinator) -> Counter[str]:
    """Of all that serves; figures of a moment, so they are asked for between two rounds."""
    return held({"engine": coordinator.engine, "fleet": coordinator.fleet, "blob": coordinator.blob_service})


async def at_rest(coordinator: Coordinator, job: LiveJob, rounds: int) -> Counter[str]:
    """The sizes once so many rounds are committed and all that follows a round is done; the job is paused meanwhile."""
    await coordinator.until(job, lambda job: job.machine.status == "paused" and job.machine.committed >= rounds)
    await coordinator.pause(job)  # once more: it is answered when what was decided before it is committed and acted on
    while job.work:
        await next(iter(job.work))
    await coordinator.engine.retention.forget(())
    return sizes(coordinator)


@pytest.mark.timeout(600)
async def test_no_structure_of_the_coordinator_grows_with_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob, "SUMS_KEPT", 8)
    async with coordinating(tmp_path) as coordinator:
        async with EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "b") as b:
            a.serve()
            b.serve()
            job = await coordinator.submit(echo_job(rounds=ROUNDS, minimum=2), evaluated=True)
            found: list[Counter[str]] = []
            for rounds in (ROUNDS // 5, ROUNDS - 10):
                await coordinator.until(job, lambda job, rounds=rounds: job.machine.committed >= rounds)  # type: ignore[misc]
                await coordinator.pause(job)
                found.append(await at_rest(coordinator, job, rounds))
                await coordinator.resume(job)
            await coordinator.ended(job)
    assert job.machine.committed == ROUNDS
    assert len(found[0]) > 20, "the walk has gone into the parts"
    growth = {place: size for place, size in grown(*found).items() if not place.startswith("blob._sums")}
    assert not growth
    assert found[1]["blob._sums"] <= 8
