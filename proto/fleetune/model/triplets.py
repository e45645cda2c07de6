"""A base with triplet adapters of the ranks that a state has: what FedARA trains, under the names by which its state holds it.

A state holds, for each module with an adapter, its A, B and E (`svdadapter`), and the head as PEFT would save it. A module that has lost
its last triplet stands nowhere in it. Every round's state may have other ranks; the model follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fleetune.errors import ModelError
from fleetune.model import adapter, bases, lora, svdadapter
from fleetune.model.accelerator import Accelerator
from fleetune.model.bases import LoadedBase
from fleetune.model.lora import AdaptedModel, Trainable
from fleetune.model.recipe import Recipe
from fleetune.model.svdadapter import SvdLinear
from fleetune.wire import codec

PREFIX = "base_model.model."
"""As PEFT writes names, so that a state is told in blocks by depth like any other, and becomes PEFT's by one change of ending."""

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ABE])")


class Triplets:
    """Takes over a fresh base. `adapted` is the model as it is now; `adapters` are those that are alive, by module, sorted."""

    def __init__(self, base: LoadedBase, recipe: Recipe, accelerator: Accelerator, seed: int | None = None) -> None:
        """Every target gets the recipe's rank. ModelError for targets that the model does not have, and for what is no linear layer."""
        if recipe.lora is None:
            raise ModelError("The job trains whole layers; triplets need LoRA.", 'Set `trains = "lora"` in the job.')
        self._base = base
        self._lora = recipe.lora
        self._head = _head(base)
        self._linear = _linear(base, recipe)
        self._config = lora.lora_config(base, recipe, recipe.lora)
        self.scale = recipe.lora.alpha / recipe.lora.rank
        self.adapters: dict[str, SvdLinear] = {}
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._plain = AdaptedModel(base.model, base.tokenizer, (), recipe, accelerator, base.public_name)
        if recipe.gradient_checkpointing:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.fit(dict.fromkeys(self.modules, recipe.lora.rank))

    @property
    def modules(self) -> tuple[str, ...]:
        """Of all modules that may have an adapter, sorted."""
        return tuple(self._linear)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: adapter.rank for name, adapter in self.adapters.items()}

    @property
    def adapted(self) -> AdaptedModel:
        found = {f"{PREFIX}{name}": parameter for name, parameter in svdadapter.tensors(self.adapters).items()} | self._head
        return replace(self._plain, trainables=tuple(Trainable(name, found[name]) for name in sorted(found)))

    def fit(self, ranks: Mapping[str, int], scale: float = 0.0) -> None:
        """Puts adapters of these ranks, made anew, beside these modules and takes all others away; 0 leaves the recipe's scale.

        ModelError, before anything changes, for a module that is no target and for a rank that is none.
        """
        strange = sorted(set(ranks) - set(self._linear))
        if strange:
            raise ModelError(
                f"The module {strange[0]!r} is to have an adapter and is no target of the job in this model.",
                "Use the base that the job was made for, and the same version of Fleetune on both sides.",
            )
        wrong = sorted(name for name, rank in ranks.items() if not 1 <= rank <= self._lora.rank)
        if wrong:
            raise ModelError(
                f"The adapter of {wrong[0]} is to have the rank {ranks[wrong[0]]}; 1 to {self._lora.rank} are allowed.",
                "Use the same version of Fleetune on both sides.",
            )
        self.scale = scale or self._lora.alpha / self._lora.rank
        self.adapters = {}
        for name, layer in self._linear.items():
            if name in ranks:
                self.adapters[name] = SvdLinear(layer, ranks[name], self.scale, self._generator, self._lora.dropout, "left")
            # Without an adapter the plain layer: nothing of it is left to be computed.
            _put(self._base.model, name, self.adapters.get(name, layer))

    def write_config(self, path: Path, base_name: str) -> None:
        """adapter_config.json of a plain LoRA of full rank: what the coordinator makes each round's own of."""
        adapter.write_peft_config(path, self._config, base_name or self._base.public_name)

    def load(self, path: Path, trainables_digest: str = "", scale: float = 0.0) -> None:
        """The model as a state says: adapters of its ranks, with its numbers. ModelError for a state of another model."""
        table = codec.read_table(path)
        self.fit(ranks_of(table), scale)
        state = adapter.read_state(path, {entry.name: entry.parameter for entry in self.adapted.trainables}, trainables_digest)
        with torch.no_grad():
            for entry in self.adapted.trainables:
                entry.parameter.copy_(state[entry.name])


def load(folder: Path, recipe: Recipe, accelerator: Accelerator, seed: int | None = None) -> Triplets:
    """The base from `folder` with fresh adapters; with `seed` their first values, and the head's, are the same again on this machine."""
    if seed is not None:
        torch.manual_seed(seed)
    return Triplets(bases.load(folder, recipe, accelerator), recipe, accelerator, seed)


def ranks_of(table: codec.TensorTable) -> dict[str, int]:
    """Module -> triplets that a state of these tensors has. ModelError where its three parts do not belong together."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for spec in table.specs:
        if found := _PART.fullmatch(spec.name.removeprefix(PREFIX)):
            parts.setdefault(found["module"], {})[found["part"]] = spec.shape
    ranks: dict[str, int] = {}
    for name, shapes in parts.items():
        whole = len(shapes) == 3 and [len(shapes[part]) for part in "ABE"] == [2, 2, 1]
        if not whole or not shapes["A"][0] == shapes["B"][1] == shapes["E"][0]:
            told = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
            raise ModelError(
                f"The state's adapter of {name} consists of {told}; A of rank x inputs, B of outputs x rank and E of rank are expected.",
                "Take a state that method fedara has made.",
            )
        ranks[name] = shapes["E"][0]
    return ranks


def _head(base: LoadedBase) -> dict[str, torch.nn.Parameter]:
    """The head's parameters by saved name, trained in float32 whatever the base's type."""
    found: dict[str, torch.nn.Parameter] = {}
    for module_name in base.head:
        module = base.model.get_submodule(module_name)
        half = any(parameter.dtype != torch.float32 for parameter in module.parameters())
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[f"{PREFIX}{module_name}.{name}"] = parameter
        if half:
            lora.widen_inputs(module)
    return found


def _linear(base: LoadedBase, recipe: Recipe) -> dict[str, torch.nn.Linear]:
    assert recipe.lora is not None
    found = lora.targeted_modules(base.model, base.head, recipe.lora)
    # Heads are trained whole.
    outside = {name: module for name, module in found.items() if not any(name == head or name.startswith(f"{head}.") for head in base.head)}
    linear: dict[str, torch.nn.Linear] = {}
    for name in sorted(outside):
        module = outside[name]
        if not isinstance(module, torch.nn.Linear):
            raise ModelError(
                f"The target {name} is a {type(module).__name__}; triplets are put beside linear layers alone.",
                "Take it out of `targets` in the job, or use method fedavg_lora.",
            )
        linear[name] = module
    return linear


def _put(model: bases.Model, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
