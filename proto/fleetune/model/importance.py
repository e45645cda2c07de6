"""Which heads and neurons matter, from the gradients that LoRA training makes anyway.

For a linear layer with frozen weight W and pair A, B of scale s, whose gradients are gA and gB, the surrogate for the gradient of W is

    G = gB A + B gA [- gB gA]           (LoRAPrune, Zhang et al. 2023; the last term is quadratic in the gradient and off by default)

and |G * (W + s B A)|, summed over the rows or columns of a unit, is what cutting it would change the loss by, to first order. Each
layer's numbers are scaled to Euclidean norm 1, those of a group are added, and a moving average over local steps smooths them: one
batch's ranking is noisy, the more so the smaller the rank. A batch with a number that is not finite is left out whole.

| symbol | name |
| --- | --- |
| G-hat | the surrogate |
| lambda | `decay` |
| I-bar | `scores` |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from fleetune import structures
from fleetune.architectures import Sliced
from fleetune.errors import ModelError
from fleetune.model.pruning import Pruned

DECAY = 0.9
SLAB_ELEMENTS = 1 << 22
"""Of a weight that are held in float32 at once, a few times over."""

_TINY = 1e-8


class Importance:
    """Smoothed scores of the kept units of a pruned model; follows its structure. Zero, and useless, until something was observed."""

    def __init__(self, pruned: Pruned, decay: float = DECAY, cross_term: bool = False) -> None:
        """ModelError where a group has no layer with a LoRA pair."""
        self._pruned = pruned
        self._decay = decay
        self._cross_term = cross_term
        self._layers = _adapted(pruned)
        self._structure = pruned.structure
        self._smooth = [torch.zeros(structures.count(bits)) for bits in pruned.structure.kept]
        self.steps = 0
        self.skipped = 0

    def observe(self, loss_scale: float = 1.0) -> bool:
        """Takes in the gradients that lie in the LoRA factors: after backward, before the optimiser's step and before clipping.

        Gradients that a gradient scaler still scales are divided by `loss_scale`, or unscaled before. False where the batch was left out
        because a number was not finite.
        """
        self.follow()
        fresh = [self._group(index, loss_scale) for index in range(len(self._layers))]
        if not all(bool(torch.isfinite(values).all()) for values in fresh):
            self.skipped += 1
            return False
        for smooth, values in zip(self._smooth, fresh, strict=True):
            smooth.mul_(self._decay).add_(values, alpha=1.0 - self._decay)
        self.steps += 1
        return True

    def scores(self) -> list[list[float]]:
        """For each group a number for each unit of the unpruned model, 0 where it was cut: what `structures.choose` takes."""
        self.follow()
        found: list[list[float]] = []
        for group, bits, smooth in zip(self._pruned.layout.groups, self._structure.kept, self._smooth, strict=True):
            values = [0.0] * group.units
            for unit, value in zip(structures.units(bits), smooth.tolist(), strict=True):
                values[unit] = float(value)
            found.append(values)
        return found

    def restore(self, scores: Sequence[Sequence[float]], steps: int) -> None:
        """Sets what `scores` gave before, on a device that goes on."""
        self.follow()
        kept = self._structure.kept
        self._smooth = [torch.tensor([values[unit] for unit in structures.units(bits)]) for values, bits in zip(scores, kept, strict=True)]
        self.steps = steps

    def follow(self) -> None:
        """Drops the scores of units that were cut since."""
        now = self._pruned.structure
        if now.kept == self._structure.kept:
            return
        for index, (before, after) in enumerate(zip(self._structure.kept, now.kept, strict=True)):
            if before != after:
                place = {unit: position for position, unit in enumerate(structures.units(before))}
                self._smooth[index] = self._smooth[index][[place[unit] for unit in structures.units(after)]]
        self._structure = now

    def _group(self, index: int, loss_scale: float) -> torch.Tensor:
        """Scores of a group's kept units, from all its layers that have gradients."""
        group, bits = self._pruned.layout.groups[index], self._structure.kept[index]
        clusters = structures.count(structures.kv_bits(group, bits))
        each = structures.count(bits) // clusters
        total = torch.zeros(clusters * each)
        for layer, piece in self._layers[index]:
            values = _sensitivity(layer, piece, self._cross_term, loss_scale)
            # A key/value head's share counts for each of its query heads alike, so that the sum over a cluster is right.
            spread = values.repeat_interleave(each) / each if piece.shared else values
            total += spread.cpu()
        return total


def _adapted(pruned: Pruned) -> list[list[tuple[Any, Sliced]]]:
    layers: list[list[tuple[Any, Sliced]]] = [[] for _ in pruned.layout.groups]
    for name, module in pruned.model.named_modules():
        entry = pruned.layout.module_of(name)
        if entry is not None and isinstance(module, LoraLayer) and len(module.lora_A):
            layers[entry[0]].append((module, entry[1]))
    missing = [group.name for group, found in zip(pruned.layout.groups, layers, strict=True) if not found]
    if missing:
        raise ModelError(
            f"No layer of {', '.join(missing[:3])} has a LoRA pair, so nothing tells which of its units matter.",
            "Name a LoRA target in every group: all linear layers of attention and feed-forward are best.",
        )
    return layers


@torch.no_grad()
def _sensitivity(layer: Any, piece: Sliced, cross_term: bool, loss_scale: float) -> torch.Tensor:
    """|G * (W + s B A)| summed over each unit's rows or columns, scaled to norm 1; a float32 vector of the units, on the layer's device."""
    name = next(iter(layer.lora_A))
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if down.grad is None and up.grad is None:
        raise ModelError("A LoRA pair has no gradient to take importance from.", "Observe after the backward pass, with the pair trained.")
    scale = float(layer.scaling[name])
    weight = layer.get_base_layer().weight
    a, b = down.float(), up.float()
    # Where one of the two is frozen, the other's gradient alone tells.
    grad_a, grad_b = (torch.zeros_like(p, dtype=a.dtype) if p.grad is None else p.grad.float() / loss_scale for p in (down, up))
    rows, columns = weight.shape
    total = torch.zeros(weight.shape[piece.axis], device=weight.device)
    step = max(1, SLAB_ELEMENTS // columns)
    for begin in range(0, rows, step):
        some = slice(begin, min(begin + step, rows))
        surrogate = grad_b[some] @ a
        surrogate += b[some] @ grad_a
        if cross_term:
            surrogate -= grad_b[some] @ grad_a
        surrogate *= torch.addmm(weight[some].float(), b[some], a, alpha=scale)
        surrogate.abs_()
        if piece.axis == 0:
            total[some] = surrogate.sum(dim=1)
        else:
            total += surrogate.sum(dim=0)
    units = total.reshape(-1, piece.width).sum(dim=1)
    scaled: torch.Tensor = units / (units.norm() + _TINY)
    return scaled
