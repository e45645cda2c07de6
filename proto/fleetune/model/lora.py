"""LoRA on a frozen base, or whole layers of it: which tensors are trained, under which names, and in which blocks of depth they lie."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from transformers.pytorch_utils import Conv1D

from fleetune.errors import ModelError
from fleetune.model import bases
from fleetune.model.accelerator import Accelerator
from fleetune.model.bases import LoadedBase, Model, Tokenizer
from fleetune.model.recipe import CAUSAL_LM, CLASSIFICATION, SEQ2SEQ_LM, Lora, Recipe

ADAPTER = "default"
_PREFIX = "base_model.model."
_PEFT_TASKS = {CLASSIFICATION: "SEQ_CLS", CAUSAL_LM: "CAUSAL_LM", SEQ2SEQ_LM: "SEQ_2_SEQ_LM"}
_TARGETABLE = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?:layers?|h|blocks?)\.(?P<index>\d+)\.")
_EMBEDDING_WORDS = ("embed", ".wte.", ".wpe.", ".shared.")
# PEFT's own word for it.
_NO_TARGETS = "dummy-target-modules"
_SHOWN_NAMES = 24


@dataclass(frozen=True)
class Trainable:
    """One tensor that is trained, under the name that PEFT saves it by."""

    name: str
    parameter: torch.nn.Parameter


@dataclass(frozen=True)
class AdaptedModel:
    """A base with its adapter attached; `trainables` are sorted by name and are the canonical registry of the job."""

    model: Model
    tokenizer: Tokenizer
    trainables: tuple[Trainable, ...]
    recipe: Recipe
    accelerator: Accelerator
    public_name: str

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(trainable.parameter for trainable in self.trainables)

    @property
    def parameter_count(self) -> int:
        """All scalars, frozen and trained; a tensor that two modules share counts once."""
        return sum({parameter.data_ptr(): parameter.numel() for parameter in self.model.parameters()}.values())

    @property
    def trainable_count(self) -> int:
        return sum(trainable.parameter.numel() for trainable in self.trainables)


def load(folder: Path, recipe: Recipe, accelerator: Accelerator, seed: int | None = None) -> AdaptedModel:
    """The base from `folder` with a fresh adapter.

    With `seed` the adapter's first values are reproducible on this machine; the coordinator's model host gives one.
    Devices give none: they load the bytes that the host made, since random streams differ between machines.
    """
    if seed is not None:
        torch.manual_seed(seed)
    base = bases.load(folder, recipe, accelerator)
    if seed is not None:
        torch.manual_seed(seed)
    return attach(base, recipe, accelerator)


def attach(base: LoadedBase, recipe: Recipe, accelerator: Accelerator) -> AdaptedModel:
    """Adds the LoRA pairs and makes the head trainable, both in float32 whatever the base's type; or the layers themselves, for a recipe
    without LoRA.

    Raises ModelError for a target that the model does not have, with the names that it has.
    """
    config = lora_config(base, recipe, recipe.lora) if recipe.lora is not None else _layers_config(base, recipe)
    with warnings.catch_warnings():
        # Where Linear and Conv1D targets are mixed PEFT corrects fan_in_fan_out per layer and warns each time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # peft and transformers deprecate parts of each other; nothing that a person here could change.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base.model, config)
    model.peft_config[ADAPTER].base_model_name_or_path = base.public_name
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if recipe.lora is None:
        _forget_originals(model)
    _feed_heads_float32(model)
    if recipe.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only the other kind of checkpointing needs inputs that require gradients; with them every block costs as much as the deepest.
        model.disable_input_require_grads()
    return AdaptedModel(model, base.tokenizer, _registry(model), recipe, accelerator, base.public_name)


def lora_config(base: LoadedBase, recipe: Recipe, wanted: Lora) -> peft.LoraConfig:
    """PEFT's settings of such an adapter. ModelError for a target that the model does not have."""
    targeted = targeted_modules(base.model, base.head, wanted)
    inside_head = sorted(name for name in targeted if _is_inside(name, base.head))
    outside = {name: module for name, module in targeted.items() if name not in inside_head}
    return peft.LoraConfig(
        task_type=_PEFT_TASKS[recipe.model_task],
        r=wanted.rank,
        lora_alpha=wanted.alpha,  # type: ignore[arg-type]  # PEFT scales by any number; only its annotation says int
        lora_dropout=wanted.dropout,
        target_modules=sorted(_target_names(base.model, wanted)),
        # Heads are trained whole; a LoRA pair inside one would train the same weights twice.
        exclude_modules=inside_head or None,
        modules_to_save=list(base.head) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in outside.values()),
    )


def _layers_config(base: LoadedBase, recipe: Recipe) -> peft.LoraConfig:
    """Every layer as a module that PEFT trains and saves whole. PEFT has no adapter of such modules alone, but a LoRA without targets."""
    layers = _layer_names(base.model, base.head)
    if not layers:
        raise ModelError(
            f"The {base.model.config.model_type} model has no list of layers that is known here, so whole layers cannot be trained.",
            'Set `trains = "lora"` in the job.',
        )
    return peft.LoraConfig(
        task_type=_PEFT_TASKS[recipe.model_task], target_modules=_NO_TARGETS, modules_to_save=[*layers, *base.head], inference_mode=False
    )


def _layer_names(model: Model, head: tuple[str, ...]) -> list[str]:
    """Full names of the outermost numbered layers, as `blocks` tells them apart."""
    found: list[str] = []
    for name, module in model.named_modules():
        match = _BLOCK.match(f"{name}.")
        whole = match is not None and match.end() == len(name) + 1
        if whole and any(True for _ in module.parameters()) and not _is_inside(name, head):
            found.append(name)
    return found


def _forget_originals(model: Model) -> None:
    """PEFT keeps the layers as they were beside those that it trains; here both are one, or a device would need room for the base twice."""
    for module in model.modules():
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper):
            trained = dict(module.modules_to_save[ADAPTER].named_parameters())
            for name, original in module.original_module.named_parameters():
                original.data = trained[name].data


def _target_names(model: Model, wanted: Lora) -> tuple[str, ...]:
    if wanted.targets:
        return wanted.targets
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS

    usual = USUAL_TARGETS.get(model.config.model_type)
    if usual is None:
        raise ModelError(
            f"The job names no LoRA targets and there are no usual ones for the model type {model.config.model_type!r}; "
            f"the model has: {', '.join(target_choices(model))}.",
            "Name `targets` in the job.",
        )
    return tuple(usual)


def targeted_modules(model: Model, head: tuple[str, ...], wanted: Lora) -> Mapping[str, torch.nn.Module]:
    """Full names of the modules that get a LoRA pair. A target matches a whole name or its ending after a dot, as in PEFT."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _TARGETABLE)}
    found: dict[str, torch.nn.Module] = {}
    wrong: list[str] = []
    for target in _target_names(model, wanted):
        matches = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not any(not _is_inside(name, head) for name in matches):
            wrong.append(target)
        found |= matches
    if wrong:
        choices = target_choices(model, head)
        shown = ", ".join(choices[:_SHOWN_NAMES]) + (f" and {len(choices) - _SHOWN_NAMES} more" if len(choices) > _SHOWN_NAMES else "")
        raise ModelError(
            f"LoRA {'targets' if len(wrong) > 1 else 'target'} {', '.join(map(repr, wrong))} "
            f"{'match' if len(wrong) > 1 else 'matches'} no module of the {model.config.model_type} model; it has: {shown}.",
            "Correct `targets` in the job.",
        )
    return found


def target_choices(model: Model, head: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The module name endings that LoRA can be attached to: layers first, then embeddings, each sorted."""
    found = {
        (isinstance(module, torch.nn.Embedding), name.rpartition(".")[2])
        for name, module in model.named_modules()
        if isinstance(module, _TARGETABLE) and not _is_inside(name, head)
    }
    return tuple(name for _, name in sorted(found))


def _is_inside(name: str, head: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in head)


def _feed_heads_float32(model: Model) -> None:
    """A head trained in float32 on a half-precision base gets its inputs widened; elsewhere types flow unchanged."""
    for module in model.modules():
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper):
            trained = module.modules_to_save[ADAPTER]
            if any(p.dtype != torch.float32 for p in module.original_module.parameters()):
                widen_inputs(trained)


def widen_inputs(module: torch.nn.Module) -> None:
    """From now on what flows into the module is float32."""
    module.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(_: torch.nn.Module, positional: tuple[object, ...], named: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    return tuple(_float32(value) for value in positional), {key: _float32(value) for key, value in named.items()}


def _float32(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _registry(model: Model) -> tuple[Trainable, ...]:
    trained = {_saved_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Our naming must be PEFT's own; the check costs a millisecond once and catches a PEFT that changed its mind.
    saved: Mapping[str, torch.Tensor] = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    if saved.keys() != trained.keys():
        different = sorted(saved.keys() ^ trained.keys())
        raise ModelError(
            f"PEFT {peft.__version__} would save other tensors than are trained: {', '.join(different[:5])}.",
            "Use other LoRA targets, or a version of peft that Fleetune names in its dependencies.",
        )
    return tuple(Trainable(name, trained[name]) for name in sorted(trained))


def _saved_name(name: str) -> str:
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def blocks(names: Iterable[str]) -> list[list[str]]:
    """Tensor names by depth: the embeddings, then layer by layer (an encoder before its decoder), the head last.

    >>> blocks(["base_model.model.bert.encoder.layer.0.query.lora_A.weight", "base_model.model.classifier.bias"])
    [['base_model.model.bert.encoder.layer.0.query.lora_A.weight'], ['base_model.model.classifier.bias']]
    """
    grouped: dict[tuple[int, bool, str, int], list[str]] = {}
    for name in sorted(names):
        grouped.setdefault(_depth(name), []).append(name)
    return [grouped[depth] for depth in sorted(grouped)]


def block_name(name: str) -> str:
    """What people call the block of depth that a tensor lies in.

    >>> block_name("base_model.model.bert.encoder.layer.0.query.lora_A.weight"), block_name("base_model.model.classifier.bias")
    ('layer.0', 'head')
    """
    place, decoder, _, index = _depth(name)
    if place == 1:
        return f"decoder.layer.{index}" if decoder else f"layer.{index}"
    return "embeddings" if place == 0 else "head"


def _depth(name: str) -> tuple[int, bool, str, int]:
    match = _BLOCK.match(name)
    if match is not None:
        return (1, "decoder" in match["stack"].split("."), match["stack"], int(match["index"]))
    return (0 if any(word in name for word in _EMBEDDING_WORDS) else 2, False, "", 0)
