"""What stays warm between the requests of a job: the model with its adapter, and the tokenised rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fleetune import structures
from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.errors import ModelError, WireError
from fleetune.model import accelerator as accelerators
from fleetune.model import batches, lora, peaks, recipe, rows, slim, triplets
from fleetune.model.accelerator import Accelerator
from fleetune.model.batches import Examples
from fleetune.model.recipe import Recipe
from fleetune.model.slim import Slim
from fleetune.model.triplets import Triplets
from fleetune.v1 import messages_pb2

EXAMPLE_SETS_KEPT = 4
"""Files whose tokenised rows stay in memory: train and validation of the job, and what changed under way."""

_FileKey = tuple[str, str | None, int, int, int, int]
_SessionKey = tuple[str, str, bytes, str]


@dataclass
class Session:
    """One job's model and rows. Owned by this module; changed by the one request that runs."""

    key: _SessionKey
    adapted: lora.AdaptedModel
    loaded_bytes: int
    """Memory of this process with the model loaded, before its rows and its first step."""
    slim: Slim | None = None
    """Set once parts may have been cut out of the model: then it is of no use to whoever needs it whole."""
    triplets: Triplets | None = None
    """Set where adapters are of triplets; their ranks change with the state."""
    _row_costs: dict[tuple[int, ...], dict[int, int]] = field(default_factory=dict)
    _examples: dict[_FileKey, Examples] = field(default_factory=dict)

    def row_costs(self, depths: tuple[int, ...] = ()) -> dict[int, int]:
        """What a row of so many tokens keeps for the backward pass down to these depths (none: all); filled by whoever measures it."""
        return self._row_costs.setdefault(depths, {})

    def examples(self, path: Path, file_format: str | None, emit: Emit, wanted_rows: int = 0) -> Examples:
        """Tokenised rows of a file, read again only when the file changed. `wanted_rows` above 0 takes a fixed sample."""
        key = _file_key(path, file_format, wanted_rows)
        if key not in self._examples:
            found = rows.read(path, file_format, self.adapted.recipe)
            chosen = [found[index] for index in batches.sample(len(found), wanted_rows, "evaluation")]
            progress = Pace(emit, "loading")
            examples = batches.encode(chosen, self.adapted.recipe, self.adapted.tokenizer, progress.at)
            if examples.dropped:
                emit("log", text=f"{examples.dropped} of {len(chosen)} rows have nothing to learn within max_length and are left out")
            # The oldest goes first; a file that changed leaves its earlier rows behind.
            while len(self._examples) >= EXAMPLE_SETS_KEPT:
                del self._examples[next(iter(self._examples))]
            self._examples[key] = examples
        return self._examples[key]


def session(task: messages_pb2.Task, base_folder: Path | None, accelerator: str, threads: int, emit: Emit) -> Session:
    """The warm session of this base and recipe with the whole model, or a new one; at most one model is held at a time."""
    return _session(task, _named(task, base_folder), accelerator, threads, emit, lambda held: held.slim is None and held.triplets is None)


def triplet_session(
    task: messages_pb2.Task, base_folder: Path | None, accelerator: str, threads: int, emit: Emit
) -> tuple[Session, Triplets]:
    """A session whose adapters are of triplets, at whatever ranks they were last."""
    folder = _named(task, base_folder)
    found = _session(task, folder, accelerator, threads, emit, lambda held: held.triplets is not None, _load_triplets)
    assert found.triplets is not None
    return found, found.triplets


def slim_session(
    task: messages_pb2.Task, base_folder: Path | None, accelerator: str, threads: int, emit: Emit, structure: bytes
) -> tuple[Session, Slim]:
    """A session whose model is cut to `structure`, as `structures.to_bytes` writes it (empty: whole), and what is left of it.

    A warm model serves as long as it has all that is wanted: what was cut out of it comes back only by loading it anew. Raises ModelError
    for a base that cannot be pruned and for a structure that is none of its own.
    """
    folder = _named(task, base_folder)
    layout = slim.layout_of_folder(folder)
    try:
        wanted = structures.from_bytes(layout, structure) if structure else structures.whole(layout)
    except WireError as error:
        raise ModelError(
            f"The task's structure does not belong to the base model on this device: {error.message}",
            "The job's base was exchanged, or the two sides have different versions of Fleetune.",
        ) from error

    def serves(held: Session) -> bool:
        return held.triplets is None and (held.slim is None or structures.nested(wanted, held.slim.structure))

    found = _session(task, folder, accelerator, threads, emit, serves)
    left = found.slim = found.slim or Slim(found.adapted, layout)
    try:
        if left.pruned.cut_to(wanted):
            accelerators.release_memory(found.adapted.accelerator)
    except BaseException:
        # Cut half-way it would not be what its structure says.
        forget()
        raise
    return found, left


def forget() -> None:
    """The next request loads its model anew."""
    _WARM.clear()


def _named(task: messages_pb2.Task, base_folder: Path | None) -> Path:
    if base_folder is None:
        raise ModelError(f"The task {task.task_id!r} names no base model.", "Name `base` in the job; only link tests run without one.")
    return base_folder


_Load = Callable[[_SessionKey, Path, Recipe, Accelerator], Session]


def _load_pairs(key: _SessionKey, folder: Path, wanted: Recipe, picked: Accelerator) -> Session:
    adapted = lora.load(folder, wanted, picked)
    return Session(key, adapted, peaks.present_bytes(picked))


def _load_triplets(key: _SessionKey, folder: Path, wanted: Recipe, picked: Accelerator) -> Session:
    found = triplets.load(folder, wanted, picked)
    return Session(key, found.adapted, peaks.present_bytes(picked), triplets=found)


def _session(
    task: messages_pb2.Task,
    base_folder: Path,
    accelerator: str,
    threads: int,
    emit: Emit,
    serves: Callable[[Session], bool],
    load: _Load = _load_pairs,
) -> Session:
    accelerators.set_threads(threads)
    picked = accelerators.pick(accelerator)
    # Deterministic serialisation: the same recipe is the same bytes within one process.
    recipe_bytes = task.recipe.SerializeToString(deterministic=True)
    key = (task.base.digest, str(base_folder), recipe_bytes, picked.kind)
    held = _WARM.get("session")
    if held is not None and held.key == key and serves(held):
        return held
    _WARM.clear()
    del held
    # Also where nothing is held: a request that failed may have left a model that is freed only now.
    accelerators.release_memory(picked)
    emit("progress", stage="loading", done=0, total=1)
    fresh = load(key, base_folder, recipe.from_proto(task.recipe), picked)
    _WARM["session"] = fresh
    emit("progress", stage="loading", done=1, total=1)
    return fresh


_WARM: dict[str, Session] = {}


def _file_key(path: Path, file_format: str | None, wanted_rows: int) -> _FileKey:
    try:
        status = path.stat()
    except OSError:
        # The reader says what is wrong with the path.
        return (str(path), file_format, wanted_rows, 0, 0, 0)
    return (str(path), file_format, wanted_rows, status.st_ino, status.st_size, status.st_mtime_ns)
