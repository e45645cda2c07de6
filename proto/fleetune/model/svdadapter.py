"""Adapters of the form s B diag(E) A, whose directions (triplets) are scored and dropped; a module leaves with its last one.

FedARA (arXiv:2501.14406): truncated SVD adaptation, dynamic rank allocation, rank-based module pruning. Its text was not at hand beyond
the abstract: parametrisation and scores are those of AdaLoRA (Zhang et al. 2023), as peft has them. Unlike in peft's AdaLoRA, a dropped
triplet is gone: its row of A, its number in E and its column of B take no memory, no gradient and no bytes.

| symbol | name |
| --- | --- |
| A (r x k), B (d x r), E (r) | `right`, `left`, `values` |
| s | `scale`: alpha over the rank at the start; it never changes, or every drop would rescale what is left |
| g | a triplet: column of B, number of E, row of A |
| I-bar, U-bar, beta1, beta2 | sensitivity, its uncertainty, `SMOOTH`, `UNCERTAIN` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fleetune.errors import ModelError
from fleetune.model import slices
from fleetune.model.bases import Model

SPREAD = 0.02
Zero = Literal["values", "left"]
"""The factor that begins at zero."""

SMOOTH = 0.85
UNCERTAIN = 0.85


class SvdLinear(torch.nn.Module):
    """A frozen linear layer with triplets beside it."""

    def __init__(
        self,
        base: torch.nn.Linear,
        rank: int,
        scale: float,
        generator: torch.Generator | None = None,
        dropout: float = 0.0,
        zero: Zero = "values",
    ) -> None:
        """One factor begins at zero, so that the model is what it was; what begins at random is alike on all devices by being sent.

        With `values` at zero, as in AdaLoRA, `left` and `right` are small random numbers. With `left` at zero `values` are ones and `right`
        is as large as LoRA makes it: then the first steps are LoRA's own, where else the product of three small factors takes many to
        become of any size. `dropout` is the chance that an input element of the adapter, not of the layer, is dropped while training.
        """
        super().__init__()
        if rank < 1:
            raise ModelError(f"A triplet adapter has the rank {rank}; at least 1 is needed.", "Take the module away instead.")
        self.base_layer = base
        self.scale = scale
        self.dropout = dropout
        device = base.weight.device
        if zero == "values":
            right = torch.randn(rank, base.in_features, generator=generator) * SPREAD
            left = torch.randn(base.out_features, rank, generator=generator) * SPREAD
            values = torch.zeros(rank)
        else:
            right = (2.0 * torch.rand(rank, base.in_features, generator=generator) - 1.0) / math.sqrt(base.in_features)
            left, values = torch.zeros(base.out_features, rank), torch.ones(rank)
        self.right, self.left, self.values = (torch.nn.Parameter(factor.to(device)) for factor in (right, left, values))

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        taken = inputs.to(self.right.dtype)
        if self.dropout > 0:
            taken = torch.nn.functional.dropout(taken, self.dropout, self.training)
        narrow = torch.nn.functional.linear(taken, self.right) * (self.values * self.scale)
        base: torch.Tensor = self.base_layer(inputs)
        return base + torch.nn.functional.linear(narrow, self.left).to(base.dtype)


def attach(model: Model, targets: Sequence[str], rank: int, alpha: float, seed: int | None = None) -> dict[str, SvdLinear]:
    """Freezes the model and puts triplets beside every linear layer whose name is, or ends after a dot in, one of `targets`; by name.

    ModelError for a target that matches none. Where `seed` is None, random numbers come from torch's own generator.
    """
    model.requires_grad_(False)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = {name: module for name, module in linear.items() if any(name == t or name.endswith(f".{t}") for t in targets)}
    wrong = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in chosen)]
    if wrong or not chosen:
        choices = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(f"No linear layer is named {', '.join(map(repr, wrong))}; there are: {', '.join(choices)}.", "Correct `targets`.")
    found = {name: SvdLinear(module, rank, alpha / rank, generator) for name, module in sorted(chosen.items())}
    for name, module in found.items():
        _put(model, name, module)
    return found


def tensors(adapters: Mapping[str, SvdLinear]) -> dict[str, torch.nn.Parameter]:
    """What is trained and sent, by name; a module that has left has none."""
    named: dict[str, torch.nn.Parameter] = {}
    for name in sorted(adapters):
        adapter = adapters[name]
        named |= {f"{name}.lora_A": adapter.right, f"{name}.lora_B": adapter.left, f"{name}.lora_E": adapter.values}
    return named


def keep(
    model: Model, adapters: dict[str, SvdLinear], alive: Mapping[str, Sequence[bool]], optimiser: torch.optim.Optimizer | None = None
) -> list[str]:
    """Drops the triplets that are not alive (by place among those there are), with their moments; a module without any leaves the model
    and `adapters`. Returns the names of those. ModelError, before anything changes, where the places do not fit.
    """
    for name, adapter in adapters.items():
        if name not in alive or len(alive[name]) != adapter.rank:
            raise ModelError(
                f"The mask of {name} has {len(alive.get(name, ()))} places, its adapter {adapter.rank} triplets.",
                "Take the state and the masks of one round.",
            )
    gone: list[str] = []
    for name, adapter in list(adapters.items()):
        places = [place for place, lives in enumerate(alive[name]) if lives]
        if not places:
            _forget(adapter, optimiser)
            _put(model, name, adapter.base_layer)
            del adapters[name]
            gone.append(name)
        elif len(places) < adapter.rank:
            for parameter, axis in ((adapter.right, 0), (adapter.left, 1), (adapter.values, 0)):
                slices.keep(parameter, axis, places, optimiser)
    return gone


def merge(model: Model, adapters: dict[str, SvdLinear]) -> None:
    """Adds the products to the weights and takes all adapters away."""
    for name, adapter in list(adapters.items()):
        with torch.no_grad():
            weight = adapter.base_layer.weight
            weight += (adapter.scale * (adapter.left * adapter.values) @ adapter.right).to(weight.dtype)
        _put(model, name, adapter.base_layer)
        del adapters[name]


def as_lora(adapters: Mapping[str, SvdLinear], peft_prefix: str = "base_model.model.") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same adapter as a plain LoRA: tensors under PEFT's names, and what adapter_config.json needs to know of them.

    The values go into A; alpha follows each rank, so that PEFT's alpha / r is the scale. Any: settings are of several types.
    """
    state: dict[str, torch.Tensor] = {}
    for name in sorted(adapters):
        adapter = adapters[name]
        state[f"{peft_prefix}{name}.lora_A.weight"] = (adapter.right * adapter.values[:, None]).detach()
        state[f"{peft_prefix}{name}.lora_B.weight"] = adapter.left.detach()
    settings = {
        "peft_type": "LORA",
        "target_modules": sorted(adapters),
        "rank_pattern": {name: adapter.rank for name, adapter in sorted(adapters.items())},
        "alpha_pattern": {name: adapter.scale * adapter.rank for name, adapter in sorted(adapters.items())},
    }
    return state, settings


def orthogonality(adapters: Mapping[str, SvdLinear]) -> torch.Tensor:
    """The mean over all A and B of |A A^T - I| and |B^T B - I| (Frobenius): 0 where triplets say different things. To be added to the loss,
    times 0.1 to 0.5."""
    terms: list[torch.Tensor] = []
    for adapter in adapters.values():
        unit = torch.eye(adapter.rank, device=adapter.values.device)
        terms += [torch.linalg.norm(adapter.right @ adapter.right.T - unit), torch.linalg.norm(adapter.left.T @ adapter.left - unit)]
    return torch.stack(terms).mean() if terms else torch.zeros(())


class TripletScores:
    """Smoothed sensitivity times its smoothed uncertainty of each number, added up per triplet as AdaLoRA does."""

    def __init__(self, adapters: Mapping[str, SvdLinear]) -> None:
        self._adapters = adapters
        self._smooth: dict[str, torch.Tensor] = {}
        self._uncertain: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.skipped = 0

    @torch.no_grad()
    def observe(self) -> bool:
        """Takes in the gradients: after backward (unscaled), before the step. False, and nothing changes, where one is not finite."""
        named = tensors(self._adapters)
        fresh = {name: (p * p.grad).abs() if p.grad is not None else torch.zeros_like(p) for name, p in named.items()}
        if not all(bool(torch.isfinite(values).all()) for values in fresh.values()):
            self.skipped += 1
            return False
        for name, values in fresh.items():
            smooth = self._smooth.setdefault(name, torch.zeros_like(values))
            uncertain = self._uncertain.setdefault(name, torch.zeros_like(values))
            smooth.mul_(SMOOTH).add_(values, alpha=1.0 - SMOOTH)
            uncertain.mul_(UNCERTAIN).add_((values - smooth).abs(), alpha=1.0 - UNCERTAIN)
        self.steps += 1
        return True

    def scores(self) -> dict[str, list[float]]:
        """For each module a number for each of its triplets: that of E, plus the means over its row of A and its column of B."""
        found: dict[str, list[float]] = {}
        for name, adapter in self._adapters.items():
            if f"{name}.lora_E" not in self._smooth:
                found[name] = [0.0] * adapter.rank
                continue
            a, b, e = (self._smooth[f"{name}.{part}"] * self._uncertain[f"{name}.{part}"] for part in ("lora_A", "lora_B", "lora_E"))
            found[name] = [float(value) for value in (e + a.mean(dim=1) + b.mean(dim=0)).tolist()]
        return found

    def follow(self, alive: Mapping[str, Sequence[bool]]) -> None:
        """Drops what belonged to triplets that were dropped by `keep` with the same masks."""
        for kept in (self._smooth, self._uncertain):
            for name in list(kept):
                module, _, part = name.rpartition(".")
                places = [place for place, lives in enumerate(alive[module]) if lives]
                if places:
                    kept[name] = kept[name].index_select(1 if part == "lora_B" else 0, torch.tensor(places, device=kept[name].device))
                else:
                    del kept[name]


def _forget(adapter: SvdLinear, optimiser: torch.optim.Optimizer | None) -> None:
    """An optimiser that still held them would keep their memory."""
    if optimiser is None:
        return
    leaving = {id(parameter) for parameter in (adapter.left, adapter.right, adapter.values)}
    for group in optimiser.param_groups:
        for parameter in [parameter for parameter in group["params"] if id(parameter) in leaving]:
            optimiser.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in leaving]


def _put(model: Model, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
