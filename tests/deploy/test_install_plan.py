"""What deploy/install.sh would do on boards of every kind, told by --dry-run with faked facts. Nothing is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import stub_wheels

REPO = Path(__file__).resolve().parents[2]
INSTALL = REPO / "deploy" / "install.sh"
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the installer is for Linux")


@dataclass
class Board:
    """A faked machine."""

    folder: Path
    wheel: Path

    def plan(self, *options: str, code: int = 0, environment: Mapping[str, str] | None = None) -> str:
        """What --dry-run prints, after the exit code was as wanted."""
        done = installer(["--dry-run", "--wheel", str(self.wheel), *options], {"FLEETUNE_FACTS": str(self.folder), **(environment or {})})
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


def installer(options: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    # A command of this name in PATH may be a shim that starts nothing.
    kept["PATH"] = f"{sys.base_prefix}/bin{os.pathsep}{kept['PATH']}"
    faked = {"FLEETUNE_MACHINE": "aarch64", "FLEETUNE_BITS": "64", "FLEETUNE_SYSTEM": "Linux", "FLEETUNE_FREE_MIB": "50000"}
    # A dry run with DESTDIR looks at no account and no interpreter's home of the machine that tests run on.
    everything = {**kept, **faked, "DESTDIR": "/nowhere", **(environment or {})}
    if "--python" not in options:  # spares the search
        options = ["--python", sys.executable, *options]
    return subprocess.run(["sh", str(INSTALL), *options], capture_output=True, text=True, check=False, env=everything)


def make(tmp_path: Path, model: str = "", tegra: str = "", system: str = "debian", gpu: bool = False) -> Board:
    facts = tmp_path / "facts"
    for folder in ("etc", "proc/device-tree", "dev"):
        (facts / folder).mkdir(parents=True)
    (facts / "etc/os-release").write_text(f'PRETTY_NAME="Some {system} 12"\nID={system}\n')
    if model:
        (facts / "proc/device-tree/model").write_text(model + "\0")
    if tegra:
        (facts / "etc/nv_tegra_release").write_text(tegra)
    if gpu:
        (facts / "dev/nvidia0").touch()
    return Board(facts, stub_wheels.fleetune(tmp_path / "wheels", "1.2.3"))


def tegra(release: int) -> str:
    return f"# R{release} (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed Jan  1 00:00:00 UTC 2025\n"


@pytest.fixture
def raspberry(tmp_path: Path) -> Board:
    return make(tmp_path, "Raspberry Pi 5 Model B Rev 1.0")


def test_a_raspberry_pi_gets_the_cpu_build_that_is_pinned_for_aarch64(raspberry: Board) -> None:
    plan = raspberry.plan()
    assert "--index-url https://download.pytorch.org/whl/cpu torch==2.9.1" in plan
    assert "Raspberry Pi 5" in plan


def test_a_raspberry_pi_opens_its_firmware_to_the_unit(raspberry: Board) -> None:
    assert "fleetune-agent.service.d/10-board.conf" in raspberry.plan()


def test_a_plan_changes_nothing(raspberry: Board, tmp_path: Path) -> None:
    raspberry.plan("--prefix", str(tmp_path / "prefix"))
    assert not (tmp_path / "prefix").exists()


def test_torch_may_come_from_another_index(raspberry: Board) -> None:
    assert "--index-url https://index.example/cpu torch==2.9.1" in raspberry.plan("--torch-index", "https://index.example/cpu")
    assert "--index-url https://two.example/cpu" in raspberry.plan(environment={"FLEETUNE_TORCH_INDEX": "https://two.example/cpu"})
    assert "--index-url" not in raspberry.plan("--torch-index=pip")


def test_a_relay_gets_no_torch_and_nothing_to_train_with(raspberry: Board) -> None:
    plan = raspberry.plan("--torch", "none")
    assert "torch==" not in plan and "[train]" not in plan


def test_a_coordinator_gets_its_own_unit_account_and_extras(raspberry: Board) -> None:
    plan = raspberry.plan("--role", "coordinator")
    assert "fleetune-coordinator.service" in plan and "[coordinator,train]" in plan and "fleetune-agent" not in plan
    assert "10-board.conf" not in plan


def test_without_systemd_nothing_outside_the_prefix_is_touched(raspberry: Board) -> None:
    plan = raspberry.plan("--no-systemd", "--prefix", "/opt/x")
    # What a line does is to its last word.
    written = [line.split()[-1] for line in plan.splitlines() if re.match(r"\+ (write|mkdir|ln|mv|touch|rm|install|useradd)\b", line)]
    assert written and [path for path in written if not path.startswith("/opt/x/")] == []


def test_offline_asks_no_index(raspberry: Board, tmp_path: Path) -> None:
    plan = raspberry.plan("--offline", str(tmp_path / "wheels"))
    pips = [line for line in plan.splitlines() if " -m pip install" in line]
    assert pips and all("--no-index --find-links" in line for line in pips)
    assert "--index-url" not in plan


def test_offline_finds_the_wheel_of_the_newest_version_in_its_folder(tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0"):
        stub_wheels.fleetune(tmp_path / "wheels", version)
    done = installer(["--dry-run", "--offline", str(tmp_path / "wheels")])
    assert "versions/1.10.0-" in done.stdout


@pytest.mark.skipif(sys.version_info[:2] != (3, 10), reason="JetPack 6 wants Python 3.10")
def test_jetpack_6_gets_nvidia_s_build(tmp_path: Path) -> None:
    plan = make(tmp_path, "NVIDIA Jetson Orin Nano", tegra(36), "ubuntu").plan("--python", PYTHON)
    assert "--index-url https://pypi.jetson-ai-lab.io/jp6/cu126 torch>=2.6,<3" in plan
    assert "10-board.conf" in plan


@pytest.mark.skipif(sys.version_info[:2] == (3, 10), reason="the Python of JetPack 6")
def test_jetpack_6_with_another_python_is_told_which_one_its_torch_is_for(tmp_path: Path) -> None:
    words = make(tmp_path, "NVIDIA Jetson Orin Nano", tegra(36), "ubuntu").plan("--python", PYTHON, code=3)
    assert "JetPack 6 has PyTorch for python3.10" in words and "--python python3.10" in words


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="the Python of JetPack 7")
def test_jetpack_7_with_another_python_is_told_which_one_its_torch_is_for(tmp_path: Path) -> None:
    words = make(tmp_path, "NVIDIA Jetson AGX Thor", tegra(38), "ubuntu").plan("--python", PYTHON, code=3)
    assert "python3.12" in words


def test_a_jetson_may_do_with_the_cpu(tmp_path: Path) -> None:
    plan = make(tmp_path, "NVIDIA Jetson Orin Nano", tegra(36), "ubuntu").plan("--torch", "cpu", "--python", PYTHON)
    assert "https://download.pytorch.org/whl/cpu torch==2.9.1" in plan


@pytest.mark.parametrize("release", [32, 35])
def test_an_old_jetpack_is_refused_with_what_to_flash(tmp_path: Path, release: int) -> None:
    assert "Flash JetPack 6" in make(tmp_path, "NVIDIA Jetson Xavier NX", tegra(release), "ubuntu").plan(code=3)


def test_a_jetson_of_unknown_jetpack_wants_its_index_named(tmp_path: Path) -> None:
    assert "--torch-index" in make(tmp_path, "NVIDIA Jetson Orin Nano", "", "ubuntu").plan("--python", PYTHON, code=6)


def test_a_laptop_with_a_gpu_gets_cuda_only_when_told(tmp_path: Path) -> None:
    laptop = make(tmp_path, gpu=True, system="ubuntu")
    plan = laptop.plan(environment={"FLEETUNE_MACHINE": "x86_64"})
    assert "https://download.pytorch.org/whl/cpu torch==2.9.1" in plan and "--torch cuda" in plan
    assert "torch>=2.6,<3" in laptop.plan("--torch", "cuda", environment={"FLEETUNE_MACHINE": "x86_64"})


def test_a_raspberry_pi_never_gets_cuda(raspberry: Board) -> None:
    assert "no use for" in raspberry.plan("--torch", "cuda", code=6)


def test_only_a_jetson_gets_the_jetson_s(raspberry: Board) -> None:
    assert "Raspberry Pi 5" in raspberry.plan("--torch", "jetson", code=6)


@pytest.mark.parametrize(
    ("faked", "words"),
    [
        ({"FLEETUNE_MACHINE": "armv7l"}, "32-bit"),
        ({"FLEETUNE_MACHINE": "armv6l"}, "32-bit"),
        ({"FLEETUNE_BITS": "32"}, "32-bit under a 64-bit kernel"),
        ({"FLEETUNE_MACHINE": "riscv64"}, "riscv64"),
        ({"FLEETUNE_SYSTEM": "Darwin"}, "Darwin"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_with_what_to_do(raspberry: Board, faked: dict[str, str], words: str) -> None:
    assert words in raspberry.plan(code=3, environment=faked)


def test_a_32_bit_raspberry_is_told_which_system_to_write(raspberry: Board) -> None:
    assert "rpi-imager" in raspberry.plan(code=3, environment={"FLEETUNE_MACHINE": "armv7l"})


def test_another_distribution_is_only_warned_of(tmp_path: Path) -> None:
    assert "was not tried" in make(tmp_path, system="arch").plan()


def test_musl_is_refused(tmp_path: Path) -> None:
    assert "musl" in make(tmp_path, system="alpine").plan(code=3)


def test_too_little_room_is_told_in_figures(raspberry: Board) -> None:
    words = raspberry.plan(code=5, environment={"FLEETUNE_FREE_MIB": "700"})
    assert "700 MiB" in words and "1800 MiB" in words


def test_an_unsuitable_python_is_refused_with_the_package_to_install(raspberry: Board, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    words = raspberry.plan("--python", str(old), code=3)
    assert "Python 3.9.2" in words and "apt install python3-venv" in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frobnicate"], "no option --frobnicate"),
        (["--role", "king"], "agent or coordinator"),
        (["--role"], "needs a value"),
        (["--torch", "rocm"], "auto, cpu, jetson, cuda or none"),
        (["--prefix", "/"], "no folder of Fleetune's own"),
        (["--prefix", "/opt/a b"], "signs"),
        (["--prefix", "/home/YOU/x"], "no home folder"),
        (["--wheel", "/nowhere/fleetune-1.whl"], "is no file"),
        (["--offline", "/nowhere"], "is no folder"),
        (["--memory-max", "lots"], "1500M"),
        (["--memory-max", "1M2"], "1500M"),
        (["--extras", "a;b"], "parquet"),
        (["--purge"], "--uninstall"),
        (["--role", "coordinator", "--torch", "none"], "needs torch"),
    ],
)
def test_a_wrong_option_is_told_by_name_and_ends_with_2(raspberry: Board, options: list[str], words: str) -> None:
    assert words in raspberry.plan(*options, code=2)


@pytest.mark.parametrize("size", ["1500M", "2G", "80%", "1500000000"])
def test_a_limit_of_memory_becomes_a_drop_in(raspberry: Board, size: str) -> None:
    assert "50-memory.conf" in raspberry.plan("--memory-max", size)


def test_a_file_that_is_no_wheel_is_refused(raspberry: Board, tmp_path: Path) -> None:
    raspberry.wheel = tmp_path / "fleetune-1.0.0-py3-none-any.whl"
    raspberry.wheel.write_text("nothing")
    assert "is no wheel" in raspberry.plan(code=4)


def test_uninstalling_what_is_not_there_is_no_fault(tmp_path: Path) -> None:
    done = installer(["--uninstall", "--prefix", str(tmp_path / "none")])
    assert (done.returncode, done.stdout) == (0, f"nothing of Fleetune is in {tmp_path / 'none'}\n")


def test_help_names_every_option_and_every_code() -> None:
    words = installer(["--help"]).stdout
    parsed = set(re.findall(r"^    (--[a-z-]+)\)", INSTALL.read_text(), re.MULTILINE))
    assert parsed and {option for option in parsed if option not in words} == set()
    codes = {int(code) for code in re.findall(r"\b(?:FAILED|USAGE|MACHINE|PACKAGES|ROOM|WRONG_TORCH|BROKEN)=(\d)", INSTALL.read_text())}
    assert codes == {int(code) for code in re.findall(r"^  ([1-9])  ", words, re.MULTILINE)}


def test_the_script_is_clean_of_what_shellcheck_finds() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (it comes with the extra [dev])")
    scripts = [INSTALL, REPO / "deploy" / "setup.sh", REPO / ".ci" / "run"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
