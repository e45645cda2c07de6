"""Which LoRA rank a device trains, from the job file alone: a task that is given again is the same task, and a fold needs no record."""

from __future__ import annotations

from fnmatch import fnmatchcase

from fleetune.coordinator.jobsections import JobSpec


def rank_of(spec: JobSpec, device_name: str) -> int:
    """By the first pattern of `method.ranks` that the name matches, in the order of the file; else the job's `lora.rank`."""
    return next((rank for pattern, rank in spec.method.ranks.items() if fnmatchcase(device_name, pattern)), spec.lora.rank)


def scale(spec: JobSpec) -> float:
    """Of every device, whatever its rank: so the first directions of the state mean the same to all of them."""
    return spec.lora.alpha / spec.lora.rank
