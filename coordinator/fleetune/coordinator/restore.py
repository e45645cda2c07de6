"""Makes a state_dir out of a backup, and fences what happened after the backup.

A restored coordinator has forgotten a part of what its devices were told. They come with results of tasks that it never gave, or of
tasks whose ids it gives again for other work. So the restored database gets an epoch that no coordinator of this fleet has had, and what
comes from another epoch is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from fleetune.coordinator import archive
from fleetune.coordinator.archive import DATABASE, MANIFEST, File, Manifest
from fleetune.coordinator.backup import OnBytes
from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.coordinator.store import copies, records, schema
from fleetune.errors import ConfigError, DiskFullError
from fleetune.wire import digests

LEASES_BIT = 20
"""Leases of a restored job go on from the epoch shifted by so many bits: above all that its lost future can have given."""

READ_BYTES = 1 << 20
_AUDIT = "unix_s, actor, action, subject, outcome, detail"
BLOB_MODE = 0o444


@dataclass(frozen=True)
class Restored:
    """A state_dir as it lies on disk now."""

    state_dir: Path
    manifest: Manifest
    epoch: int


def restore(source: Path, state_dir: Path, on_bytes: OnBytes | None = None, now_unix_s: float | None = None) -> Restored:
    """Make `state_dir` from the archive: whole, verified and on disk, or not there.

    ConfigError for an archive that is damaged, foreign or newer than this program, FolderInUseError for a state_dir that holds
    anything, DiskFullError, MachineError.
    """
    now = time.time() if now_unix_s is None else now_unix_s
    _check_target(state_dir)
    try:
        with _aside(state_dir) as folder:
            manifest = _unpack(source, folder, on_bytes or _unheard)
            epoch = max(manifest.epoch + 1, int(now))
            _fence(folder / DATABASE, manifest, epoch, now)
            _sync_all(folder)
            _put_in_place(folder, state_dir)
    except OSError as error:
        if copies.is_full(error):
            raise DiskFullError(
                f"No space left to restore into {state_dir}.", "Make room there, or name a folder on another disk."
            ) from error
        raise MachineError(
            f"{source} cannot be restored into {state_dir}: {error.filename or ''} {error.strerror or error}.", "Look at the rights."
        ) from error
    return Restored(state_dir, manifest, epoch)


def _check_target(state_dir: Path) -> None:
    with contextlib.suppress(OSError), (state_dir / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = lock.read(20).decode("ascii", "replace").strip() or "unknown"
            raise FolderInUseError(
                f"{state_dir} is in use by a coordinator (process {owner}).", "Stop it, or name another folder."
            ) from None
    if state_dir.is_symlink() or (state_dir.exists() and (not state_dir.is_dir() or any(state_dir.iterdir()))):
        raise FolderInUseError(
            f"{state_dir} is not empty.", "Name a folder that is empty or not there; move the old one away first if it is to be replaced."
        )


@contextlib.contextmanager
def _aside(state_dir: Path) -> Generator[Path, None, None]:
    """A private folder beside `state_dir`, gone afterwards unless it was renamed."""
    parent = state_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{state_dir.name}.", suffix=".restoring", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(source: Path, folder: Path, on_bytes: OnBytes) -> Manifest:
    """Write the archive's files under names of our own making, each checked against the manifest."""
    try:
        with source.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            manifest = _read_manifest(tar, source)
            _check_room(folder, manifest)
            missing = {file.name: file for file in manifest.files}
            (folder / archive.BLOBS).mkdir()
            done = 0
            while (member := tar.next()) is not None:
                wanted = missing.pop(member.name, None)
                if wanted is None:
                    raise archive.damaged(source, f"it holds {member.name[:80]!r}, which its {MANIFEST} does not list, or holds it twice")
                hear = functools.partial(_hear_more, on_bytes, done, manifest.size_bytes())
                _write(_opened(tar, member, wanted.size_bytes, source), folder, wanted, source, hear)
                done += wanted.size_bytes
    except (tarfile.TarError, EOFError) as error:
        raise archive.damaged(source, f"it cannot be read as a tar file ({error})") from error
    except FileNotFoundError as error:
        if Path(error.filename or "") != source:
            raise
        raise ConfigError(f"there is no archive {source}.", "Name a file that `fleetune backup` made.") from error
    if missing:
        raise archive.damaged(source, f"{len(missing)} files of its {MANIFEST} are missing, such as {min(missing)}")
    return manifest


def _read_manifest(tar: tarfile.TarFile, source: Path) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or first.size > archive.MANIFEST_BYTES_MAX:
        raise archive.damaged(source, f"it does not begin with a {MANIFEST} of at most {archive.MANIFEST_BYTES_MAX} bytes")
    manifest = archive.load(_opened(tar, first, first.size, source).read(), source)
    if manifest.schema_version > schema.SCHEMA_VERSION:
        raise ConfigError(
            f"{source} has schema version {manifest.schema_version}, this program knows up to {schema.SCHEMA_VERSION}.",
            f"Restore it with fleetune {manifest.fleetune_version[:40]} or a newer one.",
        )
    return manifest


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo, size_bytes: int, source: Path) -> IO[bytes]:
    """The bytes of a plain file of the expected size; links, folders, devices and files with holes are none."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    file = tar.extractfile(member) if plain and member.size == size_bytes else None
    if file is None:
        raise archive.damaged(source, f"its {member.name[:80]!r} is no plain file of {size_bytes} bytes")
    return file


def _hear_more(on_bytes: OnBytes, before: int, total: int, done: int) -> None:
    on_bytes(before + done, total)


def _write(reading: IO[bytes], folder: Path, wanted: File, source: Path, hear: Callable[[int], None]) -> None:
    # The manifest's names are those that a backup has, each compared with a list; a blob's is built from its digest.
    path = folder / archive.BLOBS / wanted.digest if wanted.name.startswith(archive.BLOBS) else folder / wanted.name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    digest = digests.running()
    with path.open("xb") as writing:
        while data := reading.read(READ_BYTES):
            digest.update(data)
            writing.write(data)
            hear(writing.tell())
        writing.flush()
        os.fsync(writing.fileno())
    if digest.hexdigest() != wanted.digest:
        raise archive.damaged(source, f"the bytes of its {wanted.name} do not have the digest that its {MANIFEST} tells")
    path.chmod(BLOB_MODE if wanted.name.startswith(archive.BLOBS) else 0o600)


def _check_room(folder: Path, manifest: Manifest) -> None:
    free = shutil.disk_usage(folder).free
    if free < manifest.size_bytes():
        raise DiskFullError(
            f"the backup holds {manifest.size_bytes()} bytes, {folder.parent} has {free} left.", "Make room, or use another disk."
        )


def _fence(database: Path, manifest: Manifest, epoch: int, now: float) -> None:
    """Give the database its new epoch; its jobs' leases go on where the lost future cannot have been."""
    lost = f"{manifest.made_unix_s:.0f} {now:.0f}"
    words = f"backup of {_clock(manifest.made_unix_s)}, restored {_clock(now)}"
    try:
        with contextlib.closing(copies.connect(database)) as connection:
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its pages do not fit together")
            with connection:
                for key, value in ((records.EPOCH_KEY, str(epoch)), (records.RESTORED_KEY, words), (records.LOST_KEY, lost)):
                    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))
                for job_id, text in connection.execute("SELECT job_id, machine FROM jobs").fetchall():
                    connection.execute("UPDATE jobs SET machine = ? WHERE job_id = ?", (_with_lease(str(text), epoch), job_id))
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit'").fetchone():
                    values = (now, "fleetune restore", "restore", f"epoch {epoch}", "done", words)
                    connection.execute(f"INSERT INTO audit ({_AUDIT}) VALUES (?, ?, ?, ?, ?, ?)", values)
    except sqlite3.Error as error:
        raise ConfigError(f"the database in the backup cannot be used ({error}).", "Take another archive.") from error


def _with_lease(machine_json: str, epoch: int) -> str:
    machine = records.load_machine(machine_json)
    return records.dump_machine(replace(machine, lease=max(machine.lease, epoch << LEASES_BIT)))


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _sync_all(folder: Path) -> None:
    copies.sync(folder / DATABASE)
    copies.sync(folder / archive.BLOBS)
    if (folder / archive.TLS).is_dir():
        copies.sync(folder / archive.TLS)
    copies.sync(folder)


def _put_in_place(folder: Path, state_dir: Path) -> None:
    try:
        os.replace(folder, state_dir)  # also onto an empty folder
    except OSError as error:
        if error.errno is None or not state_dir.exists():
            raise
        raise FolderInUseError(f"{state_dir} is not empty any more.", "Name another folder.") from error
    copies.sync(state_dir.absolute().parent)


def _unheard(_done: int, _total: int) -> None:
    return
