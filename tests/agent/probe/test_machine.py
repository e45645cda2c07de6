"""Board, accelerator, power, heat, memory, disk and links, read off trees of small files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from fleetune.agent.limits import Limits
from fleetune.agent.probe import compute, disk, link, memory, power, thermal
from fleetune.agent.probe.cgroup import MemoryGroup
from fleetune.agent.probe.compute import Accelerator
from fleetune.agent.probe.memory import Memory
from fleetune.agent.probe.owner import OwnerProbe
from fleetune.agent.probe.profile import profile
from fleetune.agent.probe.telemetry import Telemetry


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_board_is_the_device_tree_s_model_without_its_nul(tmp_path: Path) -> None:
    assert compute.board(tree(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})) == "Raspberry Pi 5 Model B Rev 1.0"
    assert compute.board(tmp_path / "none") == ""


def test_an_nvidia_card_is_named_by_its_driver(tmp_path: Path) -> None:
    files = {"dev/nvidia0": "", "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX 4060\nIRQ: 1\n"}
    assert compute.accelerator(tree(tmp_path, files)) == Accelerator("cuda", "NVIDIA RTX 4060")


def test_a_jetson_is_named_by_its_board(tmp_path: Path) -> None:
    root = tree(tmp_path, {"dev/nvhost-gpu": "", "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"})
    assert compute.accelerator(root) == Accelerator("cuda", "NVIDIA Jetson Orin Nano")


def test_without_device_files_there_is_the_cpu_or_apple_s_gpu(tmp_path: Path) -> None:
    assert compute.accelerator(tmp_path, "Linux", "aarch64") == Accelerator("cpu", "")
    assert compute.accelerator(tmp_path, "Darwin", "arm64").kind == "mps"


@pytest.mark.parametrize(
    ("supplies", "answer"),
    [
        ({}, True),
        ({"AC/type": "Mains", "AC/online": "1", "BAT0/type": "Battery", "BAT0/status": "Discharging"}, True),
        ({"AC/type": "Mains", "AC/online": "0", "BAT0/type": "Battery", "BAT0/status": "Discharging"}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Charging"}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Unknown"}, None),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/status": "Discharging"}, True),
    ],
    ids=["no battery", "plugged", "unplugged", "charging", "unknown", "a mouse"],
)
def test_mains_are_told_from_the_supplies(tmp_path: Path, supplies: dict[str, str], answer: bool | None) -> None:
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    tree(tmp_path, {f"sys/class/power_supply/{name}": text + "\n" for name, text in supplies.items()})
    assert power.on_mains(tmp_path) is answer


def test_the_hottest_plausible_sensor_counts(tmp_path: Path) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/hwmon/hwmon0/temp1_input": "61500\n",
        "sys/class/hwmon/hwmon0/temp2_input": "999000\n",
        "sys/class/hwmon/hwmon1/temp1_input": "asleep\n",
    }
    assert thermal.hottest_c(tree(tmp_path, files)) == 61.5
    assert thermal.hottest_c(tmp_path / "none") is None


def test_memory_is_the_tightest_of_machine_groups_and_process_limit() -> None:
    assert memory.tightest(1000, 600, [], None) == Memory(1000, 600)
    assert memory.tightest(1000, 600, [MemoryGroup(500, 100)], None) == Memory(500, 400)
    assert memory.tightest(1000, 600, [MemoryGroup(500, 100), MemoryGroup(800, 790)], None) == Memory(500, 10)
    assert memory.tightest(1000, 600, [MemoryGroup(500, 900)], None) == Memory(500, 0)
    assert memory.tightest(1000, 600, [], 300) == Memory(300, 300)


def test_the_limit_on_address_space_is_read_from_this_process() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    assert memory.address_space_bytes() == (None if soft == resource.RLIM_INFINITY else soft)


def test_a_process_that_is_gone_has_no_memory() -> None:
    assert memory.resident_bytes(os.getpid()) > 1 << 20
    assert memory.resident_bytes(None) == 0
    assert memory.resident_bytes(2**22 + 1) == 0


def test_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    there, not_yet = disk.free_bytes(tmp_path), disk.free_bytes(tmp_path / "not" / "yet")
    assert there > 0
    assert not_yet > 0


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wwan0\t00000000\t0100A8C0\t0003\t0\t0\t700\t00000000\t0\t0\t0
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
wlan0\t0001A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0
wwan0\t0000000A\t00000000\t0001\t0\t0\t700\t000000FF\t0\t0\t0
eth9\t0000000A\t00000000\t0000\t0\t0\t1\t000000FF\t0\t0\t0
"""
SIX = f"{'0' * 32} 00 {'0' * 32} 00 fe8{'0' * 28}1 00000400 00000001 00000000 00000003 {{name}}\n"


@pytest.mark.parametrize(
    ("host", "interfaces"),
    [
        ("192.168.1.7", ("wlan0",)),
        ("10.1.2.3", ("wwan0",)),
        ("8.8.8.8", ("wlan0",)),
        ("coordinator.example", ("wlan0", "usb0")),
        ("127.0.0.1", ("lo",)),
        ("localhost", ("lo",)),
        ("[::1]", ("lo",)),
    ],
)
def test_the_link_is_that_of_the_route(tmp_path: Path, host: str, interfaces: tuple[str, ...]) -> None:
    root = tree(tmp_path, {"proc/net/route": ROUTES, "proc/net/ipv6_route": SIX.format(name="lo") + SIX.format(name="usb0")})
    assert link.interfaces_towards(host, root) == interfaces


def test_without_a_routing_table_nothing_is_known(tmp_path: Path) -> None:
    assert link.interfaces_towards("192.0.2.1", tmp_path) == ()


def test_a_profile_holds_what_this_machine_has(tmp_path: Path) -> None:
    made = profile(tmp_path)
    assert 0 < made.cores <= (os.cpu_count() or 1)
    assert 0 < made.memory_available_bytes <= made.memory_total_bytes
    assert made.disk_free_bytes > 0
    assert made.accelerator in ("cpu", "cuda", "mps")
    assert profile(tmp_path, configured_cores=1, configured_accelerator="cpu").cores <= 1


def test_a_heartbeat_is_filled_from_the_machine(tmp_path: Path) -> None:
    beat = Telemetry(tmp_path).heartbeat(7, child_pid=os.getpid(), task_id="t")
    assert (beat.sequence, beat.task_id) == (7, "t")
    assert 0 <= beat.cpu_percent <= 100
    assert beat.agent_rss_bytes > 1 << 20
    assert beat.child_rss_bytes > 1 << 20
    assert beat.memory_total_bytes >= beat.memory_available_bytes > 0


def test_a_heartbeat_without_a_sensor_tells_no_temperature(tmp_path: Path) -> None:
    assert not Telemetry(tmp_path, root=tmp_path).heartbeat(1).HasField("temperature_c")


def test_only_what_the_owner_limits_is_read(tmp_path: Path) -> None:
    none = OwnerProbe(Limits(allow_metered=True), "192.0.2.1", tmp_path).facts(0.0)
    assert (none.on_mains, none.others_cpu_percent, tuple(none.interfaces)) == (None, None, ())
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    some = OwnerProbe(Limits(on_mains_only=True), "127.0.0.1", tmp_path).facts(0.0)
    assert (some.on_mains, tuple(some.interfaces)) == (True, ("lo",))
