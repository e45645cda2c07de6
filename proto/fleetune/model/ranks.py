"""A model's LoRA pairs at a lower rank, or with one of the two matrices held, for the time of a round.

What lies past that rank is left out, or is a part of the frozen weights as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import peft
import torch

from fleetune.errors import ModelError
from fleetune.model.lora import ADAPTER, AdaptedModel

Side = Literal["both", "left", "right"]
"""Which matrices of a pair are trained: left is B, d x r; right is A, r x k."""

_SIDES = (("lora_A", "right"), ("lora_B", "left"), ("lora_embedding_A", "right"), ("lora_embedding_B", "left"))


@dataclass(frozen=True)
class _Half:
    """One matrix of a pair: where it hangs, and its parameter at full rank."""

    side: str
    owner: torch.nn.Module
    attribute: str
    full: torch.nn.Parameter


@contextlib.contextmanager
def narrowed(
    adapted: AdaptedModel, rank: int = 0, scale: float = 0.0, trains: Side = "both", *, keeps_rest: bool = False
) -> Generator[AdaptedModel]:
    """The model with the first `rank` directions of its pairs and that scale, as it stands now; whole again afterwards.

    What lies past `rank` is left out: the coordinator orders a state so that what stays is the best of that rank. With `keeps_rest` it is
    added to the frozen weights instead, as FLoRA and FedEx-LoRA do, in new tensors beside the old ones: a weight may be tied to another.
    The product stays what it is when the scale changes. Matrices that are not trained are no trainables of what is yielded.

    With 0, 0 and "both" it is the model itself. Raises ModelError for a rank above the model's own.
    """
    lora = adapted.recipe.lora
    own_scale = lora.alpha / lora.rank if lora is not None else 0.0
    rank, scale = rank or (lora.rank if lora is not None else 0), scale or own_scale
    if lora is None or (rank == lora.rank and scale == own_scale and trains == "both"):
        yield adapted
        return
    if rank > lora.rank:
        raise ModelError(
            f"LoRA rank {rank} is asked for, the job's state has {lora.rank}.", "Use the same version of Fleetune on both sides."
        )
    with contextlib.ExitStack() as undo:
        names = {trainable.parameter: trainable.name for trainable in adapted.trainables}
        replaced: dict[str, torch.nn.Parameter | None] = {}
        for layer in _layers(adapted):
            undo.callback(_setter(layer.scaling, layer.scaling[ADAPTER]))
            if keeps_rest:
                _add_rest(layer, rank, undo)
            layer.scaling[ADAPTER] = scale
            for half in _halves(layer):
                kept = half.full[:rank] if half.side == "right" else half.full[:, :rank] * (own_scale / scale)
                is_trained = trains in ("both", half.side)
                # Not the parameter itself, also at full rank: what stays behind is as it was.
                narrow = torch.nn.Parameter(kept.detach().clone(), requires_grad=is_trained)
                undo.callback(_put, half, half.full)
                _put(half, narrow)
                replaced[names[half.full]] = narrow if is_trained else None
        now = ((trainable, replaced.get(trainable.name, trainable.parameter)) for trainable in adapted.trainables)
        trainables = [replace(trainable, parameter=parameter) for trainable, parameter in now if parameter is not None]
        yield replace(adapted, trainables=tuple(trainables))


def _add_rest(layer: peft.tuners.lora.LoraLayer, rank: int, undo: contextlib.ExitStack) -> None:
    """The product of the directions past `rank`, at the layer's own scale, becomes a part of its frozen weight until `undo`."""
    with contextlib.ExitStack() as whole, torch.no_grad():
        for half in _halves(layer):
            whole.callback(_put, half, half.full)
            rest = half.full[rank:] if half.side == "right" else half.full[:, rank:]
            _put(half, torch.nn.Parameter(rest.detach(), requires_grad=False))
        # PEFT knows how each kind of layer has its weight: embeddings and Conv1D have it transposed.
        assert isinstance(layer, peft.tuners.lora.Linear | peft.tuners.lora.Embedding), "what `lora.attach` finds"
        product = layer.get_delta_weight(ADAPTER)
        base = layer.get_base_layer()
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        sum_of_both = torch.add(weight, product).to(weight.dtype)  # of unlike types in the wider one, rounded once
    undo.callback(setattr, base, "weight", weight)
    base.weight = torch.nn.Parameter(sum_of_both, requires_grad=False)


def _layers(adapted: AdaptedModel) -> list[peft.tuners.lora.LoraLayer]:
    return [module for module in adapted.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer) and ADAPTER in module.scaling]


def _halves(layer: peft.tuners.lora.LoraLayer) -> Iterator[_Half]:
    for word, side in _SIDES:
        held = getattr(layer, word)
        if ADAPTER not in held:
            continue
        found = held[ADAPTER]
        if isinstance(found, torch.nn.Parameter):
            yield _Half(side, held, ADAPTER, found)
        else:
            yield _Half(side, found, "weight", found.weight)


def _put(half: _Half, parameter: torch.nn.Parameter) -> None:
    if isinstance(half.owner, torch.nn.ParameterDict):
        half.owner[half.attribute] = parameter
    else:
        setattr(half.owner, half.attribute, parameter)
        # torch computes with the weight alone; these are for whoever prints the model.
        if isinstance(half.owner, torch.nn.Linear):
            half.owner.out_features, half.owner.in_features = parameter.shape


def _setter(scaling: dict[str, float], before: float) -> Callable[[], None]:
    def put_back() -> None:
        scaling[ADAPTER] = before

    return put_back
