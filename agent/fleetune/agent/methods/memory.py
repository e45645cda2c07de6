"""What memory a pruning round takes on this machine, and what of it there is: the figures by which the next arm is bounded."""

from __future__ import annotations

import torch

from fleetune.agent.methods.work import Limits, peak_rss_bytes
from fleetune.agent.probe.memory import training_room
from fleetune.model import peaks
from fleetune.model.accelerator import Accelerator
from fleetune.model.slim import Slim

TRAINED_COPIES = 4
"""Of a trained number in float32: itself, its gradient and AdamW's two moments."""


class MemoryWatch:
    """From before a round's first step to after its last."""

    def __init__(self, slim: Slim, limits: Limits) -> None:
        self._slim = slim
        self._accelerator: Accelerator = slim.adapted.accelerator
        self._room_bytes = _room_bytes(self._accelerator, limits)
        self._resettable = peaks.forget(self._accelerator)

    def figures(self) -> dict[str, float]:
        """Bytes; empty where the memory cannot be seen, as on Apple's GPUs."""
        if self._accelerator.kind == "mps":
            return {}
        # Where no record can be set back it is that of the whole process so far, which is never less.
        peak = peaks.highest_bytes(self._accelerator) if self._resettable else peak_rss_bytes()
        return {
            "peak_bytes": float(peak),
            "room_bytes": float(self._room_bytes),
            "prunable_bytes": float(self._slim.layout.prunable_parameters * self._frozen_bytes()),
            "rank_bytes": 4.0 * TRAINED_COPIES * self._slim.numbers_per_rank,
        }

    def _frozen_bytes(self) -> int:
        """Of a number of the base."""
        return next((p.element_size() for p in self._slim.adapted.model.parameters() if not p.requires_grad), 4)


def _room_bytes(accelerator: Accelerator, limits: Limits) -> int:
    """What this process may take: what is free and what it has, and no more than its owner allows."""
    if accelerator.kind == "cuda":
        # Of the GPU; what the owner allows is of the machine's own memory.
        return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
    free = training_room().free_bytes + peaks.present_bytes(accelerator)
    return min(free, limits.memory_bytes) if limits.memory_bytes else free
