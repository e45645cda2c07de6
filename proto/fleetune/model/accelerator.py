"""Where this machine trains: CPU threads, a CUDA GPU or Apple's MPS, and in which number type."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import dataclass

import torch

from fleetune.errors import UnsupportedError

CHOICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Accelerator:
    """The device that tensors live on; `kind` is cpu, cuda or mps."""

    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


def pick(choice: str) -> Accelerator:
    """The accelerator for a device owner's choice; `auto` prefers CUDA, then MPS, then CPU.

    Raises UnsupportedError when the one asked for is absent.
    """
    present = available()
    if choice in ("", "auto"):
        return Accelerator(next(kind for kind in ("cuda", "mps", "cpu") if kind in present))
    if choice not in CHOICES:
        raise UnsupportedError(
            f"accelerator {choice!r} is not known; allowed: {', '.join(CHOICES)}.", "Correct `accelerator` in this device's configuration."
        )
    if choice not in present:
        raise UnsupportedError(
            f"accelerator {choice!r} is not present here: torch {torch.__version__} finds {', '.join(present)}.",
            'Set `accelerator = "auto"`, or install the torch build for this board.',
        )
    return Accelerator(choice)


def available() -> tuple[str, ...]:
    """The kinds that torch can use on this machine; `cpu` always."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return tuple(kinds)


def set_threads(threads: int) -> int:
    """Torch computes with this many threads; 0 or less means all cores that the process may use. Returns the count."""
    count = threads if threads > 0 else _usable_cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def base_dtype(choice: str, accelerator: Accelerator) -> torch.dtype | None:
    """The type of the frozen weights; None means the type the checkpoint is stored in.

    `auto` is float32 on a CPU, where the half types are slow, and the checkpoint's own type elsewhere.
    """
    if choice == "auto":
        return torch.float32 if accelerator.kind == "cpu" else None
    return _DTYPES[choice]


def release_memory(accelerator: Accelerator) -> None:
    """Gives cached blocks back, after an allocation failed or when a request is over."""
    gc.collect()
    if accelerator.kind == "cuda":
        torch.cuda.empty_cache()
    elif accelerator.kind == "mps":
        torch.mps.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none
            trim(0)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
