"""A model of which a structure is left, with LoRA pairs of a lower rank: it holds its part of a global state, and tells how that moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer

from fleetune import architectures, structures
from fleetune.architectures import Layout
from fleetune.errors import ModelError
from fleetune.model import adapter
from fleetune.model.lora import ADAPTER, AdaptedModel
from fleetune.model.pruning import Pruned
from fleetune.structures import Structure

_RIGHT = (".lora_A.weight", ".lora_embedding_A")
_LEFT = (".lora_B.weight", ".lora_embedding_B")


def layout_of_folder(folder: Path) -> Layout:
    """The groups of the base in a folder, without loading it. ModelError where it has no readable config or cannot be pruned."""
    return architectures.of_config(folder / "config.json")


class Slim:
    """Takes over a whole adapted model. Its trainables stay the same parameters; only what they hold becomes smaller, or another rank."""

    def __init__(self, adapted: AdaptedModel, layout: Layout) -> None:
        """ModelError where the model has no LoRA, or is not what the layout says."""
        if adapted.recipe.lora is None:
            raise ModelError("The job trains whole layers; cutting heads and neurons out needs LoRA.", 'Set `trains = "lora"` in the job.')
        self.adapted = adapted
        self.layout = layout
        self.pruned = Pruned(adapted.model, layout)
        self._full_rank = self.rank = adapted.recipe.lora.rank
        self._full_scale = self.scale = adapted.recipe.lora.alpha / adapted.recipe.lora.rank
        self._expected = {entry.name: torch.empty_like(entry.parameter, device="meta") for entry in adapted.trainables}

    @property
    def numbers_per_rank(self) -> int:
        """How many numbers a unit of rank is in the pairs of the whole model."""
        pairs = [tensor for name, tensor in self._expected.items() if name.endswith((*_RIGHT, *_LEFT))]
        return sum(tensor.numel() for tensor in pairs) // self._full_rank

    @property
    def structure(self) -> Structure:
        return self.pruned.structure

    def load(self, path: Path, trainables_digest: str = "", rank: int = 0, scale: float = 0.0) -> dict[str, torch.Tensor]:
        """Sets every trained tensor to its part of a whole state, which is returned, on the CPU.

        Of each pair the first `rank` directions are taken, as a state is ordered so that the rest matters least; 0 takes all. Products are
        multiplied by `scale` from now on, and stay what they are; 0 is the recipe's. ModelError for a state of another model and for a
        rank that the state does not have.
        """
        if rank > self._full_rank:
            raise ModelError(
                f"LoRA rank {rank} is asked for, the job's state has {self._full_rank}.", "Use the same version of Fleetune on both sides."
            )
        state = adapter.read_state(path, self._expected, trainables_digest)
        self.rank, self.scale = rank or self._full_rank, scale or self._full_scale
        for entry in self.adapted.trainables:
            # A copy: the state must not move with the model.
            entry.parameter.data = self.part(entry.name, state[entry.name]).to(entry.parameter.device, copy=True)
            entry.parameter.grad = None
        for module in self.adapted.model.modules():
            if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
                module.scaling[ADAPTER] = self.scale
                _resize(module)
        return state

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What the model has of a state's tensor now; a view where it has all of it."""
        cut = architectures.tensor_cut(self.layout, name)
        if cut is not None:
            kept = structures.kept_elements(self.layout, self.structure, cut)
            whole = whole.index_select(cut.axis, torch.tensor(kept, dtype=torch.long, device=whole.device))
        if name.endswith(_RIGHT):
            return whole[: self.rank].contiguous()
        if not name.endswith(_LEFT):
            return whole
        part = whole[:, : self.rank].contiguous()
        return part if self.scale == self._full_scale else part * (self._full_scale / self.scale)

    def changes(self, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """How each trained tensor moved from the part of `state` that the model still has."""
        for entry in self.adapted.trainables:
            now = entry.parameter.detach()
            yield entry.name, now - self.part(entry.name, state[entry.name]).to(now.device)

    def product_change(self, state: Mapping[str, torch.Tensor]) -> float:
        """Frobenius norm of scale * B A now minus as `state` gave it, over all pairs, where the model still has rows and columns."""
        now = {entry.name: entry.parameter.detach() for entry in self.adapted.trainables}
        squares = 0.0
        for name, right in now.items():
            for right_ending, left_ending in zip(_RIGHT, _LEFT, strict=True):
                left_name = name.removesuffix(right_ending) + left_ending
                if not name.endswith(right_ending) or left_name not in now:
                    continue
                a, b = right.cpu().double(), now[left_name].cpu().double()
                a_given, b_given = (self.part(each, state[each]).double() for each in (name, left_name))
                # B A - B0 A0 = [B, B - B0] [A - A0; A0], and the norm of a product needs two small Gram matrices alone.
                lefts, rights = torch.cat([b, b - b_given], dim=1), torch.cat([a - a_given, a_given])
                squares += float(((lefts.T @ lefts) * (rights @ rights.T)).sum())
        return self.scale * math.sqrt(max(0.0, squares))


def _resize(layer: LoraLayer) -> None:
    """torch computes with the weights alone; these are for whoever prints the model."""
    for factors in (layer.lora_A, layer.lora_B):
        if ADAPTER in factors:
            factor = cast("torch.nn.Linear", factors[ADAPTER])
            factor.out_features, factor.in_features = factor.weight.shape
