"""A device's disk: full for it alone, and gone when it is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.coordinator.testbed.disks import TOOLS, Disk

MIB = 1 << 20


def _may(folder: Path) -> bool:
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS):
        return False
    (folder / "try.img").write_bytes(bytes(MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", str(folder / "try.img")], check=True, capture_output=True)
    (folder / "try").mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", str(folder / "try.img"), str(folder / "try")], capture_output=True, check=False)
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder / "try")], check=True)
    return mounted.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not _may(tmp_path):
        pytest.skip("disks need root, e2fsprogs and loop devices")
    made = Disk(tmp_path / "disks", "board", 16)
    made.make()
    yield made
    made.remove()


def test_a_full_disk_takes_no_byte_until_it_is_freed(disk: Disk) -> None:
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        (disk.path / "more").write_bytes(bytes(1 << 16))
    disk.free()
    (disk.path / "more").write_bytes(bytes(MIB))
    assert (disk.path / "more").stat().st_size == MIB


def test_a_disk_holds_about_its_size_and_takes_room_only_as_it_is_written(disk: Disk) -> None:
    room = os.statvfs(disk.path)
    assert 14 * MIB < room.f_bavail * room.f_frsize <= 16 * MIB
    image = disk.path.with_name("board.img").stat()
    assert image.st_blocks * 512 < 4 * MIB


def test_removing_it_twice_is_no_mistake(disk: Disk) -> None:
    assert disk.remove()
    assert not disk.remove()
    assert not disk.path.exists()
