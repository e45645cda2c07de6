"""Reads the facts off this machine; nothing goes over the network, and nothing that fails stops the rest."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import platform
import re
import signal
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import cast

import psutil

from fleetune.agent.doctor.facts import Facts, Torch
from fleetune.agent.probe import compute, disk, raspberry, thermal
from fleetune.agent.probe.memory import memory

TRAIN_PACKAGES = ("numpy", "ml_dtypes", "safetensors", "transformers", "peft", "accelerate")
TORCH_IMPORT_S = 180.0
"""A minute is usual on a board with a slow card."""

_STA_UNSYNC = 0x0040
_TORCH_SCRIPT = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda or '', torch.cuda.is_available()]))"


def facts(state_dir: Path, root: Path = Path("/")) -> Facts:
    """This machine now. PyTorch is imported in a process of its own: an illegal instruction ends that one, not this."""
    synchronised, error_s = clock()
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        pointer_bytes=struct.calcsize("P"),
        python=(sys.version_info[0], sys.version_info[1]),
        board_name=compute.board(root),
        l4t=l4t(root),
        torch=torch(),
        missing_packages=tuple(name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None),
        nvidia_gpu=compute.accelerator(root).kind == "cuda",
        throttled=raspberry.throttled(raspberry.ask("get_throttled")),
        memory_total_bytes=memory(root).total_bytes,
        swap_total_bytes=int(psutil.swap_memory().total),
        clock_synchronised=synchronised,
        clock_error_s=error_s,
        state_dir=str(state_dir),
        disk_free_bytes=disk.free_bytes(state_dir),
        temperature_c=thermal.hottest_c(root),
    )


def l4t(root: Path = Path("/")) -> str:
    """Release of a Jetson's Linux from /etc/nv_tegra_release; empty where there is none."""
    try:
        text = (root / "etc/nv_tegra_release").read_text("utf-8", "replace")
    except OSError:
        return ""
    match = re.search(r"R(\d+) \(release\), REVISION: ([0-9.]+)", text)
    return f"{match[1]}.{match[2]}" if match else ""


def torch() -> Torch:
    """The installed PyTorch, and whether it imports."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Torch()
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH_SCRIPT], capture_output=True, text=True, timeout=TORCH_IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return Torch(version, trouble=f"not done after {TORCH_IMPORT_S:.0f} s")
    if done.returncode < 0:
        return Torch(version, trouble=f"ended by {signal.Signals(-done.returncode).name}")
    try:
        told, cuda, usable = cast("list[object]", json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return Torch(version, trouble=lines[-1][:300] if lines else f"exit code {done.returncode}")
    return Torch(str(told), str(cuda), bool(usable))


class _Timex(ctypes.Structure):
    """The beginning of the kernel's struct timex, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock() -> tuple[bool | None, float | None]:
    """(synchronised, largest error in seconds) as the kernel keeps them; None where nothing tells."""
    if sys.platform.startswith("linux"):
        try:
            state = _Timex()
            if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) >= 0:
                return not state.status & _STA_UNSYNC, state.maxerror / 1e6
        except (OSError, AttributeError):
            pass
    return _timedatectl(), None


def _timedatectl() -> bool | None:
    try:
        done = subprocess.run(
            ["timedatectl", "show", "-p", "NTPSynchronized", "--value"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip())
