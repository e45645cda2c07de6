"""Whose deaths for lack of memory are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.child import oomkills

MACHINE = {"proc/vmstat": "nr_free_pages 5\noom_kill 94\n"}
VERSION_1 = "9:name=systemd:/\n4:memory:/boards/pi\n0::/\n"


def count(root: Path, files: dict[str, str]) -> int:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return oomkills.count(root)


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": VERSION_1,
            "sys/fs/cgroup/memory/boards/pi/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
        },
        {
            "proc/self/cgroup": "0::/system.slice/fleetune-agent.service\n",
            "sys/fs/cgroup/system.slice/fleetune-agent.service/memory.events": "low 0\noom 3\noom_kill 2\n",
        },
        # A container that sees the host's path and its own mount.
        {
            "proc/self/cgroup": "4:memory:/docker/ab\n",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        },
        {"proc/self/cgroup": "0::/docker/ab\n", "sys/fs/cgroup/memory.events": "oom_kill 2\n"},
    ],
    ids=["version 1", "version 2", "container, version 1", "container, version 2"],
)
def test_the_own_group_counts_and_deaths_elsewhere_on_the_machine_do_not(tmp_path: Path, files: dict[str, str]) -> None:
    assert count(tmp_path, {**files, **MACHINE}) == 2


@pytest.mark.parametrize("groups", ["", "0::/\n", "4:memory:/gone\n0::/\n"])
def test_without_a_group_that_counts_the_machine_does(tmp_path: Path, groups: str) -> None:
    assert count(tmp_path, {"proc/self/cgroup": groups, **MACHINE}) == 94


def test_where_nothing_counts_there_are_none(tmp_path: Path) -> None:
    assert count(tmp_path, {}) == 0


def test_this_very_machine_can_be_asked() -> None:
    assert oomkills.count() >= 0
