"""What only the disk knows: sizes of the store, free room, and when the coordinator's own certificates end. Blocks."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

LOOK_S = 10.0
"""Between two looks through the folders of blobs, which may hold thousands."""


@dataclass(frozen=True)
class Folder:
    files: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class ShelfFacts:
    database_bytes: int
    blobs: Folder
    spool: Folder
    damaged: Folder
    free_bytes: int
    size_bytes: int
    expiries_unix_s: dict[str, float]
    """coordinator, authority; what is not there is left out."""


@dataclass(frozen=True)
class Certificates:
    """Where the coordinator's certificate and the root that signs for it lie; None without."""

    coordinator: Path
    authority: Path | None


class Shelf:
    """Used by one thread at a time."""

    def __init__(self, state_dir: Path, certificates: Certificates | None) -> None:
        self._state_dir = state_dir
        self._certificates = certificates
        self._looked_s = -LOOK_S
        self._folders = (Folder(), Folder(), Folder())
        self._expiries: dict[Path, tuple[int, float]] = {}
        """File -> its time of change, and the end of its first certificate."""

    def look(self) -> ShelfFacts:
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            blobs, spool, damaged = (_folder(self._state_dir / name) for name in ("blobs", "spool", "damaged"))
            self._folders = (blobs, spool, damaged)
        disk = os.statvfs(self._state_dir)
        database = sum(_size(self._state_dir / f"coordinator.sqlite{end}") for end in ("", "-wal"))
        return ShelfFacts(database, *self._folders, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize, self._ends())

    def _ends(self) -> dict[str, float]:
        if self._certificates is None:
            return {}
        found = {"coordinator": self._end(self._certificates.coordinator)}
        if self._certificates.authority is not None:
            found["authority"] = self._end(self._certificates.authority)
        return {name: end for name, end in found.items() if end}

    def _end(self, path: Path) -> float:
        """When the first certificate of a file ends; 0 where it cannot be told."""
        try:
            changed_ns = path.stat().st_mtime_ns
            known = self._expiries.get(path)
            if known is None or known[0] != changed_ns:
                from cryptography import x509  # here, since a coordinator without TLS has no use for it

                end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
                known = self._expiries[path] = (changed_ns, end)
        except (OSError, ValueError):  # being replaced just now; the next reading has it
            return 0.0
        return known[1]


def _folder(path: Path) -> Folder:
    files = size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # it has found its place meanwhile
                size += entry.stat(follow_symlinks=False).st_size
                files += 1
    return Folder(files, size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
