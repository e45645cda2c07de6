"""What a job that prunes is for: a device's small model, from the base and the adapter, as a folder that needs nothing of Fleetune."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from fleetune import consensus, importances, structures
from fleetune.architectures import Layout
from fleetune.child.entry import Emit
from fleetune.errors import ModelError
from fleetune.model import accelerator as accelerators
from fleetune.model import bases, lora, prunedfolder, recipe, slim
from fleetune.model.pruning import Pruned
from fleetune.model.recipe import Recipe
from fleetune.model.slim import Slim
from fleetune.structures import Structure
from fleetune.v1 import messages_pb2

JSON_BYTES_MAX = 64 << 20
MANIFEST = "manifest.json"
CONFIG = "adapter_config.json"
STATE = "adapter_model.safetensors"

_TASKS = {
    recipe.CLASSIFICATION: messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION,
    recipe.CAUSAL_LM: messages_pb2.MODEL_TASK_CAUSAL_LM,
    recipe.SEQ2SEQ_LM: messages_pb2.MODEL_TASK_SEQ2SEQ_LM,
}


def shrink(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Merges an adapter into its base, cut to what a device has left, or to what all devices, or those of a class, together voted for.

    Fields: adapter_folder (of a round of a job that prunes), out_folder (must not exist). Optional: base (folder or hub id instead of the
    one that the adapter was trained on), allow_hub, device (a name; empty: the vote), hardware (the class whose devices
    vote; empty: all do), threads.
    """
    folder, out = Path(str(fields["adapter_folder"])), Path(str(fields["out_folder"]))
    manifest, config = _json(folder / MANIFEST), _json(folder / CONFIG)
    emit("progress", stage="loading", done=0, total=3)
    base = bases.resolve(*_base(manifest, str(fields.get("base") or "")), bool(fields.get("allow_hub", True)))
    layout = slim.layout_of_folder(base.folder)
    device = str(fields.get("device") or "")
    hardware = str(fields.get("hardware") or "")
    structure = _structure(manifest, layout, device, hardware)
    accelerators.set_threads(int(str(fields.get("threads") or 0)))
    adapted = lora.load(base.folder, _recipe(manifest, config), accelerators.pick("cpu"))
    whole_parameters = adapted.parameter_count - adapted.trainable_count
    emit("progress", stage="loading", done=1, total=3)
    small = Slim(adapted, layout)
    small.pruned.cut_to(structure)
    small.load(folder / STATE)
    merged: Pruned = prunedfolder.merged(small.pruned)
    emit("progress", stage="loading", done=2, total=3)
    saved = prunedfolder.save(out, merged, adapted.tokenizer, str(_section(manifest, "base").get("digest") or ""))
    emit("progress", stage="loading", done=3, total=3)
    return {
        "folder": str(saved.folder),
        "plain": saved.plain,
        "size_bytes": saved.size_bytes,
        "sparsity": structures.sparsity(layout, structure),
        "parameters": sum(parameter.numel() for parameter in merged.model.parameters()),
        "base_parameters": whole_parameters,
        "device": device,
        "hardware": hardware,
    }


def _json(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(JSON_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Name the folder that `fleetune export` made.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object.", "Name the folder that `fleetune export` made.")
    return cast("dict[str, object]", found)


def _section(document: Mapping[str, object], name: str) -> dict[str, object]:
    found = document.get(name)
    return cast("dict[str, object]", found) if isinstance(found, dict) else {}


def _base(manifest: Mapping[str, object], given: str) -> tuple[str, str]:
    """Base and revision."""
    known = _section(manifest, "base")
    if given:
        return given, ""
    if hub_id := str(known.get("hub_id") or ""):
        return hub_id, str(known.get("revision") or "")
    raise ModelError(
        f"The adapter was trained on the folder {str(known.get('name'))!r} of its coordinator, which cannot be found from here.",
        "Say where that model lies: --base FOLDER.",
    )


def _structure(manifest: Mapping[str, object], layout: Layout, device: str, hardware: str) -> Structure:
    entries = manifest.get("devices")
    devices = [
        cast("dict[str, object]", entry)
        for entry in (cast("list[object]", entries) if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]
    pruned = {str(entry.get("name")): entry for entry in devices if entry.get("structure")}
    if not pruned:
        raise ModelError("Nothing was pruned in the round that this adapter is of.", "Name an adapter of a job with method fedspine.")
    if device and device not in pruned:
        raise ModelError(
            f"The round has no device {device!r}; it has {', '.join(sorted(pruned))}.", "Name one of these, or none for the vote."
        )
    if device:
        return _kept(layout, pruned[device])
    # The vote of all is the one that the coordinator measured, which goes by what devices have kept alone.
    scores: list[importances.Scores | None] = []
    if hardware:
        classes = sorted({str(entry.get("hardware") or "") for entry in pruned.values()})
        pruned = {name: entry for name, entry in pruned.items() if entry.get("hardware") == hardware}
        if not pruned:
            raise ModelError(
                f"The round has no devices of class {hardware!r}; it has {', '.join(map(repr, classes))}.", "Name one of these."
            )
        scores = [_importance(layout, entry) for entry in pruned.values()]
    votes = [(_kept(layout, entry), max(1, int(str(entry.get("weight") or 1)))) for entry in pruned.values()]
    return consensus.voted(layout, votes, [float(str(entry.get("sparsity") or 0.0)) for entry in pruned.values()], scores)


def _kept(layout: Layout, entry: Mapping[str, object]) -> Structure:
    return structures.from_bytes(layout, _hex(entry.get("structure")))


def _importance(layout: Layout, entry: Mapping[str, object]) -> importances.Scores | None:
    word = entry.get("importance")
    return importances.from_text(layout, word) if isinstance(word, str) and word else None


def _hex(word: object) -> bytes:
    try:
        return bytes.fromhex(str(word))
    except ValueError as error:
        raise ModelError(
            f"The manifest says that a device keeps {str(word)[:40]!r}; hex digits are needed.", "Export the adapter again."
        ) from error


def _recipe(manifest: Mapping[str, object], config: Mapping[str, object]) -> Recipe:
    task = _section(manifest, "task")
    kind, labels, targets = task.get("kind"), task.get("labels"), config.get("target_modules")
    if not isinstance(kind, str) or kind not in _TASKS or not isinstance(labels, list) or not isinstance(targets, list):
        raise ModelError("The adapter does not say what its model is for, or which layers it adapts.", "Export it again.")
    return recipe.from_proto(
        messages_pb2.Recipe(
            model_task=_TASKS[kind],
            labels=[str(label) for label in cast("list[object]", labels)],
            lora=messages_pb2.Lora(
                rank=int(str(config.get("r"))),
                alpha=float(str(config.get("lora_alpha"))),
                targets=[str(target) for target in cast("list[object]", targets)],
            ),
            dtype="float32",
        )
    )
