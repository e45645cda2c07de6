"""Keeping some rows or columns of a parameter for good, with the optimiser's moments of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def keep(parameter: torch.nn.Parameter, axis: int, places: Sequence[int], optimiser: torch.optim.Optimizer | None = None) -> None:
    """Keeps `places` along `axis`, in place; a gradient is dropped. No graph of an earlier forward pass may be alive."""
    index = torch.tensor(places, dtype=torch.long, device=parameter.device)
    shape = parameter.shape
    if optimiser is not None and parameter in optimiser.state:
        state: dict[str, Any] = optimiser.state[parameter]
        for name, value in state.items():
            # The step count is a tensor, too.
            if isinstance(value, torch.Tensor) and value.shape == shape:
                state[name] = value.index_select(axis, index)
    parameter.grad = None
    # A new parameter would leave the optimiser with the old one, and training would go on without an effect. Through `data` the
    # parameter stays the same object; its storage is a new one, so that the old memory is free.
    parameter.data = parameter.data.index_select(axis, index)
