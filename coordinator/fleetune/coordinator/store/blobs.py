"""Blobs: bytes under their digest, each whole and durable or not there at all.

Layout: `blobs/abcd...` holds finished blobs (read-only files), `spool/` what is on its way, `damaged/` what no longer had its digest.
One flat folder, since every folder that a commit touched costs it an fsync, and file systems index the few thousand names well. A blob
is durable once it has been adopted or put *and* `sync` has returned; several may share one `sync`. A flush that fails raises
DurabilityError: the kernel may have dropped what it could not write, so to ask again would be answered with success.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Protocol

from fleetune.errors import DiskFullError, DurabilityError
from fleetune.wire import digests
from fleetune.wire.chunks import Spool

# Left free on the disk beside any upload, so that the database can still commit what happened.
RESERVE_BYTES = 4 << 20
# A name outside the store may share the blob's bytes: nobody should edit them in place.
READ_ONLY = 0o444
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)


class Addressed(Protocol):
    """A blob's address, as `fleetune.v1.BlobRef` has it."""

    @property
    def digest(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...


class BlobStore:
    """Content-addressed files under one folder. Methods block on disk and may run on any thread."""

    def __init__(self, root: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._spool = root / "spool"
        self._damaged = root / "damaged"
        self._reserve_bytes = reserve_bytes
        self._touched: set[Path] = set()
        self._touched_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        for folder in (self._blobs, self._spool):
            folder.mkdir(parents=True, exist_ok=True)
        self._touched.update((root, self._blobs))

    def path(self, digest: str) -> Path:
        """Where the blob lies or would lie. WireError for what is not a digest."""
        return self._blobs / digests.check(digest)

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Size in bytes; FileNotFoundError where there is no such blob."""
        return self.path(digest).stat().st_size

    def digests(self) -> Iterator[str]:
        """Digests of all blobs, in order."""
        for blob in sorted(self._blobs.iterdir()):
            yield blob.name

    def spool(self, key: str, ref: Addressed, limit_bytes: int | None = None) -> Spool:
        """Open or resume what arrives for `key` (any text, such as a task id). Errors as `Spool`.

        The blob's address is part of the file's name: a device that trained again never resumes its earlier bytes.
        """
        return Spool(self._spool_path(key, ref), ref.digest, ref.size_bytes, limit_bytes=limit_bytes, reserve_bytes=self._reserve_bytes)

    def spooled(self, key: str, ref: Addressed) -> int:
        """Bytes held of what arrives for `key`, without opening it."""
        try:
            held = self._spool_path(key, ref).stat().st_size
        except FileNotFoundError:
            return 0
        return held if held <= ref.size_bytes else 0

    def discard(self, key: str, ref: Addressed) -> None:
        """Remove what has arrived for `key`, unless a stream is writing it just now."""
        _removed_if_idle(self._spool_path(key, ref), math.inf)

    def clean_spool_of(self, key: str, ref: Addressed) -> int:
        """Remove what has arrived for `key` under other addresses than `ref` and is not being written; how many files."""
        keep, prefix = self._spool_path(key, ref), f"{_key_part(key)}-"
        with os.scandir(self._spool) as entries:
            others = [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and entry.name != keep.name]
        return sum(_removed_if_idle(path, math.inf) for path in others)

    def adopt(self, spool: Spool) -> str:
        """Verify a spool, make its bytes durable and move it to its place; returns the digest. WireError removes the spool.

        DurabilityError: end the process.
        """
        target = self.path(spool.digest)
        try:
            spool.finish(fsync=True, move_to=target)
        except OSError as error:
            if error.errno in _FULL:
                spool.path.unlink(missing_ok=True)  # read again, it would look whole as long as the kernel remembers it
                raise DiskFullError(f"No space left in {self._blobs} for blob {spool.digest[:12]}.", "Make room on that disk.") from error
            raise _not_durable(target, error) from error
        target.chmod(READ_ONLY)
        self._touch()
        return spool.digest

    def put_file(self, path: Path, link: bool, digest: str | None = None) -> str:
        """Store a file, by hard link if asked and possible, else by copy; returns its digest.

        `digest` spares reading the file again where the caller computed it while writing. A linked file must not be changed afterwards;
        its mode stays as it is, since it may be somebody else's.
        """
        digest = digests.of_file(path) if digest is None else digests.check(digest)
        target = self.path(digest)
        if link and _linked(path, target, self._aside()):
            _fsync(target)
        else:
            _copy(path, target, self._aside())
        self._touch()
        return digest

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; returns their digest. DiskFullError leaves nothing behind."""
        digest = digests.of_bytes(data)
        target = self.path(digest)
        aside = self._aside()
        with _removed_on_error(aside):
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, READ_ONLY)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                _flush(fd, aside)
            finally:
                os.close(fd)
            os.replace(aside, target)
        self._touch()
        return digest

    def link_out(self, digest: str, target: Path) -> None:
        """Give the blob a second name outside the store (a copy on another file system); replaces what is there.

        The name is whole at once; making it durable is for the caller, who knows when the folder is complete.
        """
        source = self.path(digest)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        if not _linked(source, target, aside):
            _copy(source, target, aside)

    def has_room(self) -> bool:
        """Whether more than the reserve is free on the disk."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize > self._reserve_bytes

    def verify(self, digest: str) -> bool:
        """Whether the blob is there and its bytes still have its digest; reads all of it."""
        try:
            return digests.of_file(self.path(digest)) == digest
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False  # the disk cannot read it any more

    def quarantine(self, digest: str) -> bool:
        """Take a damaged blob out of the store, so that nobody uses it and a whole one can take its place. False where there was none."""
        self._damaged.mkdir(exist_ok=True)
        try:
            os.replace(self.path(digest), self._damaged / digest)
        except FileNotFoundError:
            return False
        self._touch()
        return True

    def quarantined(self) -> dict[str, int]:
        """Digest that each should have had -> size in bytes."""
        if not self._damaged.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in sorted(self._damaged.iterdir())}

    def drop_quarantined(self) -> None:
        for digest in self.quarantined():
            (self._damaged / digest).unlink(missing_ok=True)

    def delete(self, digest: str) -> bool:
        """Remove the blob's name; open readers and other names keep the bytes. False where there was none."""
        path = self.path(digest)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        self._touch()
        return True

    def sync(self) -> None:
        """Make all names durable that were given before this call. After an OSError nothing is known: end the process."""
        # A second caller waits for the first: its own folder may be among those the first took.
        with self._sync_lock:
            with self._touched_lock:
                folders, self._touched = self._touched, set()
            for folder in sorted(folders):
                _fsync(folder)

    def clean_spool(self, older_than_s: float, now_s: float | None = None, open_keys: Collection[str] = ()) -> int:
        """Remove spooled files last written more than `older_than_s` ago that nobody is writing; returns how many.

        What has arrived for one of `open_keys` stays.
        """
        before_s = (time.time() if now_s is None else now_s) - older_than_s
        return sum(_removed_if_idle(path, before_s) for path in self.stale_spool(open_keys, older_than_s, now_s))

    def stale_spool(self, open_keys: Collection[str], older_than_s: float, now_s: float | None = None) -> dict[Path, int]:
        """Spooled files, with their sizes in bytes, that belong to none of the keys and were last written so long ago."""
        before_s = (time.time() if now_s is None else now_s) - older_than_s
        prefixes = {_key_part(key) for key in open_keys}
        found: dict[Path, int] = {}
        for path in sorted(self._spool.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # it has become a blob meanwhile
                stat = path.stat()
                if stat.st_mtime < before_s and path.name.partition("-")[0] not in prefixes:
                    found[path] = stat.st_size
        return found

    def _spool_path(self, key: str, ref: Addressed) -> Path:
        address = digests.of_bytes(f"{key}\0{ref.digest}\0{ref.size_bytes}".encode("utf-8", "surrogatepass"))
        return self._spool / f"{_key_part(key)}-{address}"

    def _touch(self) -> None:
        with self._touched_lock:
            self._touched.add(self._blobs)

    def _aside(self) -> Path:
        return self._spool / f"{uuid.uuid4().hex}.part"


def _key_part(key: str) -> str:
    """How the names begin of all that arrives for `key`. Hashed, because a key is text from the network."""
    return digests.of_bytes(key.encode("utf-8", "surrogatepass"))[:32]


def _linked(source: Path, target: Path, aside: Path) -> bool:
    """Name `target` for the file `source` by hard link; False where the file system cannot."""
    try:
        os.link(source, aside)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    os.replace(aside, target)
    # Renaming one name of a file onto another name of the same file does nothing and leaves both.
    aside.unlink(missing_ok=True)
    return True


def _copy(source: Path, target: Path, aside: Path) -> None:
    with _removed_on_error(aside):
        shutil.copyfile(source, aside)
        aside.chmod(READ_ONLY)
        _fsync(aside)
        os.replace(aside, target)


@contextlib.contextmanager
def _removed_on_error(aside: Path) -> Generator[None, None, None]:
    try:
        yield
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DiskFullError(f"No space left in {aside.parent}.", "Make room on that disk.") from error
        raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _flush(fd, path)
    finally:
        os.close(fd)


def _flush(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise _not_durable(path, error) from error


def _not_durable(path: Path, error: OSError) -> DurabilityError:
    return DurabilityError(
        f"The disk did not take what was written to {path}: {error.strerror}.",
        "Look at the system's log and the disk's health; then start again. Nothing that was acknowledged depends on it.",
    )


def _removed_if_idle(path: Path, before_s: float) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_mtime >= before_s:
            return False
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
