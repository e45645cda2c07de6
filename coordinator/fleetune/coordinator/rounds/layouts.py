"""The groups of heads and neurons of a job's base model."""

from __future__ import annotations

from pathlib import Path

from fleetune import architectures, sparsity, structures
from fleetune.architectures import Layout
from fleetune.coordinator.domain import Prepared, Pruning
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import WireError

CONFIG_NAME = "config.json"


def of_job(blobs: BlobStore, prepared: Prepared, targets: tuple[str, ...]) -> Layout:
    """Of a prepared job's base, whose files the coordinator keeps as long as the job runs."""
    digest = next(digest for name, digest, _ in prepared.files if name == CONFIG_NAME)
    return of_config(blobs.path(digest), targets)


def of_config(path: Path, targets: tuple[str, ...]) -> Layout:
    """Of the model of this config.json. ModelError where it cannot be pruned, or where LoRA on `targets` would not tell what matters."""
    layout = architectures.of_config(path)
    architectures.check_targets(layout, targets)
    return layout


def reached(layout: Layout, told: Pruning, structure: str) -> float:
    """The sparsity of a device that sends this structure (hex) after a round in which it was told to prune so.

    WireError where it keeps what was cut before, or has cut more than it was told to. It may have cut less: its time was up, or its
    gradients were of no use.
    """
    before = structures.from_bytes(layout, bytes.fromhex(told.structure)) if told.structure else structures.whole(layout)
    after = structures.check_step(layout, before, structures.from_bytes(layout, bytes.fromhex(structure)))
    asked = sparsity.keeps(layout, told.sparsity_after)
    left = [structures.keep_of(group, bits) for group, bits in zip(layout.groups, after.kept, strict=True)]
    for group, keep, wanted, had in zip(layout.groups, left, asked, before.kept, strict=True):
        # A device that could not cut what it was told has a sparsity between two steps, at which fewer may be left than asked for.
        least = min(wanted.units, structures.count(had))
        if keep.units < least:
            raise WireError(
                f"The structure is refused: {group.name} keeps {keep.units} of {group.units}, {least} were to be left.",
                "Use the same version of Fleetune on both sides.",
            )
    if list(asked) == left:
        return told.sparsity_after
    return min(told.sparsity_after, max(told.sparsity_before, structures.sparsity(layout, after)))
