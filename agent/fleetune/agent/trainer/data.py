"""What stays warm between the requests of a job: the model with its adapter, and the tokenised rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.errors import ModelError
from fleetune.model import accelerator as accelerators
from fleetune.model import batches, lora, peaks, recipe, rows
from fleetune.model.batches import Examples
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
    """The warm session of this base and recipe, or a new one; at most one model is held at a time."""
    if base_folder is None:
        raise ModelError(f"The task {task.task_id!r} names no base model.", "Name `base` in the job; only link tests run without one.")
    accelerators.set_threads(threads)
    picked = accelerators.pick(accelerator)
    # Deterministic serialisation: the same recipe is the same bytes within one process.
    recipe_bytes = task.recipe.SerializeToString(deterministic=True)
    key = (task.base.digest, str(base_folder), recipe_bytes, picked.kind)
    held = _WARM.get("session")
    if held is not None and held.key == key:
        return held
    _WARM.clear()
    if held is not None:
        del held
        accelerators.release_memory(picked)
    emit("progress", stage="loading", done=0, total=1)
    adapted = lora.load(base_folder, recipe.from_proto(task.recipe), picked)
    fresh = Session(key, adapted, peaks.present_bytes(picked))
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
