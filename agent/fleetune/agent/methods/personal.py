"""What of a model is a device's own and never leaves it: B of its LoRA pairs and its head, kept on disk from round to round (FedSA-LoRA).

    <keep folder>/<job>/0007.safetensors     all trained tensors as this device had them after round 7, under PEFT's names

A file is written aside and synced before the round's update is sent, so that what the coordinator has counted is never newer than what lies
here. The last two stay: a round that is done again begins with what it began with the first time. A device that has lost its files goes on
from the job's first B, which is zero, and its first head.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fleetune.child.entry import Emit
from fleetune.errors import FleetuneError, ModelError
from fleetune.model import adapter
from fleetune.model.lora import AdaptedModel
from fleetune.wire import codec

ROUNDS_KEPT = 2
JOBS_KEPT = 8
"""Folders of older jobs go: nobody tells a device that a job has ended."""

SHARED_ENDINGS = (".lora_A.weight", ".lora_embedding_A")
"""What devices send and get."""

_FILE = re.compile(r"([0-9]{4,})\.safetensors", re.ASCII)


def is_shared(name: str) -> bool:
    return name.endswith(SHARED_ENDINGS)


def recall(folder: Path, job_id: str, adapted: AdaptedModel, before: int, emit: Emit) -> bool:
    """Puts what this device kept of the latest round before round `before` into the model, whose shared tensors stay as they are.

    False, and a line in the log, where nothing is kept or what is kept cannot be read.
    """
    found = [(number, path) for number, path in _rounds(_of_job(folder, job_id)) if number < before]
    if not found:
        emit("log", text="nothing of this job is kept on this device: B and head begin as the job's first state has them")
        return False
    number, path = max(found)
    expected = {trainable.name: trainable.parameter for trainable in adapted.trainables if not is_shared(trainable.name)}
    try:
        kept = adapter.read_tensors(path, codec.read_table(path))
        _check(kept, expected)
    except (FleetuneError, OSError) as error:
        emit("log", text=f"this device's own B and head of round {number} are lost: {error} They begin as the job's first state has them")
        return False
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(kept[name])
    return True


def _check(kept: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in expected.items():
        if name not in kept or kept[name].shape != parameter.shape or not bool(torch.isfinite(kept[name]).all()):
            raise ModelError(f"Tensor {name!r} of the kept file does not fit the model, or is not finite.", "")


def keep(folder: Path, job_id: str, adapted: AdaptedModel, number: int) -> Path:
    """Makes what the model has after round `number` durable; older rounds and jobs go."""
    place = _of_job(folder, job_id)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{number:04d}.safetensors"
    tensors = {trainable.name: trainable.parameter.detach().cpu() for trainable in adapted.trainables}
    adapter.write_tensors(path, tensors, {"format": "pt"}, durable=True)
    _sync(place)
    for _, old in sorted(_rounds(place))[:-ROUNDS_KEPT]:
        old.unlink()
    _forget(folder, place)
    return path


def _of_job(folder: Path, job_id: str) -> Path:
    # The name comes from the coordinator.
    return folder / re.sub(r"[^A-Za-z0-9._-]", "_", job_id).lstrip(".")[:120]


def _rounds(place: Path) -> Iterable[tuple[int, Path]]:
    if not place.is_dir():
        return []
    return [(int(found[1]), path) for path in place.iterdir() if (found := _FILE.fullmatch(path.name))]


def _sync(folder: Path) -> None:
    """The names in it are on the disk when this returns."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _forget(folder: Path, present: Path) -> None:
    others = sorted((path for path in folder.iterdir() if path.is_dir() and path != present), key=lambda path: path.stat().st_mtime)
    for path in others[: max(0, len(others) - (JOBS_KEPT - 1))]:
        shutil.rmtree(path, ignore_errors=True)
