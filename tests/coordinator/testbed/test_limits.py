"""Quotas through control groups of version 2, on a folder that looks like one: what is written, and what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator.testbed.limits import Group, Limits

MIB = 1 << 20


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    return tmp_path


def test_version_2_takes_both_quotas_in_one_folder(root: Path) -> None:
    Group("board", Limits(0.5, 384 * MIB), root).create()
    assert (root / "board/cpu.max").read_text() == "50000 100000"
    assert (root / "board/memory.max").read_text() == str(384 * MIB)
    assert (root / "board/memory.swap.max").read_text() == "0"


def test_a_controller_that_is_not_handed_down_is_asked_for(root: Path) -> None:
    Group("board", Limits(1.0), root).create()
    assert (root / "cgroup.subtree_control").read_text() == "+cpu"


def test_controllers_that_are_handed_down_are_left_as_they_are(root: Path) -> None:
    (root / "cgroup.subtree_control").write_text("cpu memory\n")
    Group("board", Limits(1.0), root).create()
    assert (root / "cgroup.subtree_control").read_text() == "cpu memory\n"


def test_counters_of_version_2_are_read_in_its_units(root: Path) -> None:
    group = Group("board", Limits(1.0, 384 * MIB), root)
    group.create()
    files = {
        "cpu.stat": "usage_usec 1500000\nuser_usec 1000000\n",
        "memory.current": "1000\n",
        "memory.peak": "2000\n",
        "memory.events": "low 0\noom 4\noom_kill 3\n",
        "cgroup.procs": "",
    }
    for name, text in files.items():
        (root / "board" / name).write_text(text)
    assert (group.cpu_seconds(), group.memory_bytes(), group.memory_events()) == (1.5, (1000, 2000), 3)
    (root / "board/memory.peak").unlink()  # before Linux 5.19
    assert group.memory_bytes() == (1000, None)


def test_a_squeezed_board_has_its_memory_back_afterwards(root: Path) -> None:
    group = Group("board", Limits(1.0, 384 * MIB), root)
    group.create()
    (root / "board/memory.current").write_text(str(100 * MIB))
    group.squeeze(16 * MIB)
    assert (root / "board/memory.max").read_text() == str(116 * MIB)
    group.relax()
    assert (root / "board/memory.max").read_text() == str(384 * MIB)
