"""The history checker finds a real run sound, and each planted bug by name."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.coordinator import cli
from fleetune.coordinator.domain import Blob, Candidate, FoldOutcome, Prepared, Update
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.history import arithmetic, check, reader
from fleetune.coordinator.history.facts import RULES, Happened, JobHistory, RoundRow, StateFolder
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.records import UpdateRow
from fleetune.errors import ConfigError
from fleetune.wire import codec
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent

ROUNDS = 4


async def run(folder: Path) -> None:
    """A job of two devices, with a coordinator that is started again in the middle."""
    for until in (2, ROUNDS):
        async with coordinating(folder, keep_rounds=2) as coordinator:
            if not coordinator.engine.jobs:
                await coordinator.submit(echo_job(rounds=ROUNDS, minimum=2))
            (job,) = coordinator.engine.jobs.values()
            async with EchoAgent(coordinator.address, "a", samples=1) as a, EchoAgent(coordinator.address, "b", samples=3) as b:
                a.serve()
                b.serve()
                await coordinator.until(job, functools.partial(has_committed, until))
                if until == ROUNDS:
                    await coordinator.ended(job)


def has_committed(rounds: int, job: LiveJob) -> bool:
    return job.machine.committed >= rounds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a finished run, with the blobs it has cleared away beside it."""
    folder = tmp_path_factory.mktemp("history")
    retained = folder / "retained"
    retained.mkdir()

    def retire(blobs: BlobStore, digest: str) -> bool:
        if blobs.has(digest):
            blobs.path(digest).rename(retained / digest)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlobStore, "delete", retire)
        asyncio.run(run(folder / "state"))
    return folder / "state"


@pytest.fixture
def state(finished: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(finished, tmp_path / "state", symlinks=True)
    return tmp_path / "state"


@contextmanager
def database(state: Path) -> Generator[sqlite3.Connection]:
    connection = sqlite3.connect(state / reader.DATABASE)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def rules(state: Path, **more: Path) -> set[str]:
    found = reader.examine(state, **more)
    assert all(violation.rule in RULES and violation.message for violation in found)
    return {violation.rule for violation in found}


def edit_entry(state: Path, number: int, change: Callable[[dict[str, Any]], None]) -> None:  # Any: JSON
    """Change a committed round's record as a careless program would."""
    with database(state) as tx:
        entry = json.loads(tx.execute("SELECT entry FROM rounds WHERE round = ?", (number,)).fetchone()[0])
        change(entry)
        tx.execute("UPDATE rounds SET entry = ? WHERE round = ?", (json.dumps(entry), number))


def task_of(entry: dict[str, Any], device: str) -> dict[str, Any]:
    found: dict[str, Any] = next(task for task in entry["tasks"].values() if task["device_name"] == device)
    return found


def test_a_job_that_outlived_a_restart_is_sound(finished: Path) -> None:
    found = reader.examine(finished, retained=finished.parent / "retained")

    assert [str(violation) for violation in found] == []


def test_every_fold_is_computed_again_where_its_updates_are_kept(finished: Path) -> None:
    (job,) = reader.read(finished).jobs
    kept = {path.name: path for folder in ("retained", "state/blobs") for path in (finished.parent / folder).iterdir()}

    assert arithmetic.folded(job, kept.get) == [1, 2, 3, 4]


def test_an_update_that_the_disk_lost_and_the_device_sent_again_is_sound() -> None:
    """Taken back and accepted once more, under another lease."""
    blob = Blob("a" * 64, 8)
    arrived = machine.UpdateArrived("job/1/device-a/train", Update(blob, 2))
    plan = machine.JobPlan("job", 1, 1, 0, 1.0, 0.0, 0.0, 0, "none", 1, "loss", 0, 0.0, 15.0)
    played: list[machine.Event] = [
        machine.Started(),
        machine.PreparedEvent(Prepared(blob, "t")),
        machine.Offered((Candidate("device-a", "a"),)),
        arrived,
        machine.UpdateDamaged(arrived.task_id, 1, True),
        arrived,
        machine.Folded(1, FoldOutcome(blob), ()),
    ]
    state = machine.JobMachine(plan)
    commits = [c for event in played for c in state.handle(event, 5.0) if isinstance(c, machine.CommitRound)]
    events = [Happened(number, 5.0, event) for number, event in enumerate(played)]
    row = UpdateRow(arrived.task_id, "job", 1, "device-a", blob.digest, "accepted", 5.0)
    rounds = [RoundRow(1, blob.digest, 8, commit.entry) for commit in commits]
    job = JobHistory("job", "completed", "", state, rounds, [row], events)

    assert check.check(StateFolder([job], accepted_by_device={"device-a": 2})) == []
    without = replace(job, events=[item for item in events if not isinstance(item.event, machine.UpdateDamaged)])
    assert "update_counted_twice" in {found.rule for found in check.check(StateFolder([without]))}


def test_an_acknowledged_update_that_was_left_out_of_its_round_is_found(state: Path) -> None:
    def leave_out(entry: dict[str, Any]) -> None:
        task_of(entry, "b").update(update=None, status="missed")

    edit_entry(state, 2, leave_out)

    assert "update_lost" in rules(state)


def test_an_update_that_is_folded_twice_is_found(state: Path) -> None:
    def again(entry: dict[str, Any]) -> None:
        task = task_of(entry, "a")
        entry["tasks"][task["task_id"] + "/1"] = {**task, "task_id": task["task_id"] + "/1", "lease": 99}

    edit_entry(state, 2, again)

    assert "update_counted_twice" in rules(state)


def test_an_update_that_was_inserted_twice_is_found(state: Path) -> None:
    with database(state) as tx:
        tx.execute(
            "INSERT INTO updates SELECT task_id || '/0', job_id, round, device_id, digest, status, unix_s FROM updates WHERE round = 1"
        )

    assert {"update_counted_twice", "update_without_event", "count_differs"} <= rules(state)


def test_an_event_that_was_written_twice_is_found(state: Path) -> None:
    with database(state) as tx:
        tx.execute(
            "INSERT INTO events (unix_s, job_id, kind, body) "
            "SELECT unix_s, job_id, kind, body FROM events WHERE kind = 'UpdateArrived' LIMIT 1"
        )

    assert {"update_counted_twice", "event_after_commit"} <= rules(state)


def test_a_round_number_that_was_skipped_is_found(state: Path) -> None:
    with database(state) as tx:
        tx.execute("DELETE FROM rounds WHERE round = 2")

    assert {"round_gap", "state_chain", "replay_differs"} <= rules(state)


def test_a_state_whose_bytes_are_not_its_digest_is_found(state: Path) -> None:
    link = state / "jobs" / next((state / "jobs").iterdir()).name / "final" / "adapter_model.safetensors"
    link.chmod(0o600)
    with link.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(1e9).tobytes())

    assert "folder_differs" in rules(state)


def test_a_blob_whose_bytes_are_not_its_digest_is_found(state: Path) -> None:
    blob = max((state / "blobs").iterdir())
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")

    assert "blob_damaged" in rules(state)


def test_a_blob_that_a_row_names_and_that_is_gone_is_found(state: Path) -> None:
    max((state / "blobs").iterdir()).unlink()

    assert "blob_missing" in rules(state)


def test_an_accepted_update_whose_row_is_missing_is_found(state: Path) -> None:
    with database(state) as tx:
        tx.execute("DELETE FROM updates WHERE round = 3 AND device_id = 'device-a'")

    assert "update_row_missing" in rules(state)


def test_a_weight_that_was_changed_after_the_fact_is_found(state: Path) -> None:
    def heavier(entry: dict[str, Any]) -> None:
        task_of(entry, "a")["update"]["samples"] = 7

    edit_entry(state, 4, heavier)

    assert {"weight_differs", "manifest_differs", "replay_differs", "state_not_the_fold"} <= rules(state)


def test_a_weight_of_nothing_is_found(state: Path) -> None:
    def weightless(entry: dict[str, Any]) -> None:
        task_of(entry, "a")["update"]["samples"] = 0

    edit_entry(state, 4, weightless)

    assert "weight_not_positive" in rules(state)


def test_another_update_s_bytes_in_an_accepted_one_s_place_are_found(state: Path) -> None:
    def swap(entry: dict[str, Any]) -> None:
        task_of(entry, "a")["update"]["blob"] = task_of(entry, "b")["update"]["blob"]

    edit_entry(state, 2, swap)

    assert "update_differs" in rules(state)


def test_a_lease_that_is_given_again_is_found(state: Path) -> None:
    def old(entry: dict[str, Any]) -> None:
        task_of(entry, "a")["lease"] = 1

    edit_entry(state, 3, old)

    assert "lease_not_grown" in rules(state)


def test_an_event_that_went_missing_is_found_by_the_replay(state: Path) -> None:
    with database(state) as tx:
        tx.execute("DELETE FROM events WHERE kind = 'Folded' AND sequence = (SELECT MAX(sequence) FROM events WHERE kind = 'Folded')")

    assert "replay_differs" in rules(state)


def test_an_event_that_fits_no_open_task_is_found(state: Path) -> None:
    with database(state) as tx:
        # An update of the last round before there was any.
        first, last = tx.execute("SELECT MIN(sequence), MAX(sequence) FROM events WHERE kind = 'UpdateArrived'").fetchone()
        tx.execute("UPDATE events SET sequence = -1 WHERE sequence = ?", (last,))
        assert first > 0

    assert "illegal_event" in rules(state)


def test_an_end_that_leads_to_another_round_is_found(state: Path) -> None:
    (job,) = (state / "jobs").iterdir()
    (job / "final").unlink()
    (job / "final").symlink_to(Path("rounds") / "0003")

    assert rules(state) == {"link_differs"}


def test_a_machine_that_cannot_be_read_is_found(state: Path) -> None:
    with database(state) as tx:
        tx.execute("UPDATE jobs SET machine = '{}'")

    assert "row_unreadable" in rules(state)


def test_a_state_that_is_not_the_mean_of_its_updates_is_found(state: Path, finished: Path, tmp_path: Path) -> None:
    """The bytes of an update were changed where they lay, before the fold read them."""
    retained = tmp_path / "retained"
    shutil.copytree(finished.parent / "retained", retained)
    (job,) = reader.read(state).jobs
    task = job.rounds[0].entry.trained()[0]
    assert task.update is not None
    path = retained / task.update.blob.digest
    path.chmod(0o600)
    table = codec.read_table(path)
    values = np.memmap(path, np.float32, "r+", table.data_start)
    values[0] += 1
    values.flush()

    assert rules(state, retained=retained) == {"state_not_the_fold"}


def test_a_receipt_without_an_accepted_update_is_found(state: Path, tmp_path: Path) -> None:
    (job,) = reader.read(state).jobs
    receipts = tmp_path / "receipts.jsonl"
    good = [{"task_id": row.task_id, "digest": row.digest, "status": row.status} for row in job.updates]
    receipts.write_text("".join(json.dumps(item) + "\n" for item in good), encoding="utf-8")
    assert rules(state, acknowledgements=receipts) == set()

    for lost in ({**good[0], "task_id": f"{job.job_id}/9/device-a/train"}, {**good[0], "digest": "0" * 64}):
        receipts.write_text(json.dumps(lost) + "\n", encoding="utf-8")
        assert rules(state, acknowledgements=receipts) == {"ack_lost"}


def test_a_late_receipt_promises_nothing(state: Path, tmp_path: Path) -> None:
    receipts = tmp_path / "receipts.jsonl"
    receipts.write_text('{"task_id": "job/1/device-a/train", "digest": "", "status": "late"}\n', encoding="utf-8")

    assert rules(state, acknowledgements=receipts) == set()


def test_a_folder_without_a_coordinator_s_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no coordinator's state_dir"):
        reader.examine(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / reader.DATABASE).write_text("hello " * 100, encoding="ascii")

    with pytest.raises(ConfigError, match="cannot be read"):
        reader.examine(tmp_path)


def test_the_verb_tells_sound_from_unsound_and_from_no_state(
    finished: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(finished)]) == ExitCode.OK
    with database(state) as tx:
        tx.execute("DELETE FROM rounds WHERE round = 2")
    assert cli.main(["check", str(state)]) == ExitCode.UNSOUND
    assert "round_gap: " in capsys.readouterr().out
    assert cli.main(["check", "--json", str(state)]) == ExitCode.UNSOUND
    document = json.loads(capsys.readouterr().out)
    assert document["sound"] is False and document["violations"][0].keys() == {"rule", "job_id", "round_number", "message"}
    assert cli.main(["check", str(tmp_path)]) == ExitCode.USAGE


def test_reading_leaves_the_folder_as_it_was(state: Path) -> None:
    def files() -> dict[Path, int]:
        # SQLite's shared memory is no content: readers mark their place in it.
        return {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file() and not path.name.endswith("-shm")}

    before = files()
    reader.examine(state)

    assert files() == before
