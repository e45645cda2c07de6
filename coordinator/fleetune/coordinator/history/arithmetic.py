"""The folds computed once more, in a few lines of plain numpy that share nothing with the coordinator's own.

Where a round's start state, its updates and its state still lie somewhere, the state must be their weighted mean to the last bit. Of a
job with method `echo` nothing needs to lie anywhere but the states: what each device added follows from the round's devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.history.facts import JobHistory, StateFolder, Violation
from fleetune.errors import FleetuneError
from fleetune.wire import codec

Find = Callable[[str], "Path | None"]
"""Digest -> where its bytes lie, or None."""

_DTYPES: dict[str, npt.DTypeLike] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_Values = npt.NDArray[np.float64]


def check(state: StateFolder, retained: Path | None = None) -> list[Violation]:
    """What is not the fold it should be. `retained` is a folder of further blobs, each named by its digest."""

    def find(digest: str) -> Path | None:
        if digest in state.blob_files:
            return state.blob_files[digest].path
        path = retained / digest if retained is not None else None
        return path if path is not None and path.is_file() else None

    found: list[Violation] = []
    for job in state.jobs:
        found += _folds(job, find)
        found += _echoes(job, find)
    return found


def folded(job: JobHistory, find: Find) -> list[int]:
    """Numbers of the rounds whose fold can be computed again."""
    return [row.number for row in job.rounds if _at_hand(row.entry, find) is not None]


def _folds(job: JobHistory, find: Find) -> Iterator[Violation]:
    for row in job.rounds:
        places = _at_hand(row.entry, find)
        if places is None:
            continue
        start, end, updates = places
        weights = [task.update.samples for task in row.entry.trained() if task.update]
        try:
            wrong = _unlike(start, end, updates, weights)
        except (FleetuneError, KeyError) as error:
            yield Violation("state_not_the_fold", job.job_id, row.number, f"it cannot be computed again: {error}")
            continue
        if wrong:
            yield Violation(
                "state_not_the_fold", job.job_id, row.number, f"tensors that are not the mean of the updates: {', '.join(wrong[:5])}"
            )


def _at_hand(entry: RoundEntry, find: Find) -> tuple[Path, Path, list[Path]] | None:
    """Start state, state and updates in device-id order; None where one is gone, or where a server optimiser has had its say."""
    if entry.optimizer is not None or entry.start_state is None or entry.state is None:
        return None
    start, end = find(entry.start_state.digest), find(entry.state.digest)
    updates = [find(task.update.blob.digest) for task in entry.trained() if task.update]
    there = [path for path in updates if path is not None]
    return (start, end, there) if start is not None and end is not None and there and len(there) == len(updates) else None


def _unlike(start: Path, end: Path, updates: Sequence[Path], weights: Sequence[int]) -> list[str]:
    """Names of the tensors of `end` that are not what `start` and the updates give."""
    base, result = codec.read_table(start), codec.read_table(end)
    tables = [codec.read_table(path) for path in updates]
    wrong = sorted({spec.name for spec in base.specs} ^ {spec.name for spec in result.specs})
    for spec in base.specs:
        holders = [index for index, table in enumerate(tables) if spec.name in table.by_name]
        if spec.name in wrong or (spec.dtype not in _DTYPES and not holders):
            continue
        expected = old = _tensor(start, base, spec.name)
        if holders:
            total = np.zeros_like(old)
            for index in holders:
                total += _tensor(updates[index], tables[index], spec.name) * weights[index]
            mean = total / sum(weights[index] for index in holders)
            expected = mean if tables[holders[0]].metadata.get("fleetune.update") == "state" else old + mean
        rounded: _Values = expected.astype(_DTYPES[spec.dtype]).astype(np.float64)
        found = _tensor(end, result, spec.name)
        # Half precision is rounded by way of float32 here, which may be one bit off.
        same = np.array_equal(rounded, found) if spec.dtype in ("F32", "F64") else np.allclose(rounded, found, rtol=2.0**-7)
        if not same:
            wrong.append(spec.name)
    return wrong


def _tensor(path: Path, table: codec.TensorTable, name: str) -> _Values:
    spec = table.by_name[name]
    with path.open("rb") as file:
        file.seek(table.data_start + spec.begin)
        raw = file.read(spec.size_bytes)
    return np.frombuffer(raw, _DTYPES[spec.dtype]).astype(np.float64)


def _echoes(job: JobHistory, find: Find) -> Iterator[Violation]:
    """Every device adds 1 + its place among the round's device ids to what began as zeros."""
    try:
        if jobspec.parse(job.toml).method.name != "echo":
            return
    except FleetuneError:  # of an older version, whose keys are not ours
        return
    value = 0.0
    for row in job.rounds:
        devices = sorted({task.device_id for task in row.entry.tasks.values() if task.kind == "train"})
        parts = [(_float32(value + devices.index(task.device_id) + 1), task.update.samples) for task in row.entry.trained() if task.update]
        weight = sum(samples for _, samples in parts)
        if weight <= 0:  # told by another rule
            return
        value = _float32(sum(part * samples for part, samples in parts) / weight)
        path = find(row.state_digest)
        if path is not None and (wrong := _not_all(path, value)):
            yield Violation("state_not_the_fold", job.job_id, row.number, f"every element should be {value:g}, {wrong}")


def _float32(value: float) -> float:
    """As it is after being kept in a tensor."""
    return float(np.float32(value))


def _not_all(path: Path, value: float) -> str:
    """What else there is; empty where every element is `value`."""
    try:
        table = codec.read_table(path)
    except FleetuneError as error:
        return f"but the state cannot be read: {error}"
    values = np.memmap(path, np.float32, "r", table.data_start)
    strange = values[values != value]
    return f"but there is {float(strange[0]):g}" if strange.size else ""
