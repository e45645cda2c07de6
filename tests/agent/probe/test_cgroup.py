"""Control groups of both versions, as trees of small files."""

from __future__ import annotations

from pathlib import Path

from fleetune.agent.probe import cgroup, compute
from fleetune.agent.probe.cgroup import MemoryGroup

V1_UNLIMITED = 9223372036854771712


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, own: str, files: dict[str, str]) -> Path:
    return tree(
        root,
        {
            "proc/self/cgroup": f"0::{own}\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        },
    )


def test_version_2_quota_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"})
    assert cgroup.cpu_quota(root) == 1.5


def test_version_2_in_a_container_is_the_mount_itself(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {"cpu.max": "50000 100000\n", "cpu.stat": "usage_usec 2500000\nuser_usec 1\n"})
    assert cgroup.cpu_quota(root) == 0.5
    assert cgroup.cpu_seconds(root) == 2.5


def test_version_1_quota_and_a_path_of_the_host(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpuacct.usage": "3000000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "134217728\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000000\n",
            "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 40000000\n",
        },
    )
    assert cgroup.cpu_quota(root) == 0.5
    assert cgroup.cpu_seconds(root) == 3.0
    assert cgroup.memory_groups(root) == [MemoryGroup(134217728, 60000000)]


def test_no_quota_in_either_version_is_none(tmp_path: Path) -> None:
    assert cgroup.cpu_quota(v2(tmp_path / "2", "/", {"cpu.max": "max 100000\n"})) is None
    one = {
        "proc/self/cgroup": "1:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cgroup.cpu_quota(tree(tmp_path / "1", one)) is None


def test_unlimited_memory_is_no_group(tmp_path: Path) -> None:
    files = {
        "a/memory.max": "max\n",
        "a/memory.current": "5\n",
        "memory.max": "1000\n",
        "memory.current": "400\n",
        "memory.stat": "inactive_file 500\n",
    }
    assert cgroup.memory_groups(v2(tmp_path / "2", "/a", files)) == [MemoryGroup(1000, 0)]
    one = {
        "proc/self/cgroup": "1:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(V1_UNLIMITED),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
    }
    assert cgroup.memory_groups(tree(tmp_path / "1", one)) == []


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert (cgroup.cpu_quota(tmp_path), cgroup.cpu_seconds(tmp_path), cgroup.memory_groups(tmp_path)) == (None, None, [])


def test_nonsense_in_the_files_is_no_limit(tmp_path: Path) -> None:
    root = v2(tmp_path, "/../../x", {"cpu.max": "nonsense\n", "memory.max": "", "cpu.stat": "usage_usec\n"})
    assert (cgroup.cpu_quota(root), cgroup.cpu_seconds(root), cgroup.memory_groups(root)) == (None, None, [])


def test_cores_are_cut_by_the_quota_and_threads_are_whole(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {"cpu.max": "50000 100000\n"})
    assert compute.cores(root) == 0.5
    assert compute.threads(0, root) == 1
    assert compute.threads(64, tmp_path / "none") == len(compute.affinity())
    assert compute.threads(1, tmp_path / "none") == 1


def test_under_a_quota_the_group_s_own_use_is_the_load(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {"cpu.max": "50000 100000\n", "cpu.stat": "usage_usec 1000000\n"})
    meter = compute.CpuMeter(root)
    assert meter.percent(10.0) == 0.0
    (root / "sys/fs/cgroup/cpu.stat").write_text("usage_usec 2000000\n")
    assert meter.percent(14.0) == 50.0
    assert meter.percent(14.0) == 0.0
