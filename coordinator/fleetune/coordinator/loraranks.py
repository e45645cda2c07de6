"""Which LoRA rank a device trains and the state has, from the job file alone: a task that is given again is the same task, and a fold needs
no record."""

from __future__ import annotations

from fnmatch import fnmatchcase

from fleetune.coordinator.jobsections import WITH_REST, JobSpec


def rank_of(spec: JobSpec, device_name: str) -> int:
    """By the first pattern of `method.ranks` that the name matches, in the order of the file; else the job's `lora.rank`."""
    return next((rank for pattern, rank in spec.method.ranks.items() if fnmatchcase(device_name, pattern)), spec.lora.rank)


def residual_rank(spec: JobSpec) -> int:
    """Directions of the state past `lora.rank`, which no device trains; 0 where there are none."""
    return spec.method.residual_rank if spec.method.aggregation in WITH_REST else 0


def state_rank(spec: JobSpec) -> int:
    """Of the pairs that a state holds, and a PEFT folder of it."""
    return spec.lora.rank + residual_rank(spec)


def state_alpha(spec: JobSpec) -> float:
    """With it PEFT multiplies the whole of a state's pair by `scale`."""
    rest = residual_rank(spec)
    return scale(spec) * (spec.lora.rank + rest) if rest else spec.lora.alpha


def scale(spec: JobSpec) -> float:
    """Of every device, whatever its rank: so the first directions of the state mean the same to all of them."""
    return spec.lora.alpha / spec.lora.rank
