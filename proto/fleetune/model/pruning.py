"""Cutting heads and neurons out of a model for good: weights, biases, LoRA factors and optimiser moments become smaller together.

Parameters keep their identity (only their data are replaced), so that registries and optimisers that hold them stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from fleetune import architectures, structures
from fleetune.architectures import Attribute, Group, Layout, Sliced
from fleetune.errors import ModelError
from fleetune.model import slices
from fleetune.model.bases import Model
from fleetune.structures import Structure


@dataclass(frozen=True)
class Size:
    """Scalars of all distinct parameters, those of groups that could be cut, and bytes of all."""

    parameters: int
    prunable: int
    size_bytes: int


def layout_of(model: Model) -> Layout:
    """The groups of a loaded model, by its config."""
    return architectures.layout(model.config.to_dict())


class Pruned:
    """A model and what is left of it. The owner of `structure`: whoever cuts the model otherwise makes it lie."""

    def __init__(self, model: torch.nn.Module, layout: Layout, structure: Structure | None = None) -> None:
        """`structure` says how the model was cut before; ModelError where its modules do not have these sizes."""
        self.model = model
        self.layout = layout
        self.structure = structures.check(layout, structures.whole(layout) if structure is None else structure)
        self._modules = _found(model, layout)
        self._check_sizes()

    def cut_to(self, wanted: Structure, optimiser: torch.optim.Optimizer | None = None) -> bool:
        """Cuts the model down to `wanted`, with the moments of `optimiser`; False where nothing had to go.

        Gradients of what is cut are dropped. Graphs of earlier forward passes must be gone. Raises ModelError, and changes nothing,
        where `wanted` is not nested in the present structure or an adapter is merged.
        """
        structures.check(self.layout, wanted)
        if not structures.nested(wanted, self.structure):
            raise ModelError(
                f"Structure {wanted.version} keeps units that were cut before version {self.structure.version}; they are gone.",
                "Load the base again to start from a larger structure.",
            )
        if wanted.kept == self.structure.kept:
            self.structure = wanted
            return False
        for module in self._modules.values():
            _refuse_merged(module)
        for group, before, after in zip(self.layout.groups, self.structure.kept, wanted.kept, strict=True):
            if before != after:
                self._cut(group, before, after, optimiser)
        self.structure = wanted
        return True

    def size(self) -> Size:
        """What the model is now."""
        distinct = {id(parameter): parameter for parameter in self.model.parameters()}.values()
        return Size(
            sum(parameter.numel() for parameter in distinct),
            structures.parameters(self.layout, self.structure),
            sum(parameter.numel() * parameter.element_size() for parameter in distinct),
        )

    def _cut(self, group: Group, before: int, after: int, optimiser: torch.optim.Optimizer | None) -> None:
        for piece in group.slices:
            old, new = (structures.kv_bits(group, bits) if piece.shared else bits for bits in (before, after))
            places = _places(old, new, piece.width)
            for parameter, axis in _parameters(self._modules[piece.path], piece):
                slices.keep(parameter, axis, places, optimiser)
            _resize(self._modules[piece.path], piece.axis, len(places))
        for attribute in group.attributes:
            _set(self.model, attribute, group, after)

    def _check_sizes(self) -> None:
        for group, bits in zip(self.layout.groups, self.structure.kept, strict=True):
            for piece in group.slices:
                number = structures.count(structures.kv_bits(group, bits) if piece.shared else bits) * piece.width
                weight: torch.Tensor = _base(self._modules[piece.path]).weight
                if weight.shape[piece.axis] != number:
                    raise ModelError(
                        f"{piece.path} has the shape {list(weight.shape)}; structure {self.structure.version} needs {number} "
                        f"{'rows' if piece.axis == 0 else 'columns'}.",
                        "Load the model that belongs to this structure.",
                    )


def _found(model: torch.nn.Module, layout: Layout) -> dict[str, Any]:
    """The modules that are cut, by the end of their name. Any: linear layers, embeddings and PEFT's wrappers have no common type."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        # Below a wrapper the same layer appears again, under other names.
        entry = layout.module_of(name)
        if entry is None or name.endswith(".base_layer"):
            continue
        path = entry[1].path
        if path in found:
            raise ModelError(f"The model has more than one module {path}.", "Use a model with one body.")
        found[path] = module
        _check_kind(path, module)
    missing = sorted(layout.modules.keys() - found.keys())
    if missing:
        raise ModelError(
            f"The model lacks {len(missing)} modules of a {layout.model_type} model, such as {missing[0]}.",
            "Use a whole model of this type, in a version of transformers that Fleetune names in its dependencies.",
        )
    return found


def _check_kind(path: str, module: torch.nn.Module) -> None:
    if isinstance(module, LoraLayer):
        for unusual in ("lora_magnitude_vector", "lora_embedding_A"):
            if len(getattr(module, unusual, ())):
                raise ModelError(f"{path} has an adapter with {unusual}, which cannot be cut along.", "Use plain LoRA.")
    base = _base(module)
    # Quantised layers are subclasses, whose weights are packed.
    if type(base) not in (torch.nn.Linear, torch.nn.Embedding):
        raise ModelError(
            f"{path} is a {type(base).__name__}, and only torch.nn.Linear can be cut.",
            "Use a base that is not quantised, without fused layers.",
        )


def _base(module: Any) -> Any:
    return module.base_layer if isinstance(module, LoraLayer) else module


def _refuse_merged(module: Any) -> None:
    if isinstance(module, LoraLayer) and module.merged:
        raise ModelError("An adapter is merged into the weights that are to be cut.", "Unmerge it before, or cut before merging.")


def _places(before: int, after: int, width: int) -> list[int]:
    """Rows or columns of the present tensor that stay."""
    position = {unit: place for place, unit in enumerate(structures.units(before))}
    return [position[unit] * width + offset for unit in structures.units(after) for offset in range(width)]


def _parameters(module: Any, piece: Sliced) -> Iterable[tuple[torch.nn.Parameter, int]]:
    """What shrinks with a module, each with its axis: of a LoRA pair B follows the rows and A the columns."""
    base = _base(module)
    yield base.weight, piece.axis
    if piece.axis == 0 and getattr(base, "bias", None) is not None:
        yield base.bias, 0
    if not isinstance(module, LoraLayer):
        return
    factors: Any = module.lora_A if piece.axis == 1 else module.lora_B  # a module by adapter name
    for factor in factors.values():
        yield factor.weight, piece.axis
        if piece.axis == 0 and factor.bias is not None:
            yield factor.bias, 0


def _resize(module: Any, axis: int, number: int) -> None:
    attribute = "out_features" if axis == 0 else "in_features"
    base = _base(module)
    if isinstance(base, torch.nn.Embedding):
        base.embedding_dim = number
        return
    setattr(base, attribute, number)
    if isinstance(module, LoraLayer):
        setattr(module, attribute, number)
        for factor in (module.lora_B if axis == 0 else module.lora_A).values():
            setattr(factor, attribute, number)


def numbers(group: Group, bits: int) -> Mapping[str, int]:
    """What attributes of modules count."""
    kept = structures.count(bits)
    return {"heads": kept, "neurons": kept, "width": kept * group.width, "heads_per_kv": structures.keep_of(group, bits).each}


def _set(model: torch.nn.Module, attribute: Attribute, group: Group, bits: int) -> None:
    for name, module in model.named_modules():
        if (name == attribute.path or name.endswith(f".{attribute.path}")) and hasattr(module, attribute.name):
            setattr(module, attribute.name, numbers(group, bits)[attribute.counts])
