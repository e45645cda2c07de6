"""The audit log: what operators ask for is written down with its outcome."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest
from sqlalchemy import text

from fleetune.coordinator.store import records
from fleetune.v1 import control_pb2 as pb
from support.coordinating import Coordinator, coordinating, echo_job

Told = list[tuple[str, str, str]]


async def told(coordinator: Coordinator, limit: int = 0) -> Told:
    entries = (await coordinator.control.ListAudit(pb.ListAuditRequest(limit=limit))).entries
    assert all(entry.unix_s > 0 and "127.0.0.1" in entry.actor for entry in entries)
    return [(entry.action, entry.subject, entry.outcome) for entry in entries]


async def test_what_operators_did_is_told_in_order_also_after_a_restart(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        control = coordinator.control
        job_id = (await control.SubmitJob(pb.SubmitJobRequest(job_toml=echo_job(), submit_id="submit-1"))).job_id
        await control.PauseJob(pb.PauseJobRequest(job_id=job_id))
        await control.ResumeJob(pb.ResumeJobRequest(job_id=job_id))
        await control.CancelJob(pb.CancelJobRequest(job_id="last", reason="wrong data"))
        (last,) = (await control.ListAudit(pb.ListAuditRequest(limit=1))).entries
        assert last.detail == "wrong data"
    expected = [(action, job_id, "done") for action in ("submit", "pause", "resume", "cancel")]
    async with coordinating(tmp_path) as coordinator:
        assert await told(coordinator) == expected
        assert await told(coordinator, limit=2) == expected[-2:]


async def test_what_was_refused_is_told_with_its_reason(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        await coordinator.control.SubmitJob(pb.SubmitJobRequest(job_toml="name = 3", submit_id="submit-1"))
        with pytest.raises(grpc.aio.AioRpcError):
            await coordinator.control.CancelJob(pb.CancelJobRequest(job_id="nothing\nsuch"))
        entries = (await coordinator.control.ListAudit(pb.ListAuditRequest())).entries
    assert [(entry.action, entry.outcome) for entry in entries] == [("submit", "refused"), ("cancel", "refused")]
    assert "name" in entries[0].detail
    assert "\n" not in entries[1].subject
    assert entries[1].detail == "no such job"


async def test_a_full_disk_loses_the_row_and_no_more(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        database = coordinator.engine._database
        pages = await database.write(lambda tx: tx.execute(text("PRAGMA page_count")).scalar())
        await database.write(lambda tx: tx.execute(text(f"PRAGMA max_page_count = {pages}")))
        row = records.AuditRow(1.0, "a", "cancel", "j", "done", "x" * 100_000)
        assert await database.try_write(lambda tx: records.add_audit(tx, row)) is False
        await database.write(lambda tx: tx.execute(text("PRAGMA max_page_count = 1000000")))
        assert await database.try_write(lambda tx: records.add_audit(tx, row)) is True
