"""What a testbed is made of: its coordinator, its devices and how the rows are dealt among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

MIB = 1 << 20
MBIT = 1_000_000.0

Split = Literal["iid", "dirichlet"]


@dataclass(frozen=True)
class Kind:
    """A sort of board as a share of this machine: relative speeds, memories and links of the real ones, not their absolute figures."""

    cpus: float
    memory_mib: int
    up_mbit: float
    down_mbit: float
    latency_ms: float = 0.0
    """Added to each packet in both directions, where the kernel can."""
    disk_mib: int = 2048


KINDS: dict[str, Kind] = {
    "pi4": Kind(cpus=0.5, memory_mib=2048, up_mbit=10, down_mbit=40),
    "pi5": Kind(cpus=1.0, memory_mib=4096, up_mbit=20, down_mbit=80),
    "orin-nano": Kind(cpus=1.5, memory_mib=4096, up_mbit=50, down_mbit=200),
    "orin-agx": Kind(cpus=2.0, memory_mib=8192, up_mbit=100, down_mbit=500),
    "laptop": Kind(cpus=2.0, memory_mib=8192, up_mbit=100, down_mbit=500),
}


@dataclass(frozen=True)
class DeviceSpec:
    """One device of the testbed."""

    name: str
    kind: str
    cpus: float
    memory_mib: int
    up_mbit: float
    down_mbit: float
    latency_ms: float
    disk_mib: int
    share: float
    """Of the rows, relative to the other devices' shares."""


@dataclass(frozen=True)
class TestbedSpec:
    """A whole testbed. `devices` in the order of the file."""

    __test__ = False

    name: str
    seed: int
    coordinator_cpus: float
    coordinator_memory_mib: int
    split: Split
    alpha: float
    devices: tuple[DeviceSpec, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def of_plain(cls, document: dict[str, Any]) -> TestbedSpec:
        """What `plain` gave. TypeError or KeyError for anything else."""
        plain: dict[str, Any] = {**document, "devices": tuple(DeviceSpec(**device) for device in document["devices"])}
        return cls(**plain)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the devices."""
        return tuple(device.name for device in self.devices)

    def device(self, name: str) -> DeviceSpec:
        """KeyError where there is none of that name."""
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)
