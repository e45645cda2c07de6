"""Backups and what comes back out of them: whole or not at all, and never mixed with the future that was lost."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from fleetune.coordinator import archive, backup, restore
from fleetune.coordinator.cli import main
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.coordinator.store import copies, schema
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import ConfigError
from fleetune.v1 import fleet_pb2, messages_pb2, registry_pb2
from support.coordinating import Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent, echoed
from support.secured import secured

ACCEPTED = messages_pb2.RECEIPT_STATUS_ACCEPTED
REFUSED = messages_pb2.RECEIPT_STATUS_REFUSED

Members = dict[str, bytes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state_dir with a job in its second round, whose first task `a` has done and `b` has not."""
    folder = tmp_path_factory.mktemp("original") / "state"
    async with coordinating(folder) as coordinator:
        job = await coordinator.submit(echo_job(rounds=3, minimum=2))
        async with EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "b") as b:
            for _ in range(2):
                await a.answer(await a.next_task())
                if not job.machine.committed:
                    await b.answer(await b.next_task())
                    await coordinator.until(job, lambda job: job.machine.committed == 1)
    return folder


@pytest.fixture
def state(original: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(original, tmp_path / "state", symlinks=True))


@pytest.fixture
def made(state: Path, tmp_path: Path) -> Path:
    return backup.make(state, tmp_path / "b.tar").target


def rows(state: Path, question: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(state / "coordinator.sqlite")) as raw:
        return raw.execute(question).fetchall()


def a_blob(state: Path) -> str:
    """The digest of a blob that the database names."""
    return str(rows(state, "SELECT min(digest) FROM blobs")[0][0])


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]  # plain files all


def write(path: Path, content: Members, change: Callable[[tarfile.TarInfo], None] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if change is not None:
                change(header)
            tar.addfile(header, io.BytesIO(data))
    return path


def refusal(path: Path, tmp_path: Path) -> str:
    """Restore what cannot be; nothing is left of the try."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        restore.restore(path, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def test_a_backup_holds_the_database_and_exactly_the_blobs_that_it_names(state: Path, made: Path) -> None:
    named = [f"blobs/{digest}" for (digest,) in rows(state, "SELECT digest FROM blobs ORDER BY digest")]
    assert list(members(made)) == ["manifest.json", "coordinator.sqlite", *named]
    assert made.stat().st_mode & 0o077 == 0
    assert [path.name for path in state.iterdir() if path.name.startswith(".")] == []


async def test_what_is_restored_has_the_rows_and_the_blobs_and_its_folders_again(state: Path, made: Path, tmp_path: Path) -> None:
    restored = restore.restore(made, tmp_path / "new")
    assert [(digest,) for digest in BlobStore(tmp_path / "new").digests()] == rows(state, "SELECT digest FROM blobs ORDER BY digest")
    assert rows(tmp_path / "new", "SELECT task_id, digest FROM updates") == rows(state, "SELECT task_id, digest FROM updates")
    (epoch,) = rows(tmp_path / "new", "SELECT value FROM meta WHERE key = 'epoch'")
    assert epoch == (str(restored.epoch),)
    assert restored.epoch > restored.manifest.epoch
    async with coordinating(tmp_path / "new") as coordinator:
        assert [job.machine.committed for job in coordinator.engine.jobs.values()] == [1]
    (job_id,) = coordinator.engine.jobs
    assert (tmp_path / "new" / "jobs" / job_id / "rounds" / "0001" / "adapter_model.safetensors").is_file()


def test_two_restores_of_one_archive_have_different_epochs(made: Path, tmp_path: Path) -> None:
    epochs = [restore.restore(made, tmp_path / f"new-{now}", now_unix_s=now).epoch for now in (2e9, 2e9 + 60)]
    assert len(set(epochs)) == 2


def test_a_clock_that_went_back_still_gives_a_new_epoch(made: Path, tmp_path: Path) -> None:
    assert restore.restore(made, tmp_path / "new", now_unix_s=0.0).epoch == 2


async def test_a_backup_beside_a_coordinator_at_work_can_be_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round after round lets blobs go while the backups are being made."""
    # These rounds take moments. Where the backup's thread is held up for longer than that, each attempt meets another round.
    monkeypatch.setattr(backup, "ATTEMPTS", 100_000)
    async with coordinating(tmp_path / "state") as coordinator:
        job = await coordinator.submit(echo_job(rounds=30))
        async with EchoAgent(coordinator.address, "a") as a:
            a.serve()
            for number in range(5):
                await coordinator.committed(job, 5 * number + 1)
                await coordinator.engine._on_disk(backup.make, tmp_path / "state", tmp_path / f"{number}.tar")
            await coordinator.ended(job)
    for number in range(5):
        restore.restore(tmp_path / f"{number}.tar", tmp_path / f"new-{number}")
        ((committed,),) = rows(tmp_path / f"new-{number}", "SELECT count(*) FROM rounds")
        assert isinstance(committed, int) and committed >= 5 * number + 1


def test_a_blob_that_vanished_makes_the_database_be_copied_again(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Path] = []
    gone = a_blob(state)
    copy = copies.copy

    def vanishing(source: Path, target: Path) -> None:
        copy(source, target)
        copied.append(target)
        if len(copied) == 1:  # as the coordinator does it: the row, then the file
            with contextlib.closing(sqlite3.connect(source)) as raw, raw:
                raw.execute("DELETE FROM blobs WHERE digest = ?", (gone,))
            BlobStore(state).delete(gone)

    monkeypatch.setattr(copies, "copy", vanishing)
    manifest = backup.make(state, tmp_path / "b.tar").manifest
    assert len(copied) == 2
    assert gone not in {file.digest for file in manifest.files}


def test_a_blob_that_stays_away_ends_the_backup_after_some_tries(state: Path, tmp_path: Path) -> None:
    BlobStore(state).delete(a_blob(state))
    with pytest.raises(MachineError, match=f"{backup.ATTEMPTS} times"):
        backup.make(state, tmp_path / "b.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_a_damaged_blob_ends_the_backup_with_its_name(state: Path, tmp_path: Path) -> None:
    digest = a_blob(state)
    blob = BlobStore(state).path(digest)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(MachineError, match=digest):
        backup.make(state, tmp_path / "b.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_a_backup_replaces_nothing(state: Path, made: Path) -> None:
    with pytest.raises(FolderInUseError, match="exists"):
        backup.make(state, made)


def test_a_folder_without_a_database_is_no_state_dir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no state_dir"):
        backup.make(tmp_path, tmp_path / "b.tar")


def test_a_folder_that_holds_something_is_not_restored_into(state: Path, made: Path) -> None:
    with pytest.raises(FolderInUseError, match="not empty"):
        restore.restore(made, state)


def test_an_empty_folder_is_restored_into(made: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    restore.restore(made, tmp_path / "new")
    assert (tmp_path / "new" / "coordinator.sqlite").is_file()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "blobs/../../evil", "lock", "jobs/x", "blobs/" + "z" * 64])
def test_a_name_that_no_backup_has_is_refused(made: Path, tmp_path: Path, name: str) -> None:
    content = members(made)
    manifest = json.loads(content["manifest.json"])
    manifest["files"].append({"name": name, "digest": "0" * 64, "size_bytes": 4})
    listed = {**content, "manifest.json": json.dumps(manifest).encode(), name: b"evil"}
    assert "names a file" in refusal(write(tmp_path / "listed.tar", listed), tmp_path)
    assert "does not list" in refusal(write(tmp_path / "unlisted.tar", {**content, name: b"evil"}), tmp_path)


def test_a_link_in_place_of_a_file_is_refused(made: Path, tmp_path: Path) -> None:
    def as_link(header: tarfile.TarInfo) -> None:
        if header.name == archive.DATABASE:
            header.type, header.linkname, header.size = tarfile.SYMTYPE, "/etc/passwd", 0

    assert "no plain file" in refusal(write(tmp_path / "link.tar", members(made), as_link), tmp_path)


def test_a_changed_a_missing_and_a_repeated_file_are_refused(made: Path, tmp_path: Path) -> None:
    content = members(made)
    blob = next(name for name in content if name.startswith("blobs/"))
    changed = {**content, blob: content[blob][:-1] + bytes([content[blob][-1] ^ 1])}
    assert "do not have the digest" in refusal(write(tmp_path / "changed.tar", changed), tmp_path)
    assert "are missing" in refusal(write(tmp_path / "missing.tar", {n: d for n, d in content.items() if n != blob}), tmp_path)
    with tarfile.open(write(tmp_path / "twice.tar", content), "a") as tar:
        header = tarfile.TarInfo(blob)
        header.size = len(content[blob])
        tar.addfile(header, io.BytesIO(content[blob]))
    assert "twice" in refusal(tmp_path / "twice.tar", tmp_path)


def test_an_archive_that_was_cut_anywhere_is_refused(made: Path, tmp_path: Path) -> None:
    data = made.read_bytes()
    for share in (0.0, 0.02, 0.5, 0.9):
        (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * share)])
        assert "no whole backup" in refusal(tmp_path / "cut.tar", tmp_path)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"my holiday diary " * 100)
    assert "no whole backup" in refusal(tmp_path / "x.tar", tmp_path)


def test_a_backup_of_a_newer_program_is_refused_with_its_version(made: Path, tmp_path: Path) -> None:
    content = members(made)
    manifest = {**json.loads(content["manifest.json"]), "schema_version": schema.SCHEMA_VERSION + 1, "fleetune_version": "9.8"}
    message = refusal(write(tmp_path / "newer.tar", {**content, "manifest.json": json.dumps(manifest).encode()}), tmp_path)
    assert f"schema version {schema.SCHEMA_VERSION + 1}" in message
    assert "fleetune 9.8" in message


def test_the_verbs_tell_what_is_wrong_with_the_right_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backup", str(tmp_path), str(tmp_path / "b.tar")]) == ExitCode.USAGE
    assert main(["restore", str(tmp_path / "none.tar"), str(tmp_path / "new")]) == ExitCode.USAGE
    assert "there is no archive" in capsys.readouterr().err


def test_the_verbs_make_and_restore_and_answer_in_json(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backup", str(state), str(tmp_path / "b.tar"), "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["epoch"] == 1
    assert main(["restore", str(tmp_path / "b.tar"), str(tmp_path / "new"), "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["epoch"] > 1


def test_long_work_tells_how_far_it_is(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetune.coordinator.cli.PROGRESS_S", 0.0)
    assert main(["backup", str(state), str(tmp_path / "b.tar")]) == ExitCode.OK
    assert main(["restore", str(tmp_path / "b.tar"), str(tmp_path / "new")]) == ExitCode.OK
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("copied ") for line in lines)
    assert any(line.startswith("restored ") for line in lines)


def test_a_folder_in_use_names_its_coordinator(made: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with (tmp_path / "new" / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match="process 4711"):
            restore.restore(made, tmp_path / "new")


async def test_a_backup_of_an_older_database_is_restored_and_upgraded_at_start(state: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(state / "coordinator.sqlite")) as raw, raw:
        raw.executescript(
            "ALTER TABLE devices DROP COLUMN quarantine;"
            "DROP TABLE tokens; DROP TABLE certificates; DROP TABLE revoked_identities;"
            "DROP TABLE audit; DROP TABLE alembic_version; UPDATE meta SET value = '1' WHERE key = 'schema_version'"
        )
    restored = restore.restore(backup.make(state, tmp_path / "b.tar").target, tmp_path / "new")
    assert restored.manifest.schema_version == 1
    async with coordinating(tmp_path / "new") as coordinator:
        assert [job.machine.committed for job in coordinator.engine.jobs.values()] == [1]
    assert rows(tmp_path / "new", "SELECT value FROM meta WHERE key = 'epoch'") == [(str(restored.epoch),)]


async def test_the_authority_comes_back_with_the_rest_and_is_as_private(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        target = (await fleet.coordinator.engine._on_disk(backup.make, fleet.coordinator.state_dir, tmp_path / "b.tar")).target
    assert target.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(tmp_path / "state")
    restore.restore(target, tmp_path / "state")
    keys = [path for path in (tmp_path / "state" / "tls").iterdir() if path.suffix == ".key"]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert len(keys) == 2
    async with secured(tmp_path) as fleet:
        assert await fleet.serves(pi) is grpc.StatusCode.OK


async def test_who_renewed_in_the_time_that_was_lost_stays_in_and_who_joined_then_does_not(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        sold = await fleet.join(await fleet.token(), "sold", "device-0003")
        await fleet.registry.RevokeIdentity(registry_pb2.RevokeIdentityRequest(kind=registry_pb2.IDENTITY_KIND_AGENT, name="sold"))
        target = (await fleet.coordinator.engine._on_disk(backup.make, fleet.coordinator.state_dir, tmp_path / "b.tar")).target
        renewed = await fleet.renew(pi)
        newcomer = await fleet.join(await fleet.token(), "newcomer", "device-0002")
    shutil.rmtree(tmp_path / "state")
    restore.restore(target, tmp_path / "state")
    for _ in range(2):  # the second start finds it in the list
        async with secured(tmp_path) as fleet:
            codes = [await fleet.serves(who) for who in (renewed, newcomer, sold)]
        assert codes == [grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAUTHENTICATED]


@pytest.mark.parametrize("name", ["tls/other.pem", "tls/../../x", "tls", "tls/", "tls/lock"])
def test_of_the_authority_s_folder_only_its_own_files_are_restored(state: Path, tmp_path: Path, name: str) -> None:
    document = json.loads(archive.dump(backup.make(state, tmp_path / "b.tar").manifest))
    document["files"].append({"name": name, "digest": "0" * 64, "size_bytes": 1})
    with pytest.raises(ConfigError, match="allowed are"):
        archive.load(json.dumps(document).encode(), tmp_path / "b.tar")


# ------------------------------------------------------------------------------------------------------- the lost future


async def restored(coordinator: Coordinator, tmp_path: Path) -> Path:
    """What is restored from a backup of now."""
    await coordinator.engine._on_disk(backup.make, coordinator.state_dir, tmp_path / "b.tar")
    return restore.restore(tmp_path / "b.tar", tmp_path / "new").state_dir


async def test_the_same_task_id_is_refused_from_the_lost_future_and_counts_from_the_new_epoch(tmp_path: Path) -> None:
    async with coordinating(tmp_path / "state") as coordinator:
        job = await coordinator.submit(echo_job(rounds=2))
        a = await EchoAgent(coordinator.address, "a").connect()
        await a.answer(await a.next_task())
        await coordinator.until(job, lambda job: job.machine.committed == 1)
        task = await a.next_task()
        folder = await restored(coordinator, tmp_path)
        data = echoed(await a.download(task.state.digest), 1000)
        old_header = a.header(task, data)
        await a.cut()
    async with coordinating(folder) as coordinator:
        job = coordinator.engine.jobs[job.job_id]
        a.address = coordinator.address
        stages = {task.task_id: fleet_pb2.HELD_STAGE_FINISHED}
        a.hello.instance_id = "run-2"
        await a.connect(held=stages, epoch=old_header.epoch)
        again = await a.next_task()
        assert again.task_id == task.task_id
        assert again.lease > task.lease
        receipt = await a.upload(task, data, header=old_header)
        assert receipt.status == REFUSED
        assert "older state was restored" in receipt.reason
        assert (await a.status(task, data, epoch=old_header.epoch)).receipt.status == REFUSED
        assert (await a.answer(again)).status == ACCEPTED
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        await a.cut()
    assert rows(folder, "SELECT count(*) FROM updates WHERE status = 'accepted'") == [(2,)]
    assert rows(folder, "SELECT count(*) FROM updates WHERE digest = '" + old_header.blob.digest + "'") == [(0,)]


async def test_an_outcome_of_the_lost_future_is_refused(tmp_path: Path) -> None:
    async with coordinating(tmp_path / "state") as coordinator:
        job = await coordinator.submit(echo_job())
        a = await EchoAgent(coordinator.address, "a").connect()
        task = await a.next_task()
        folder = await restored(coordinator, tmp_path)
        await a.cut()
    async with coordinating(folder) as coordinator:
        a.address, a.hello.instance_id = coordinator.address, "run-2"
        await a.connect()
        await a.next_task()
        failure = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_DATA, stage="train", message="no rows")
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, failure=failure, epoch=1))
        assert (await a.next_receipt()).status == REFUSED
        entry = coordinator.engine.jobs[job.job_id].machine.open_task(task.task_id)
        assert entry is not None
        assert entry.status == "assigned"
        await a.cut()


async def test_work_begun_in_the_lost_future_is_stopped_before_it_is_given_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path / "state") as coordinator:
        await coordinator.submit(echo_job())
        a = await EchoAgent(coordinator.address, "a").connect()
        task = await a.next_task()
        folder = await restored(coordinator, tmp_path)
        await a.cut()
    async with coordinating(folder) as coordinator:
        a.address, a.hello.instance_id = coordinator.address, "run-2"
        await a.connect(held={task.task_id: fleet_pb2.HELD_STAGE_RUNNING}, epoch=1)
        assert (await a.next_cancel()).task_id == task.task_id
        assert (await a.next_task()).task_id == task.task_id
        await a.cut()


async def test_a_restored_coordinator_says_so_at_every_start(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    restore.restore(made, tmp_path / "new", now_unix_s=2e9)
    for _ in range(2):
        caplog.clear()
        async with coordinating(tmp_path / "new"):
            pass
        (line,) = [record.getMessage() for record in caplog.records if "restored state" in record.getMessage()]
        assert "restored 2033-05-18 03:33:20 UTC" in line
        assert "epochs than 2000000000" in line
