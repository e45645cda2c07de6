"""Counters of a container, as both versions of control groups tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator.testbed import containergroup
from fleetune.coordinator.testbed.backend import Sample

NET = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    7000      20    0    0    0     0          0         0     9000      30    0    0    0     0       0          0
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_version_1_keeps_a_folder_for_each_controller(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/7/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/\n",
            "proc/7/net/dev": NET,
            "sys/fs/cgroup/cpuacct/docker/ab/cpuacct.usage": "1500000000\n",
            "sys/fs/cgroup/memory/docker/ab/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/docker/ab/memory.max_usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/docker/ab/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        },
    )
    group = containergroup.find(7, root)
    assert group is not None
    assert group.sample() == Sample(1.5, 1000, 2000, 9000, 7000, 3)


def test_version_2_keeps_one_folder_and_an_older_kernel_no_peak(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/system.slice/docker-ab.scope"
    root = write(
        tmp_path,
        {
            "proc/7/cgroup": "0::/system.slice/docker-ab.scope\n",
            "proc/7/net/dev": NET,
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            f"{folder}/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
            f"{folder}/memory.current": "1000\n",
            f"{folder}/memory.events": "low 0\noom 1\noom_kill 1\n",
        },
    )
    group = containergroup.find(7, root)
    assert group is not None
    assert group.sample() == Sample(2.5, 1000, None, 9000, 7000, 1)


@pytest.mark.parametrize("inner", ["/", "/docker/elsewhere"])
def test_a_group_that_is_not_seen_from_here_is_none(tmp_path: Path, inner: str) -> None:
    root = write(tmp_path, {"proc/7/cgroup": f"0::{inner}\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory\n"})
    assert containergroup.find(7, root) is None
    assert containergroup.find(8, root) is None


def test_a_container_that_has_ended_is_an_error_and_no_sample_of_zeros(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/7/cgroup": "0::/docker/ab\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu\n",
            "sys/fs/cgroup/docker/ab/cpu.stat": "usage_usec 1\n",
        },
    )
    group = containergroup.find(7, root)
    assert group is not None
    with pytest.raises(OSError, match=r"memory\.current|net"):
        group.sample()
