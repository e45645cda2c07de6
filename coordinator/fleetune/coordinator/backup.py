"""Makes a backup of a coordinator's state, also while it runs.

The simple version, copying the folder, gives a torn database and misses what is deleted meanwhile. Here SQLite copies the database as of
one commit; then every blob that the copy names gets a second name in a folder of ours, which takes milliseconds and keeps it from
vanishing while gigabytes are written. A blob that vanished in between was let go by a later commit: the database is copied once more.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fleetune.coordinator import archive, tlsfolder
from fleetune.coordinator.archive import File, Manifest
from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.coordinator.store import copies, schema
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import ConfigError, DiskFullError, WireError
from fleetune.wire import digests

ATTEMPTS = 10
"""Copies of the database before it is given up: each takes milliseconds, a round that lets blobs go longer."""

PIN_PREFIX = ".backup-"
PIN_LEFT_S = 24 * 3600.0
"""A folder of second names that is older was left by a backup that was killed."""

OnBytes = Callable[[int, int], None]
"""Hears the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Made:
    """A finished backup."""

    target: Path
    manifest: Manifest
    size_bytes: int


def make(state_dir: Path, target: Path, on_bytes: OnBytes | None = None) -> Made:
    """Write the backup of `state_dir` to `target`: whole and on disk, or not there.

    ConfigError for what is no state_dir, FolderInUseError for a target that exists, DiskFullError, MachineError for a damaged blob or
    a state that changes faster than it can be held.
    """
    if not (state_dir / archive.DATABASE).is_file():
        raise ConfigError(
            f"{state_dir} is no state_dir of a coordinator: it holds no {archive.DATABASE}.",
            "Name the folder that `fleetune serve` has as its state_dir.",
        )
    if target.exists() or target.is_symlink():
        raise FolderInUseError(f"{target} exists.", "Name a file that does not, or remove that one.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target.absolute().parent} is no folder.", "Make it, or name a file in another one.")
    try:
        with _pinned(state_dir) as folder:
            manifest = _manifest(folder)
            _check_room(target, manifest.size_bytes())
            _write(target, folder, manifest, on_bytes or _unheard)
    except OSError as error:
        if copies.is_full(error):
            raise DiskFullError(f"No space left for the backup {target}.", "Make room there, or name a file on another disk.") from error
        raise MachineError(
            f"the backup {target} cannot be made: {error.filename or ''} {error.strerror or error}.", "Look at its rights."
        ) from error
    except sqlite3.Error as error:
        raise ConfigError(f"the database in {state_dir} cannot be read ({error}).", "Restore an earlier backup.") from error
    return Made(target, manifest, target.stat().st_size)


@contextlib.contextmanager
def _pinned(state_dir: Path) -> Generator[Path, None, None]:
    """A folder with the database's copy and every blob that it names, as long as inside."""
    _clear_left(state_dir)
    folder = Path(tempfile.mkdtemp(prefix=PIN_PREFIX, dir=state_dir))
    try:
        if not any(_hold(state_dir, folder) for _ in range(ATTEMPTS)):
            raise MachineError(
                f"the state in {state_dir} changed {ATTEMPTS} times while it was being held.",
                "Try again, or pause the jobs first (`fleetune pause JOB`).",
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hold(state_dir: Path, folder: Path) -> bool:
    """Copy the database, then give its blobs names in `folder`; False where one of them is gone."""
    tlsfolder.copy(state_dir, folder)
    copies.copy(state_dir / archive.DATABASE, folder / archive.DATABASE)
    store = BlobStore(state_dir)
    for digest in _named(folder):
        try:
            store.link_out(digest, folder / digest)
        except FileNotFoundError:
            return False
    return True


def _named(folder: Path) -> list[str]:
    """Digests of the blobs that the copy of the database names."""
    with contextlib.closing(copies.connect(folder / archive.DATABASE)) as database:
        return [digests.check(str(digest)) for (digest,) in database.execute("SELECT digest FROM blobs ORDER BY digest")]


def _manifest(folder: Path) -> Manifest:
    database = folder / archive.DATABASE
    with contextlib.closing(copies.connect(database)) as connection:
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    version = int(meta.get("schema_version", 0))
    if version > schema.SCHEMA_VERSION:
        raise ConfigError(
            f"the database has schema version {version}, this program knows up to {schema.SCHEMA_VERSION}.",
            "Make the backup with the program that runs the coordinator.",
        )
    files = [File(archive.DATABASE, digests.of_file(database), database.stat().st_size)]
    files += [File(archive.BLOBS + digest, digest, (folder / digest).stat().st_size) for digest in _named(folder)]
    for name in sorted(archive.TLS_NAMES):
        path = folder / name
        if path.is_file():
            files.append(File(name, digests.of_file(path), path.stat().st_size))
    return Manifest(time.time(), importlib.metadata.version("fleetune"), version, int(meta.get("epoch", 1)), tuple(files))


def _check_room(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed_bytes:
        raise DiskFullError(
            f"the backup takes {needed_bytes} bytes, {target.absolute().parent} has {free} left.", "Make room, or use another disk."
        )


def _write(target: Path, folder: Path, manifest: Manifest, on_bytes: OnBytes) -> None:
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.absolute().parent)
    aside = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                data = archive.dump(manifest)
                header = _header(archive.MANIFEST, len(data), manifest)
                tar.addfile(header, io.BytesIO(data))
                done = 0
                for member in manifest.files:
                    source = folder / (member.digest if member.name.startswith(archive.BLOBS) else member.name)
                    with source.open("rb") as reading:
                        hearing = _Hearing(reading, done, manifest.size_bytes(), on_bytes)
                        tar.addfile(_header(member.name, member.size_bytes, manifest), hearing)
                    if hearing.digest.hexdigest() != member.digest:
                        raise WireError(f"{folder.parent / member.name} no longer has the bytes of its digest.")
                    done += member.size_bytes
            file.flush()
            os.fsync(file.fileno())
        # A hard link refuses a target that somebody made meanwhile; where the file system has none, a rename has to do.
        try:
            os.link(aside, target)
        except FileExistsError as error:
            raise FolderInUseError(f"{target} exists by now.", "Name another file.") from error
        except OSError:
            os.replace(aside, target)
        copies.sync(target.absolute().parent)
    except WireError as error:
        raise MachineError(
            f"a blob is damaged: {error}", "Start the coordinator, which lets go of damaged blobs, then make the backup again."
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _header(name: str, size_bytes: int, manifest: Manifest) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size_bytes, 0o600, int(manifest.made_unix_s)
    return header


class _Hearing:
    """A file that is read through once: its digest, and word of its progress."""

    def __init__(self, file: BinaryIO, done: int, total: int, on_bytes: OnBytes) -> None:
        self.digest = digests.running()
        self._file, self._done, self._total, self._on_bytes = file, done, total, on_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self._done += len(data)
        self._on_bytes(self._done, self._total)
        return data


def _clear_left(state_dir: Path) -> None:
    for left in state_dir.glob(f"{PIN_PREFIX}*"):
        if time.time() - left.stat().st_mtime > PIN_LEFT_S:
            shutil.rmtree(left, ignore_errors=True)


def _unheard(_done: int, _total: int) -> None:
    return
