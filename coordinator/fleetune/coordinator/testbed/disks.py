"""Disks of a bounded size: a file with a file system in it, mounted; a full one is full for its device alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from fleetune.coordinator.faults import MachineError

TOOLS = ("mkfs.ext4", "mount", "umount")
COMMAND_S = 60.0
FILLER = ".testbed-filler"
BLOCK_BYTES = 1 << 16


class Disk:
    """One device's. A file system in a file, not tmpfs: what lies on tmpfs counts as memory of who wrote it."""

    def __init__(self, folder: Path, name: str, size_mib: int) -> None:
        self._image = folder / f"{name}.img"
        self._size_mib = size_mib
        self.path = folder / name

    def make(self) -> None:
        """Mounted when this returns. MachineError where the machine does not let us."""
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise MachineError(f"{' and '.join(missing)} not found.", "Install e2fsprogs and mount.")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._image.open("wb") as file:
            file.truncate(self._size_mib << 20)  # takes room only as it is written
        # No journal and nothing kept for root: a board of 100 MiB has 100 MiB.
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(self._image))
        _run("mount", "-o", "loop,noatime", str(self._image), str(self.path))
        with contextlib.suppress(OSError):
            (self.path / "lost+found").rmdir()

    def fill(self) -> int:
        """Leaves no byte free; how many it took."""
        begin = os.statvfs(self.path)
        free_bytes = begin.f_bavail * begin.f_frsize
        descriptor = os.open(self.path / FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size_bytes = free_bytes
            while size_bytes >= begin.f_frsize:
                try:
                    os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, size_bytes)
                except OSError:
                    size_bytes //= 2  # the table of its extents takes some of it
        finally:
            os.close(descriptor)
        return free_bytes

    def free(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / FILLER).unlink()

    def remove(self) -> bool:
        """Unmounted and gone; whether it was mounted. Safe where it was never made."""
        was = os.path.ismount(self.path)
        if was:
            _run("umount", str(self.path))
        with contextlib.suppress(FileNotFoundError):
            self._image.unlink()
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()
        return was


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip()
        raise MachineError(f"`{' '.join(command)}` failed: {said}.", "It takes root and loop devices.") from error
