"""The checks: facts in, findings out, each with the command that helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from fleetune.agent.doctor.facts import Board, Facts

DISK_BYTES_MIN = 2 << 30
"""A base model of some size and the outbox; torch itself takes as much again while it is installed."""

SMALL_MEMORY_BYTES = 3 << 30
"""A "2 GiB" or "4 GiB" board shows less; below this a model beside PyTorch is tight."""

HOT_C = 80.0
CLOCK_ERROR_S_MAX = 30.0
"""Certificates of a fleet are good from a few minutes before they were made; half a minute leaves room."""

PYTHON_MIN = (3, 10)
PYTHON_MAX = (3, 13)

_PI_TORCH = "pip install --force-reinstall 'torch>=2.6,<2.10' --index-url https://download.pytorch.org/whl/cpu"
_JETSON_TORCH = {
    6: "pip install --force-reinstall torch --index-url https://pypi.jetson-ai-lab.io/jp6/cu126",
    7: "pip install --force-reinstall torch --index-url https://pypi.jetson-ai-lab.io/sbsa/cu130",
}


class Level(Enum):
    """How bad it is. Problems keep the device from training or spoil what it does; warnings make it slower or less sure."""

    FINE = "fine"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What one check found; `remedy` is what to type or do, empty where all is well."""

    check: str
    level: Level
    message: str
    remedy: str = ""


def examine(facts: Facts) -> list[Finding]:
    """Every check's finding, in the order in which they are worth mending."""
    return [check(facts) for check in CHECKS]


def worst(findings: Sequence[Finding]) -> Level:
    levels = list(Level)
    return max((finding.level for finding in findings), key=levels.index, default=Level.FINE)


def userland(facts: Facts) -> Finding:
    if facts.pointer_bytes < 8 or facts.machine in ("armv6l", "armv7l"):
        return _problem(
            "userland",
            f"This userland is 32-bit ({facts.machine}); PyTorch and NumPy have no packages for it.",
            "Write Raspberry Pi OS (64-bit) to the card with rpi-imager, then install Fleetune anew.",
        )
    return _fine("userland", f"64-bit, {facts.machine}")


def python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python < PYTHON_MIN:
        return _problem(
            "python", f"Python {version} is too old; 3.10 or later is needed.", "uv python install 3.12 && uv venv --python 3.12 .venv"
        )
    if facts.board is Board.JETSON and facts.jetpack in (6, 7):
        wanted = (3, 10) if facts.jetpack == 6 else (3, 12)
        if facts.python != wanted:
            wanted_text = ".".join(map(str, wanted))
            return _problem(
                "python",
                f"Python {version} on JetPack {facts.jetpack}: NVIDIA builds PyTorch for Python {wanted_text} only.",
                f"python{wanted_text} -m venv .venv && . .venv/bin/activate",
            )
    if facts.python > PYTHON_MAX:
        return _warning(
            "python", f"Python {version} is newer than what is tested (3.10 to 3.13).", "python3.13 -m venv .venv && . .venv/bin/activate"
        )
    return _fine("python", version)


def board(facts: Facts) -> Finding:
    name = facts.board_name or facts.machine
    if facts.board is Board.JETSON:
        if facts.l4t and facts.jetpack and facts.jetpack < 6:
            return _problem(
                "board",
                f"{name} runs JetPack {facts.jetpack} (L4T {facts.l4t}); its Python is too old.",
                "Flash JetPack 6 with NVIDIA SDK Manager (Orin), or use the board's CPU in a container with Python 3.10 or later.",
            )
        if not facts.l4t:
            return _warning(
                "board",
                f"{name}: /etc/nv_tegra_release is missing, so JetPack's version is not known.",
                "apt-cache show nvidia-jetpack | grep Version",
            )
        return _fine("board", f"{name}, JetPack {facts.jetpack or '?'} (L4T {facts.l4t})")
    return _fine("board", name)


def packages(facts: Facts) -> Finding:
    if facts.missing_packages:
        return _problem("packages", f"Not installed: {', '.join(facts.missing_packages)}.", "pip install 'fleetune[train]'")
    return _fine("packages", "all there")


def torch(facts: Facts) -> Finding:
    """PyTorch is there, imports, and is the build for the board."""
    found = facts.torch
    if not found.version:
        return _problem("torch", "PyTorch is not installed; this agent can relay but not train.", _torch_remedy(facts))
    if facts.board is Board.PI_4 and found.release == (2, 10):
        return _problem("torch", f"PyTorch {found.version} ends with an illegal instruction on a Raspberry Pi 4.", _torch_remedy(facts))
    if found.trouble:
        return _problem("torch", f"PyTorch {found.version} does not import: {found.trouble}.", _torch_remedy(facts))
    if facts.board.is_raspberry and found.cuda_build:
        return _problem(
            "torch",
            f"PyTorch {found.version} is a CUDA {found.cuda_build} build: gigabytes that a Raspberry Pi cannot use.",
            f"pip freeze | grep -E '^(nvidia-|cuda-|triton)' | cut -d= -f1 | xargs -r pip uninstall -y && {_PI_TORCH}",
        )
    gpu = facts.nvidia_gpu or facts.board is Board.JETSON
    if gpu and not found.cuda_build:
        return _problem("torch", f"PyTorch {found.version} is a CPU build; the GPU would lie idle.", _torch_remedy(facts))
    if gpu and not found.cuda_usable:
        return _problem(
            "torch",
            f"PyTorch {found.version} is built for CUDA {found.cuda_build} but finds no GPU it can use.",
            _torch_remedy(facts) + "   # in a container: start it with --runtime=nvidia" if facts.board is Board.JETSON else "nvidia-smi",
        )
    return _fine("torch", f"{found.version}, {f'CUDA {found.cuda_build}' if found.cuda_build else 'CPU'}")


def throttling(facts: Facts) -> Finding:
    if facts.throttled is None:
        return _fine("throttling", "not told here")
    now = [words for words in facts.throttled if words.endswith("now")]
    if any("under-voltage" in words for words in facts.throttled):
        level = Level.PROBLEM if "under-voltage now" in now else Level.WARNING
        remedy = "Use the board's own power supply (Pi 5: 27 W, Pi 4: 15 W) and a short cable, then: vcgencmd get_throttled"
        return Finding("throttling", level, f"The supply is too weak: {', '.join(facts.throttled)}.", remedy)
    if facts.throttled:
        level = Level.PROBLEM if now else Level.WARNING
        remedy = "Fit a fan or heat sink, then: vcgencmd measure_temp && vcgencmd get_throttled"
        return Finding("throttling", level, f"The board slows down for its heat: {', '.join(facts.throttled)}.", remedy)
    return _fine("throttling", "none since the start")


def temperature(facts: Facts) -> Finding:
    if facts.temperature_c is not None and facts.temperature_c >= HOT_C:
        return _warning("temperature", f"{facts.temperature_c:.0f} °C before any training.", "Fit a fan, or move the machine to air.")
    return _fine("temperature", "no sensor" if facts.temperature_c is None else f"{facts.temperature_c:.0f} °C")


def swap(facts: Facts) -> Finding:
    """A small board needs some, for the seconds in which a model is loaded."""
    if facts.system == "Linux" and facts.memory_total_bytes < SMALL_MEMORY_BYTES and facts.swap_total_bytes < 512 << 20:
        if facts.board.is_raspberry:
            remedy = (
                "sudo apt install -y zram-tools && echo PERCENT=50 | sudo tee -a /etc/default/zramswap && sudo systemctl restart zramswap"
            )
        else:
            remedy = (
                "sudo fallocate -l 2G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile "
                "&& echo '/swapfile none swap sw 0 0' | sudo tee -a /etc/fstab"
            )
        return _warning("swap", f"{_gib(facts.memory_total_bytes)} of memory and {_gib(facts.swap_total_bytes)} of swap.", remedy)
    return _fine("swap", f"{_gib(facts.swap_total_bytes)} beside {_gib(facts.memory_total_bytes)} of memory")


def clock(facts: Facts) -> Finding:
    """From what the kernel says of its own discipline; nothing is asked over the network."""
    remedy = "sudo timedatectl set-ntp true && timedatectl timesync-status"
    if facts.clock_error_s is not None and facts.clock_synchronised and facts.clock_error_s > CLOCK_ERROR_S_MAX:
        return _problem("clock", f"The clock may be wrong by {facts.clock_error_s:.0f} s; certificates would not be accepted.", remedy)
    if facts.clock_synchronised is False:
        return _warning("clock", "The clock is not synchronised; a board without a battery starts in the past.", remedy)
    return _fine("clock", "not told here" if facts.clock_synchronised is None else "synchronised")


def disk(facts: Facts) -> Finding:
    if facts.disk_free_bytes < DISK_BYTES_MIN:
        return _problem(
            "disk",
            f"{_gib(facts.disk_free_bytes)} free at {facts.state_dir or 'the state folder'}; {_gib(DISK_BYTES_MIN)} are needed.",
            f"du -xh --max-depth=2 {facts.state_dir or '/'} | sort -h | tail, or set state_dir to a larger disk",
        )
    return _fine("disk", f"{_gib(facts.disk_free_bytes)} free")


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    userland,
    python,
    board,
    packages,
    torch,
    throttling,
    temperature,
    swap,
    clock,
    disk,
)


def _torch_remedy(facts: Facts) -> str:
    if facts.board is Board.JETSON:
        return _JETSON_TORCH.get(facts.jetpack, _JETSON_TORCH[6])
    if facts.board.is_raspberry or (facts.machine == "aarch64" and not facts.nvidia_gpu):
        return _PI_TORCH
    if facts.nvidia_gpu:
        return "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
    return "pip install 'torch>=2.6,<3' --index-url https://download.pytorch.org/whl/cpu"


def _gib(size_bytes: int) -> str:
    # Rounded down: what is just too little does not read as enough.
    return f"{math.floor(size_bytes / (1 << 30) * 10) / 10:.1f} GiB"


def _fine(check: str, message: str) -> Finding:
    return Finding(check, Level.FINE, message)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, message, remedy)


def _problem(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, Level.PROBLEM, message, remedy)
