"""What this machine's own kernel counts of a container: control group and network of its first process, read without the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.testbed.backend import Sample


@dataclass(frozen=True)
class ContainerGroup:
    """`folders`: of processor time and of memory; the same one with control groups of version 2."""

    unified: bool
    folders: tuple[Path, Path]
    network: Path

    def sample(self) -> Sample:
        """OSError or ValueError where the container has ended."""
        cpu, memory = self.folders
        if self.unified:
            cpu_s = _table(cpu / "cpu.stat")["usage_usec"] / 1e6
            used, peak, events = "memory.current", "memory.peak", "memory.events"
        else:
            cpu_s = _number(cpu / "cpuacct.usage") / 1e9
            used, peak, events = "memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
        received, sent = self._link()
        return Sample(
            cpu_s=cpu_s,
            memory_bytes=_number(memory / used),
            memory_peak_bytes=_number(memory / peak) if (memory / peak).exists() else None,  # version 2 has it since Linux 5.19
            sent_bytes=sent,
            received_bytes=received,
            out_of_memory_kills=_table(memory / events).get("oom_kill"),
        )

    def _link(self) -> tuple[int, int]:
        """(received, sent) on eth0."""
        for line in self.network.read_text(encoding="utf-8").splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "eth0":
                words = counters.split()
                return int(words[0]), int(words[8])
        raise ValueError(f"{self.network} has no eth0")


def find(process: int, root: Path = Path("/")) -> ContainerGroup | None:
    """Of a container's first process. None where its groups are not to be seen from here: the engine has a kernel of its own then."""
    try:
        lines = (root / f"proc/{process}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    mount = root / "sys/fs/cgroup"
    inner = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    network = root / f"proc/{process}/net/dev"
    if (mount / "cgroup.controllers").exists():
        folder = mount / inner.get("", "").lstrip("/")
        group = ContainerGroup(True, (folder, folder), network)
    else:
        cpu, memory = (mount / name / inner.get(name, "").lstrip("/") for name in ("cpuacct", "memory"))
        group = ContainerGroup(False, (cpu, memory), network)
    # A root group is not a container's: where it is told, the path was of another place than ours.
    tops = (mount, mount / "cpuacct", mount / "memory")
    return group if all(folder.is_dir() and folder not in tops for folder in group.folders) else None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def _table(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2}
