"""The trainable blocks of a model by depth from the loss, and what training down to one of them keeps in memory.

Depth 1 is next to the loss (the head where the job trains one, else the last layer), the greatest depth is next to the embeddings:
the other way round than the layers' own numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from fleetune.model import lora
from fleetune.model.batches import Batch
from fleetune.model.lora import AdaptedModel


@dataclass(frozen=True)
class DepthBlock:
    """Trainable tensors of one depth, under the names that PEFT saves them by."""

    name: str
    tensor_names: tuple[str, ...]
    parameters: tuple[torch.nn.Parameter, ...]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def size_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)


def depth_blocks(adapted: AdaptedModel) -> tuple[DepthBlock, ...]:
    """The model's blocks, the one next to the loss first; every trainable tensor is in exactly one."""
    known = {trainable.name: trainable.parameter for trainable in adapted.trainables}
    groups = reversed(lora.blocks(known))
    return tuple(DepthBlock(lora.block_name(names[0]), tuple(names), tuple(known[name] for name in names)) for names in groups)


@contextlib.contextmanager
def training_only(adapted: AdaptedModel, blocks: Sequence[DepthBlock]) -> Generator[None, None, None]:
    """While it lasts only these blocks require gradients, so that autograd neither saves nor computes anything below the deepest."""
    wanted = {id(parameter) for block in blocks for parameter in block.parameters}
    before = [(parameter, parameter.requires_grad) for parameter in adapted.parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def saved_bytes(adapted: AdaptedModel, batch: Batch) -> int:
    """Bytes that a forward pass over `batch` keeps for its backward pass, counted where autograd stores them; weights do not count."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*adapted.model.parameters(), *adapted.model.buffers())}
    owned |= {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output that is kept as it is would hold the graph that holds it: a circle that nothing collects.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = adapted.model(**batch)
    # The loss alone would let go of what only the other outputs hold.
    del output
    return sum(kept.values())
