"""The doctor's checks, on boards made up for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetune.agent.doctor import checks
from fleetune.agent.doctor.checks import Level
from fleetune.agent.doctor.facts import Board, Facts, Torch

CPU_TORCH = Torch("2.9.1")
LAPTOP = Facts(torch=CPU_TORCH)
PI_4 = Facts(machine="aarch64", board_name="Raspberry Pi 4 Model B Rev 1.4", torch=CPU_TORCH, throttled=())
PI_5 = replace(PI_4, board_name="Raspberry Pi 5 Model B Rev 1.0")
ORIN = Facts(
    machine="aarch64",
    board_name="NVIDIA Jetson Orin Nano Developer Kit",
    l4t="36.4.3",
    python=(3, 10),
    torch=Torch("2.8.0", "12.6", True),
    nvidia_gpu=True,
)


@pytest.mark.parametrize("facts", [LAPTOP, PI_4, PI_5, ORIN], ids=["laptop", "pi 4", "pi 5", "orin"])
def test_a_machine_as_it_should_be_has_nothing_to_mend(facts: Facts) -> None:
    found = checks.examine(facts)
    assert [one for one in found if one.level is not Level.FINE or one.remedy] == []
    assert checks.worst(found) is Level.FINE


@pytest.mark.parametrize(
    ("facts", "check", "level", "remedy"),
    [
        (replace(PI_4, pointer_bytes=4, machine="aarch64"), "userland", Level.PROBLEM, "rpi-imager"),
        (replace(LAPTOP, python=(3, 9)), "python", Level.PROBLEM, "uv python install 3.12"),
        (replace(LAPTOP, python=(3, 15)), "python", Level.WARNING, "python3.13 -m venv"),
        (replace(ORIN, python=(3, 12)), "python", Level.PROBLEM, "python3.10 -m venv"),
        (replace(ORIN, l4t="38.2.0", python=(3, 10)), "python", Level.PROBLEM, "python3.12 -m venv"),
        (replace(ORIN, l4t="35.4.1"), "board", Level.PROBLEM, "JetPack 6"),
        (replace(ORIN, l4t=""), "board", Level.WARNING, "nvidia-jetpack"),
        (replace(LAPTOP, missing_packages=("peft", "numpy")), "packages", Level.PROBLEM, "fleetune[train]"),
        (replace(LAPTOP, torch=Torch()), "torch", Level.PROBLEM, "whl/cpu"),
        (replace(PI_5, torch=Torch("2.13.0", "13.0")), "torch", Level.PROBLEM, "uninstall"),
        (replace(PI_4, torch=Torch("2.10.0+cpu")), "torch", Level.PROBLEM, "<2.10"),
        (replace(PI_4, torch=Torch("2.4.0", trouble="ended by SIGILL")), "torch", Level.PROBLEM, "<2.10"),
        (replace(ORIN, torch=CPU_TORCH), "torch", Level.PROBLEM, "jp6/cu126"),
        (replace(ORIN, l4t="38.2.0", torch=CPU_TORCH), "torch", Level.PROBLEM, "cu130"),
        (replace(ORIN, torch=Torch("2.8.0", "12.6", False)), "torch", Level.PROBLEM, "--runtime=nvidia"),
        (replace(LAPTOP, nvidia_gpu=True), "torch", Level.PROBLEM, "whl/cu126"),
        (replace(LAPTOP, nvidia_gpu=True, torch=Torch("2.9.1", "12.6", False)), "torch", Level.PROBLEM, "nvidia-smi"),
        (replace(PI_5, throttled=("under-voltage now",)), "throttling", Level.PROBLEM, "27 W"),
        (replace(PI_5, throttled=("under-voltage since the start",)), "throttling", Level.WARNING, "supply"),
        (replace(PI_5, throttled=("throttled now",)), "throttling", Level.PROBLEM, "fan"),
        (replace(PI_5, throttled=("throttled since the start",)), "throttling", Level.WARNING, "fan"),
        (replace(PI_5, temperature_c=84.0), "temperature", Level.WARNING, "fan"),
        (replace(PI_4, memory_total_bytes=2 << 30), "swap", Level.WARNING, "zram"),
        (replace(LAPTOP, memory_total_bytes=2 << 30), "swap", Level.WARNING, "/swapfile"),
        (replace(LAPTOP, clock_synchronised=False), "clock", Level.WARNING, "timedatectl set-ntp true"),
        (replace(LAPTOP, clock_error_s=120.0), "clock", Level.PROBLEM, "timedatectl set-ntp true"),
        (replace(LAPTOP, disk_free_bytes=1 << 30, state_dir="/var/lib/x"), "disk", Level.PROBLEM, "du -xh --max-depth=2 /var/lib/x"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(facts: Facts, check: str, level: Level, remedy: str) -> None:
    found = {one.check: one for one in checks.examine(facts)}[check]
    assert found.level is level
    assert remedy in found.remedy


def test_the_same_torch_is_fine_on_a_pi_5_and_not_on_a_pi_4() -> None:
    torch = Torch("2.10.0+cpu")
    assert checks.torch(replace(PI_5, torch=torch)).level is Level.FINE
    assert checks.torch(replace(PI_4, torch=torch)).level is Level.PROBLEM


def test_small_memory_with_swap_is_fine() -> None:
    assert checks.swap(replace(PI_4, memory_total_bytes=2 << 30, swap_total_bytes=1 << 30)).level is Level.FINE


def test_what_cannot_be_read_is_no_complaint() -> None:
    unknown = replace(LAPTOP, throttled=None, clock_synchronised=None, temperature_c=None)
    assert checks.worst(checks.examine(unknown)) is Level.FINE


@pytest.mark.parametrize(
    ("name", "l4t", "board"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", "", Board.PI_4),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "", Board.PI_4),
        ("Raspberry Pi 5 Model B Rev 1.0", "", Board.PI_5),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "", Board.PI_OTHER),
        ("NVIDIA Jetson AGX Orin", "", Board.JETSON),
        ("", "36.4.3", Board.JETSON),
        ("", "", Board.OTHER),
    ],
)
def test_boards_are_told_by_their_names(name: str, l4t: str, board: Board) -> None:
    assert Facts(board_name=name, l4t=l4t).board is board


@pytest.mark.parametrize(("version", "release"), [("2.10.0+cpu", (2, 10)), ("2.9.0a0+5228986", (2, 9)), ("", (0, 0)), ("main", (0, 0))])
def test_torch_releases_are_read_from_versions(version: str, release: tuple[int, int]) -> None:
    assert Torch(version).release == release
