"""Base models and global states on the device's disk: fetched once, checked by digest, the longest unused removed first.

cache/blobs/<digest>          a global state
cache/base/<digest>/<name>    a base model's files
cache/partial/<digest>        what a cut download left
cache/digests.json            digests of model folders by file state, so that a start need not read gigabytes
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetune.agent.domain import Base, Blob
from fleetune.agent.downlink import RESERVE_BYTES, Downlink
from fleetune.errors import ModelError
from fleetune.wire import basefiles, digests

LOG = logging.getLogger(__name__)

OnBytes = Callable[[int, int], None]

STATES_MAX = 100
"""A round's state is of use until the next one is there. Small ones would fill the bound by the ten thousand, looked at in every round."""


@dataclass(frozen=True)
class _Entry:
    used_ns: int
    size_bytes: int
    path: Path


class Cache:
    """The only writer of its folder. What a task holds is never removed; a task may exceed the bound if nothing else is left."""

    def __init__(
        self, folder: Path, limit_bytes: int, downlink: Downlink, models: Mapping[str, Path], hub_cache: Path | None = None
    ) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._downlink = downlink
        self._models = dict(models)
        self._hub_cache = hub_cache
        self._held: Counter[str] = Counter()
        # Digests whose bytes this process has seen to be right.
        self._verified: set[str] = set()
        # What fits without another look at the folder, whose only writer this is: never more than there is room for.
        self._spare_bytes = 0
        self._spare_states = 0
        for name in ("blobs", "base", "partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def holding(self, names: Iterable[str]) -> Generator[None, None, None]:
        """Protects blobs and bases of these digests from removal."""
        held = list(names)
        self._held.update(held)
        try:
            yield
        finally:
            self._held.subtract(held)
            for name in held:
                if not self._held[name]:
                    del self._held[name]

    async def state(self, blob: Blob, on_bytes: OnBytes) -> Path:
        """The file of a global state, fetched if it is missing. Errors as of Downlink.fetch."""
        path = self._folder / "blobs" / digests.check(blob.digest)
        # Mostly a new state that fits: two questions to the system, which cost less than a turn of a thread.
        is_new = not path.exists() and self._has_spare(blob.size_bytes)
        if not is_new and await asyncio.to_thread(self._use_state, path, blob):
            return path
        await self._downlink.fetch(blob, self._partial(blob.digest), path, durable=False, on_bytes=on_bytes)
        self._verified.add(blob.digest)
        return path

    async def base(self, base: Base, on_bytes: OnBytes) -> Path:
        """A folder with the files of `base`: a local copy of the same digest, else the cache, filled with what it lacks."""
        loop = asyncio.get_running_loop()

        def on_scan(_: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(on_bytes, done, total)

        local = await asyncio.to_thread(self._local, base, on_scan)
        if local is not None:
            return local
        folder = self._folder / "base" / base.digest
        missing = await asyncio.to_thread(self._use_base, folder, base, on_scan)
        total = sum(file.size_bytes for file in base.files)
        before = total - sum(file.size_bytes for file in missing)
        for file in missing:
            started = before

            def on_file(done: int, _: int, started: int = started) -> None:
                on_bytes(started + done, total)

            blob = Blob(file.digest, file.size_bytes)
            await self._downlink.fetch(blob, self._partial(file.digest), folder / file.name, durable=True, on_bytes=on_file)
            before += file.size_bytes
        self._verified.add(base.digest)
        return folder

    def _partial(self, digest: str) -> Path:
        return self._folder / "partial" / digest

    def _use_state(self, path: Path, blob: Blob) -> bool:
        """True where the state is here and whole; otherwise room was made for it."""
        if path.is_file() and path.stat().st_size == blob.size_bytes:
            # Written without fsync: after a power cut, the name may stand and the bytes not.
            if blob.digest in self._verified or digests.of_file(path) == blob.digest:
                self._verified.add(blob.digest)
                os.utime(path)
                return True
            LOG.warning("cached state is damaged, fetched again digest=%s", blob.digest[:12])
            path.unlink()
        self._make_room(blob.size_bytes)
        return False

    def _use_base(self, folder: Path, base: Base, on_scan: basefiles.Progress) -> list[basefiles.BaseFile]:
        """The files that are missing, damaged ones included; room was made for them."""
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        missing = [file for file in base.files if not _has_size(folder / file.name, file.size_bytes)]
        if not missing and base.digest not in self._verified:
            found = {file.name: file.digest for file in basefiles.scan(folder, on_scan, self._folder / "digests.json").files}
            missing = [file for file in base.files if found.get(file.name) != file.digest]
            for file in missing:
                LOG.warning("cached base file is damaged, fetched again base=%s file=%s", base.digest[:12], file.name)
                (folder / file.name).unlink()
        if missing:
            self._verified.discard(base.digest)
            self._make_room(sum(file.size_bytes for file in missing))
        return missing

    def _local(self, base: Base, on_scan: basefiles.Progress) -> Path | None:
        for folder in self._candidates(base):
            try:
                found = basefiles.scan(folder, on_scan, self._folder / "digests.json")
            except (ModelError, OSError) as error:
                LOG.warning("local model cannot be used folder=%s cause=%r", folder, str(error))
                continue
            if found.digest == base.digest:
                return folder
            LOG.info("local model is another one folder=%s digest=%s wanted=%s", folder, found.digest[:12], base.digest[:12])
        return None

    def _candidates(self, base: Base) -> list[Path]:
        """Folders that may hold the base: those configured, the named one first, then the hub's own cache of this revision."""
        names = {base.hub_id, base.hub_id.rpartition("/")[2]} - {""}
        folders = [folder for name, folder in self._models.items() if name in names]
        folders += [folder for name, folder in self._models.items() if name not in names]
        if self._hub_cache is not None and base.hub_id:
            snapshots = self._hub_cache / f"models--{base.hub_id.replace('/', '--')}" / "snapshots"
            if snapshots.is_dir():
                folders += sorted(snapshots.iterdir())
        return folders

    def _has_spare(self, needed_bytes: int) -> bool:
        """Whether one more state of this size fits for sure, and then it is taken for there."""
        if self._spare_states < 1 or self._spare_bytes < needed_bytes or not _has_free(self._folder, needed_bytes + RESERVE_BYTES):
            return False
        self._spare_states -= 1
        self._spare_bytes -= needed_bytes
        return True

    def _make_room(self, needed_bytes: int) -> None:
        """Remove what was used longest ago until `needed_bytes` fit the bounds and the disk, or nothing removable is left."""
        used, states = self._cleared(needed_bytes)
        self._spare_bytes = self._limit_bytes - used - needed_bytes
        self._spare_states = STATES_MAX - states - 1

    def _cleared(self, needed_bytes: int) -> tuple[int, int]:
        """Bytes and states that are left."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        used = sum(entry.size_bytes for entry in entries)
        free = shutil.disk_usage(self._folder).free
        states = sum(entry.path.parent.name == "blobs" for entry in entries)
        for entry in entries:
            is_state = entry.path.parent.name == "blobs"
            fits = used + needed_bytes <= self._limit_bytes and free >= needed_bytes + RESERVE_BYTES
            if fits and states < STATES_MAX:
                break
            if self._held[entry.path.name] > 0 or (fits and not is_state):
                continue
            LOG.info("removed from the cache entry=%s/%s bytes=%d", entry.path.parent.name, entry.path.name[:12], entry.size_bytes)
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
            self._verified.discard(entry.path.name)
            states -= is_state
            used -= entry.size_bytes
            free += entry.size_bytes
        return used, states

    def _entries(self) -> Iterator[_Entry]:
        for kind in ("blobs", "partial", "base"):
            for path in (self._folder / kind).iterdir():
                found = path.stat()
                size_bytes = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else found.st_size
                yield _Entry(found.st_mtime_ns, size_bytes, path)


def hub_cache(environment: Mapping[str, str], home: Path) -> Path:
    """Where the Hugging Face libraries keep what they fetched."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"])
    base = Path(environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    return base / "hub"


def _has_free(folder: Path, needed_bytes: int) -> bool:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize >= needed_bytes


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False
