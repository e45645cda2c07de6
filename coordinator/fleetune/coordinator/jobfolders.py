"""Whether the folders and files that a job names are there, on the coordinator's machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fleetune.complaints import Complaint, shown
from fleetune.coordinator.jobrules import is_folder
from fleetune.coordinator.jobspec import JobSpec


def complaints(spec: JobSpec, has_adapter: Callable[[str], bool]) -> list[Complaint]:
    """What is missing now. `has_adapter` tells whether a job id stands for a job with a committed round."""
    return [*_base(spec), *_init_adapter(spec, has_adapter), *_heldout(spec)]


def _base(spec: JobSpec) -> Iterator[Complaint]:
    base = spec.model.base
    if is_folder(base) and not _there(base, "config.json"):
        yield Complaint(
            "model.base",
            shown(base),
            "a folder with config.json, *.safetensors and a tokenizer",
            "Correct the path on the coordinator's machine.",
        )


def _init_adapter(spec: JobSpec, has_adapter: Callable[[str], bool]) -> Iterator[Complaint]:
    start = spec.lora.init_adapter
    if is_folder(start) and not _there(start, "adapter_config.json"):
        yield Complaint(
            "lora.init_adapter",
            shown(start),
            "a folder with adapter_config.json and adapter_model.safetensors",
            "Correct the path on the coordinator.",
        )
    elif start and not is_folder(start) and not has_adapter(start):
        yield Complaint("lora.init_adapter", shown(start), "the id of a job with a committed round", "See `fleetune jobs`.")


def _heldout(spec: JobSpec) -> Iterator[Complaint]:
    heldout = spec.evaluation.heldout
    if spec.evaluation.source == "heldout" and not _there(heldout, ""):
        yield Complaint("evaluation.heldout", shown(heldout), "an existing JSONL file", "Correct the path on the coordinator's machine.")


def _there(place: str, file_name: str) -> bool:
    """Whether the file exists and may be looked at; a path that the system refuses (too long, a NUL inside) does not."""
    try:
        return (Path(place).expanduser() / file_name).is_file() if file_name else Path(place).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False
