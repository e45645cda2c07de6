"""How many floating-point operations a training step takes, counted from the shapes of its matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


@dataclass
class Count:
    """Operations of one step (a multiplication with its addition is two); filled while `counting` lasts."""

    forward: int = 0
    backward: int = 0

    @property
    def step(self) -> int:
        return self.forward + self.backward


@contextlib.contextmanager
def counting(model: torch.nn.Module) -> Generator[Count, None, None]:
    """Counts the forward passes inside, and what their backward passes will take.

    A linear module takes 2 * in * out per token forwards, the same again for the gradient of an input that needs one and of a
    weight that is trained. Attention's own products are not modules: `attention` adds them.
    """
    count = Count()

    def seen(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # Any: whatever modules pass on
        weight = getattr(module, "weight", None)
        if not inputs or not isinstance(inputs[0], torch.Tensor) or not isinstance(weight, torch.Tensor):
            return
        once = 2 * weight.numel() * (inputs[0].numel() // max(1, inputs[0].shape[-1]))
        count.forward += once
        count.backward += once * (int(inputs[0].requires_grad) + int(weight.requires_grad))

    handles = [module.register_forward_hook(seen) for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def attention(rows: int, tokens: int, width: int, layers: int, layers_backward: int) -> Count:
    """Scores and weighted values of full attention: 4 * rows * tokens^2 * width per layer forwards, twice that backwards."""
    once = 4 * rows * tokens * tokens * width
    return Count(once * layers, 2 * once * layers_backward)
