"""A pruned model as a folder that people use without Fleetune: by plain transformers, or by a small loader that lies in it."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from fleetune import structures
from fleetune.architectures import Group, Layout
from fleetune.errors import ModelError
from fleetune.model import load_pruned
from fleetune.model.bases import Tokenizer
from fleetune.model.pruning import Pruned, numbers
from fleetune.structures import Structure

STRUCTURE_NAME = load_pruned.STRUCTURE
LOADER_NAME = "load_pruned.py"
README_NAME = "README.md"


@dataclass(frozen=True)
class SavedFolder:
    """`plain`: transformers' from_pretrained loads it; else the loader in it does."""

    folder: Path
    plain: bool
    size_bytes: int


def merged(pruned: Pruned) -> Pruned:
    """The adapter is added to the weights and taken away; heads that were trained whole take their places. The old model is used up."""
    model: Any = pruned.model
    return Pruned(model.merge_and_unload(), pruned.layout, pruned.structure) if isinstance(model, PeftModel) else pruned


def stated(layout: Layout, structure: Structure) -> dict[str, int] | None:
    """What config.json has to say of a structure's sizes; None where it cannot, as layers differ or head sizes would change."""
    sizes: dict[str, set[int]] = {}
    for group, bits in zip(layout.groups, structure.kept, strict=True):
        keep = structures.keep_of(group, bits)
        if group.kind == "neurons":
            sizes.setdefault(layout.keys.neurons, set()).add(keep.units)
            continue
        if not layout.keys.head_dim and keep.units != group.units:
            return None
        sizes.setdefault(layout.keys.heads, set()).add(keep.units)
        if layout.keys.kv_heads:
            sizes.setdefault(layout.keys.kv_heads, set()).add(keep.clusters)
        if layout.keys.head_dim:
            sizes.setdefault(layout.keys.head_dim, set()).add(group.width)
    if any(len(found) > 1 for found in sizes.values()):
        return None
    return {key: found.pop() for key, found in sizes.items()}


def save(folder: Path, pruned: Pruned, tokenizer: Tokenizer = None, base_digest: str = "") -> SavedFolder:
    """Writes a merged model aside, syncs and renames it to `folder`, which must not exist.

    Raises ModelError where an adapter is still attached or the folder is there.
    """
    model: Any = pruned.model
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("The model still has an adapter beside its weights.", "Merge it before the model is saved.")
    if folder.exists():
        raise ModelError(f"The folder {str(folder)!r} exists.", "Name one that does not, or remove it.")
    sizes = stated(pruned.layout, pruned.structure)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(aside, pruned, sizes, tokenizer, base_digest)
        _sync(aside)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return SavedFolder(folder, sizes is not None, sum(path.stat().st_size for path in folder.iterdir()))


def _write(aside: Path, pruned: Pruned, sizes: Mapping[str, int] | None, tokenizer: Tokenizer, base_digest: str) -> None:
    model: Any = pruned.model
    usual = model.config
    model.config = copy.deepcopy(usual)
    model.config._name_or_path = ""  # a path of this machine
    for key, value in (sizes or {}).items():
        setattr(model.config, key, value)
    try:
        model.save_pretrained(aside, safe_serialization=True)
    finally:
        model.config = usual
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    (aside / STRUCTURE_NAME).write_text(json.dumps(manifest(pruned, base_digest), indent=1) + "\n", encoding="utf-8")
    (aside / README_NAME).write_text(_readme(pruned, sizes is not None), encoding="utf-8")
    if sizes is None:
        shutil.copyfile(load_pruned.__file__, aside / LOADER_NAME)


def manifest(pruned: Pruned, base_digest: str = "") -> dict[str, object]:
    """structure.json: what is kept, and for the loader which modules have other sizes and what they count."""
    modules = [
        (name, entry[0])
        for name, module in pruned.model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and (entry := pruned.layout.module_of(name)) is not None
    ]
    attributes: list[tuple[str, str, int]] = []
    for group, bits in zip(pruned.layout.groups, pruned.structure.kept, strict=True):
        attributes += _attributes(pruned.model, group, numbers(group, bits))
    return {
        **structures.to_json(pruned.layout, pruned.structure),
        "base_digest": base_digest,
        "sparsity": round(structures.sparsity(pruned.layout, pruned.structure), 6),
        "modules": [name for name, _ in modules],
        "attributes": attributes,
    }


def _attributes(model: torch.nn.Module, group: Group, counted: Mapping[str, int]) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []
    for attribute in group.attributes:
        for name, module in model.named_modules():
            if (name == attribute.path or name.endswith(f".{attribute.path}")) and hasattr(module, attribute.name):
                found.append((name, attribute.name, counted[attribute.counts]))
    return found


def read_structure(folder: Path, layout: Layout, version: int | None = None) -> Structure:
    """The structure of a saved folder; ModelError where there is none, or where `version` is asked for and it is another."""
    try:
        value = cast("object", json.loads((folder / STRUCTURE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The folder {str(folder)!r} has no readable {STRUCTURE_NAME}: {error}.", "Name a folder of a pruned model."
        ) from error
    structure = structures.from_json(layout, value)
    if version is not None and structure.version != version:
        raise ModelError(
            f"The model in {str(folder)!r} has structure version {structure.version}, {version} is expected.",
            "Take the folder of that version, or ask for the structure that this device has.",
        )
    return structure


def _readme(pruned: Pruned, plain: bool) -> str:
    share = structures.sparsity(pruned.layout, pruned.structure)
    how = (
        "from transformers import AutoConfig\nimport transformers\n\n"
        'model = getattr(transformers, AutoConfig.from_pretrained(".").architectures[0]).from_pretrained(".")'
        if plain
        else 'from load_pruned import load\n\nmodel = load(".")'
    )
    why = (
        ""
        if plain
        else "\nLayers have sizes that config.json cannot state, so `from_pretrained` refuses this folder; `load_pruned.py` loads it.\n"
    )
    return (
        f"# A pruned {pruned.layout.model_type} model\n\n{share:.0%} of the parameters of attention and feed-forward layers are gone; "
        f"`{STRUCTURE_NAME}` says which heads and neurons are left.\n{why}\n```python\n{how}\n```\n"
    )


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
