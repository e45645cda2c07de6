"""What the coordinator needs the model for: the first adapter with its registry and blocks, and metrics on held-out rows."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleetune import structures
from fleetune.child.entry import Emit
from fleetune.errors import ModelError
from fleetune.model import accelerator as accelerators
from fleetune.model import adapter, bases, batches, evaluation, lora, rows, slim, triplets
from fleetune.model import recipe as recipes
from fleetune.model.batches import Examples
from fleetune.model.slim import Slim
from fleetune.model.triplets import Triplets
from fleetune.structures import Structure
from fleetune.v1 import messages_pb2
from fleetune.wire import basefiles, codec


def prepare(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Writes the job's first adapter into `out_folder` and tells what it consists of.

    Fields: base (folder or hub id), revision, allow_hub, recipe (base64 of the message), seed, init_adapter (folder or null), out_folder.
    Optional: digest_cache, a file that spares reading an unchanged base again; accelerator; threads; triplets, whether adapters are of
    triplets instead of pairs.
    """
    recipe = _recipe(fields)
    emit("progress", stage="loading", done=0, total=3)
    found = bases.resolve(str(fields["base"]), str(fields.get("revision") or ""), bool(fields.get("allow_hub")))
    cache = fields.get("digest_cache")
    files = basefiles.scan(found.folder, cache=Path(str(cache)) if cache else None)
    emit("progress", stage="loading", done=1, total=3)
    seed = int(str(fields.get("seed") or 0))
    base_name = found.hub_id or found.public_name
    of_triplets = triplets.load(found.folder, recipe, _accelerator(fields), seed) if fields.get("triplets") else None
    adapted = of_triplets.adapted if of_triplets is not None else lora.load(found.folder, recipe, _accelerator(fields), seed=seed)
    if fields.get("init_adapter"):
        adapter.load_existing(adapted, Path(str(fields["init_adapter"])))
    out_folder = Path(str(fields["out_folder"]))
    out_folder.mkdir(parents=True, exist_ok=True)
    if of_triplets is not None:
        of_triplets.write_config(out_folder / adapter.CONFIG_NAME, base_name)
    else:
        adapter.write_config(out_folder / adapter.CONFIG_NAME, adapted, base_name)
    emit("progress", stage="loading", done=2, total=3)
    written = adapter.write_state(out_folder / adapter.STATE_NAME, adapted)
    table = codec.read_table(written.path)
    blocks = lora.blocks(table.names)
    _keep(_Key(str(found.folder), str(fields["recipe"]), adapted.accelerator.kind, of_triplets is not None), adapted).triplets = of_triplets
    emit("progress", stage="loading", done=3, total=3)
    return {
        "trainables_digest": codec.trainables_digest(table),
        "state_digest": written.digest,
        "size_bytes": written.size_bytes,
        "base_digest": files.digest,
        "base_folder": str(found.folder),
        "base_name": found.hub_id or found.public_name,
        "hub_id": found.hub_id,
        "revision": found.revision,
        "files": [{"name": file.name, "digest": file.digest, "size_bytes": file.size_bytes} for file in files.files],
        "blocks": blocks,
        "block_names": [lora.block_name(names[0]) for names in blocks],
        "parameters": adapted.parameter_count,
        "trainable_parameters": adapted.trainable_count,
    }


def evaluate(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Metrics of a state on the coordinator's held-out rows.

    Fields: base_folder, recipe, state_path, rows_path. Optional: rows_format, accelerator, threads; structure, hex of what is left of the
    model where devices prune it; triplets, whether the state holds such. The model and the tokenised rows of the last job stay in memory.
    """
    recipe = _recipe(fields)
    folder = Path(str(fields["base_folder"]))
    accelerator = _accelerator(fields)
    key = _Key(str(folder), str(fields["recipe"]), accelerator.kind, bool(fields.get("triplets")))
    emit("progress", stage="loading", done=0, total=1)
    wanted = str(fields.get("structure") or "")
    layout = slim.layout_of_folder(folder) if wanted else None
    structure = structures.from_bytes(layout, bytes.fromhex(wanted)) if layout is not None else None
    held = _WARM.get("model")
    if held is None or held.key != key or not held.serves(structure):
        held = None
        _WARM.clear()
        of_triplets = triplets.load(folder, recipe, accelerator) if key.triplets else None
        held = _keep(key, of_triplets.adapted if of_triplets is not None else lora.load(folder, recipe, accelerator))
        held.triplets = of_triplets
    examples = _examples(held, Path(str(fields["rows_path"])), str(fields.get("rows_format") or "") or None)
    if held.triplets is not None:
        held.triplets.load(Path(str(fields["state_path"])))
    elif layout is None or structure is None:
        adapter.load_state(held.adapted, Path(str(fields["state_path"])))
    else:
        held.slim = held.slim or Slim(held.adapted, layout)
        held.slim.pruned.cut_to(structure)
        held.slim.load(Path(str(fields["state_path"])))

    def on_progress(done: int, total: int) -> None:
        emit("progress", stage="evaluating", done=done, total=total)

    measured = evaluation.evaluate(held.adapted, examples.items, on_progress=on_progress)
    return {"metrics": dict(measured.metrics), "rows": measured.rows}


@dataclass(frozen=True)
class _Key:
    folder: str
    recipe: str
    accelerator: str
    triplets: bool = False


@dataclass
class _Held:
    """The model of the last request and its tokenised rows by file state. Owned by this module."""

    key: _Key
    adapted: lora.AdaptedModel
    examples: dict[tuple[str, int, int], Examples] = field(default_factory=dict)
    slim: Slim | None = None
    """Set once parts may have been cut out of the model."""
    triplets: Triplets | None = None
    """Set where adapters are of triplets."""

    def serves(self, structure: Structure | None) -> bool:
        """Whether all that is wanted is still there; None wants everything."""
        return self.slim is None or (structure is not None and structures.nested(structure, self.slim.structure))


_WARM: dict[str, _Held] = {}


def _keep(key: _Key, adapted: lora.AdaptedModel) -> _Held:
    held = _Held(key, adapted)
    _WARM["model"] = held
    return held


def _examples(held: _Held, path: Path, file_format: str | None) -> Examples:
    status = path.stat() if path.is_file() else None
    key = (str(path), status.st_size if status else 0, status.st_mtime_ns if status else 0)
    if key not in held.examples:
        found = rows.read(path, file_format, held.adapted.recipe)
        held.examples.clear()
        held.examples[key] = batches.encode(found, held.adapted.recipe, held.adapted.tokenizer)
    return held.examples[key]


def _recipe(fields: Mapping[str, object]) -> recipes.Recipe:
    try:
        message = messages_pb2.Recipe.FromString(base64.b64decode(str(fields["recipe"])))
    except (KeyError, ValueError) as error:
        raise ModelError(f"The request's recipe cannot be read: {error}.", "This is a bug of the coordinator; report it.") from error
    return recipes.from_proto(message)


def _accelerator(fields: Mapping[str, object]) -> accelerators.Accelerator:
    accelerators.set_threads(int(str(fields.get("threads") or 0)))
    return accelerators.pick(str(fields.get("accelerator") or "cpu"))
