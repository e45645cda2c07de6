"""The folds computed once more, in a few lines of plain numpy that share nothing with the coordinator's own.

Where a round's start state, its updates and its state still lie somewhere, the state must be their weighted mean to the last bit. Where
the updates are gradients, the moments before and after the round must lie there, too, and state and moments be one step of AdamW, to
float32's precision: the norm is summed up in another order here. Where LoRA pairs are folded by their products, the state's must be the
best of its rank of the dense mean, to float32's precision. Other rules and other server optimisers are not computed again. Of a job with
method `echo` nothing needs to lie anywhere but the states: what each device added follows from the round's devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fleetune import schedule
from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import Blob, RoundEntry
from fleetune.coordinator.history.facts import JobHistory, RoundRow, StateFolder, Violation
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
    return [row.number for row, before in _with_moments(job) if _can_be(row.entry, before, find)]


def _can_be(entry: RoundEntry, before: Blob | None, find: Find) -> bool:
    if _at_hand(entry, find) is None:
        return False
    if not _of_gradients(entry):
        return entry.optimizer is None
    return entry.optimizer is not None and all(find(blob.digest) is not None for blob in (entry.optimizer, before) if blob is not None)


def _with_moments(job: JobHistory) -> Iterator[tuple[RoundRow, Blob | None]]:
    """The rounds, each with the moments that the one before it has left."""
    before: Blob | None = None
    for row in job.rounds:
        yield row, before
        before = row.entry.optimizer


def _folds(job: JobHistory, find: Find) -> Iterator[Violation]:
    rule = _rule(job)
    for row, before in _with_moments(job):
        places = _at_hand(row.entry, find)
        if places is None or not _can_be(row.entry, before, find):
            continue
        start, end, updates = places
        weights = [task.update.samples for task in row.entry.trained() if task.update]
        try:
            if row.entry.optimizer is None and rule is not None:
                if rule.aggregation not in ("exact", "flexlora"):
                    continue
                wrong, what = _not_best(start, end, updates, weights, rule), "the mean of the devices' products"
            elif row.entry.optimizer is None:
                wrong, what = _unlike(start, end, updates, weights), "the mean of the updates"
            else:
                moments = (find(before.digest) if before is not None else None, find(row.entry.optimizer.digest))
                wrong, what = _not_stepped(job, row.number, start, end, updates, weights, moments), "a step along the mean gradient"
        except (FleetuneError, KeyError) as error:
            yield Violation("state_not_the_fold", job.job_id, row.number, f"it cannot be computed again: {error}")
            continue
        if wrong:
            yield Violation("state_not_the_fold", job.job_id, row.number, f"tensors that are not {what}: {', '.join(wrong[:5])}")


@dataclass(frozen=True)
class _LoraRule:
    """How a job's LoRA pairs are folded, where it is not the plain mean of each matrix."""

    aggregation: str
    scale: float


def _rule(job: JobHistory) -> _LoraRule | None:
    try:
        spec = jobspec.parse(job.toml)
    except FleetuneError:  # of another version, whose keys are not ours
        return None
    method = spec.method
    if method.name == "fedspine":
        return _LoraRule("pruned", spec.lora.alpha / spec.lora.rank)
    if method.name != "fedavg_lora" or (method.aggregation == "fedit" and not method.ranks):
        return None
    return _LoraRule(method.aggregation or "fedit", spec.lora.alpha / spec.lora.rank)


def _of_gradients(entry: RoundEntry) -> bool:
    return any(task.update.kind == "gradient" for task in entry.trained() if task.update)


def _at_hand(entry: RoundEntry, find: Find) -> tuple[Path, Path, list[Path]] | None:
    """Start state, state and updates in device-id order; None where one is gone."""
    if entry.start_state is None or entry.state is None:
        return None
    start, end = find(entry.start_state.digest), find(entry.state.digest)
    updates = [find(task.update.blob.digest) for task in entry.trained() if task.update]
    there = [path for path in updates if path is not None]
    return (start, end, there) if start is not None and end is not None and there and len(there) == len(updates) else None


def _unlike(start: Path, end: Path, updates: Sequence[Path], weights: Sequence[int], but: Collection[str] = ()) -> list[str]:
    """Names of the tensors of `end`, `but` some, that are not what `start` and the updates give."""
    base, result = codec.read_table(start), codec.read_table(end)
    tables = [codec.read_table(path) for path in updates]
    wrong = sorted({spec.name for spec in base.specs} ^ {spec.name for spec in result.specs})
    for spec in base.specs:
        holders = [index for index, table in enumerate(tables) if spec.name in table.by_name]
        if spec.name in wrong or spec.name in but or (spec.dtype not in _DTYPES and not holders):
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


def _not_best(start: Path, end: Path, updates: Sequence[Path], weights: Sequence[int], rule: _LoraRule) -> list[str]:
    """Names of the tensors of `end` that are not the mean, pairs by their products: each is computed whole, and its best error found."""
    base, result = codec.read_table(start), codec.read_table(end)
    tables = [codec.read_table(path) for path in updates]
    wrong = sorted({spec.name for spec in base.specs} ^ {spec.name for spec in result.specs})
    if wrong:
        return wrong
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in base.names if ".lora_A." in name]
    for right, left in pairs:
        old = [_matrix(start, base, name) for name in (right, left)]
        holders = [index for index, table in enumerate(tables) if right in table.by_name or left in table.by_name]
        mean = np.zeros((len(old[1]), old[0].shape[1]))
        for index in holders:
            table = tables[index]
            rank = table.by_name[right].shape[0] if right in table.by_name else table.by_name[left].shape[1]
            scale = float(table.metadata.get("fleetune.lora_scale", rule.scale))
            own = [old[0][:rank], old[1][:, :rank] * (rule.scale / scale)]
            own = [
                was + _matrix(updates[index], table, name) if name in table.by_name else was
                for name, was in zip((right, left), own, strict=True)
            ]
            tail = rule.scale * (old[1][:, rank:] @ old[0][rank:]) if rule.aggregation == "exact" else 0.0
            mean += weights[index] / sum(weights[holder] for holder in holders) * (scale * (own[1] @ own[0]) + tail)
        found = rule.scale * (_matrix(end, result, left) @ _matrix(end, result, right))
        if not holders:
            same = all(np.array_equal(_matrix(end, result, name), was) for name, was in zip((right, left), old, strict=True))
        else:
            values = np.linalg.svd(mean, compute_uv=False)
            # Equal singular values leave the best pair open, but not how far the best are from the mean.
            error, best = float(np.linalg.norm(mean - found)), float(np.linalg.norm(values[len(old[0]) :]))
            same = error <= best + 1e-5 * float(np.linalg.norm(values))
        if not same:
            wrong += [right, left]
    matrices = {name for pair in pairs for name in pair}
    return wrong + [name for name in _unlike(start, end, updates, weights, matrices) if name not in matrices]


def _matrix(path: Path, table: codec.TensorTable, name: str) -> _Values:
    return np.reshape(_tensor(path, table, name), table.by_name[name].shape)


def _not_stepped(
    job: JobHistory,
    number: int,
    start: Path,
    end: Path,
    updates: Sequence[Path],
    weights: Sequence[int],
    moments: tuple[Path | None, Path | None],
) -> list[str]:
    """Names of the tensors that one step of AdamW would have left with other values or other moments."""
    spec = jobspec.parse(job.toml)
    training, beta1, beta2 = spec.training, spec.method.server_beta1, spec.method.server_beta2 or 0.0
    rate = schedule.learning_rate(
        number - 1,
        peak=training.learning_rate,
        name=training.schedule,
        warmup_steps=training.warmup_steps,
        total_steps=spec.rounds.count,
        offset=0,
    )
    base, result, tables = codec.read_table(start), codec.read_table(end), [codec.read_table(path) for path in updates]
    before, after = (_Moments.read(path) for path in moments)
    gradients: dict[str, _Values] = {}
    for name in base.names:
        held = [(_tensor(path, table, name), w) for path, table, w in zip(updates, tables, weights, strict=True) if name in table.by_name]
        if held:
            gradients[name] = np.sum([values * weight for values, weight in held], axis=0) / sum(weight for _, weight in held)
    norm = math.sqrt(sum(float(np.sum(gradient**2)) for gradient in gradients.values()))
    factor = min(1.0, training.max_grad_norm / (norm + 1e-6)) if training.max_grad_norm > 0 else 1.0
    wrong = sorted({spec.name for spec in base.specs} ^ {spec.name for spec in result.specs})
    for name in base.names:
        if name in wrong or base.by_name[name].dtype not in _DTYPES:
            continue
        old, found = _tensor(start, base, name), _tensor(end, result, name)
        (steps, m, v), (steps_after, m_after, v_after) = before.of(name, old), after.of(name, old)
        if name not in gradients:
            same = steps == steps_after and all(np.array_equal(*pair) for pair in ((old, found), (m, m_after), (v, v_after)))
        else:
            gradient, steps = gradients[name] * factor, steps + 1
            m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
            move = rate * (m / (1 - beta1**steps)) / (np.sqrt(v / (1 - beta2**steps)) + spec.method.server_epsilon)
            new = old * (1 - rate * training.weight_decay) - move
            # Half a unit in the last place of the state's own type, and what the other order of the norm's sum leaves of the move.
            digits = 2.0**-22 if base.by_name[name].dtype in ("F32", "F64") else 2.0**-7
            same = steps == steps_after and bool(np.all(np.abs(new - found) <= digits * np.abs(new) + 1e-6 * np.abs(move)))
            same = same and np.allclose(m, m_after, rtol=1e-6, atol=1e-30) and np.allclose(v, v_after, rtol=1e-6, atol=1e-30)
        if not same:
            wrong.append(name)
    return wrong


@dataclass(frozen=True)
class _Moments:
    """A file of moments, or what was before the first."""

    path: Path | None
    table: codec.TensorTable | None
    steps: Mapping[str, int]

    @classmethod
    def read(cls, path: Path | None) -> _Moments:
        if path is None:
            return cls(None, None, {})
        table = codec.read_table(path)
        counts = table.metadata.get("fleetune.steps", "").split(",")
        return cls(path, table, {name: int(count) for name, count in zip(table.names, counts, strict=False) if count.isdecimal()})

    def of(self, name: str, like: _Values) -> tuple[int, _Values, _Values]:
        """Steps, first and second moment of a tensor whose values are `like`."""
        if self.path is None or self.table is None:
            return 0, np.zeros_like(like), np.zeros_like(like)
        both = _tensor(self.path, self.table, name)
        return self.steps.get(name, 0), both[0::2], both[1::2]


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
