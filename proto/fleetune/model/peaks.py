"""How much memory this process takes, and took at the most, where its tensors lie."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from fleetune.model.accelerator import Accelerator


def present_bytes(accelerator: Accelerator) -> int:
    """Bytes of tensors on a GPU; on a CPU, the process's resident memory."""
    if accelerator.kind == "cuda":
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def forget(accelerator: Accelerator) -> bool:
    """Sets the record of the highest memory back to the present; False where nothing keeps one that could be."""
    if accelerator.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    if accelerator.kind != "cpu":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    # Some sandboxes accept the write and do nothing.
    return 0 < _status_bytes("VmHWM") <= 1.01 * _status_bytes("VmRSS") + (1 << 20)


def highest_bytes(accelerator: Accelerator) -> int:
    """The most since the record was set back, by the measure of `present_bytes`."""
    if accelerator.kind == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0
