"""The folds computed once more, in a few lines of plain numpy that share nothing with the coordinator's own.

Where a round's start state, its updates and its state still lie somewhere, the state must be their weighted mean to the last bit. Where
the updates are gradients, the moments before and after the round must lie there, too, and state and moments be one step of AdamW, to
float32's precision: the norm is summed up in another order here. LoRA pairs that are folded in other ways than the mean of each matrix are
computed whole (`history.pairs`). Other server optimisers, and methods that are not named here, are not computed again. Of a job with method
`echo` nothing needs to lie anywhere but the states: what each device added follows from the round's devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fleetune import architectures, schedule
from fleetune.architectures import Layout
from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import Blob, RoundEntry
from fleetune.coordinator.history import pairs, triplets
from fleetune.coordinator.history.facts import JobHistory, RoundRow, StateFolder, Violation
from fleetune.coordinator.history.pairs import PairRule
from fleetune.coordinator.history.tensorfiles import DTYPES as _DTYPES
from fleetune.coordinator.history.tensorfiles import Values as _Values
from fleetune.coordinator.history.tensorfiles import values as _tensor
from fleetune.errors import FleetuneError
from fleetune.wire import codec, digests

Find = Callable[[str], "Path | None"]
"""Digest -> where its bytes lie, or None."""

CONFIG_NAME = "config.json"

PLAIN = frozenset({"fedavg_lora", "deft", "fedara", "echo"})
"""Methods whose folds are means of each tensor, or a step along them, where nothing else is said."""


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
    if _rule(job, find) is _UNKNOWN:
        return []
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
    rule = _rule(job, find)
    if rule is _UNKNOWN:
        return
    for row, before in _with_moments(job):
        places = _at_hand(row.entry, find)
        if places is None or not _can_be(row.entry, before, find):
            continue
        start, end, updates = places
        weights = [task.update.samples for task in row.entry.trained() if task.update]
        try:
            if row.entry.alive:
                wrong = triplets.unlike(start, end, updates, weights, row.entry.alive)
                what = "what is left of the mean of the updates"
            elif row.entry.optimizer is None and rule is not None:
                wrong, what = _not_paired(start, end, updates, weights, rule.of(row.number)), "the mean of the devices' LoRA pairs"
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
    layout: Layout | None = None
    residual_rank: int = 0
    seed: int = 0

    def of(self, number: int) -> PairRule:
        return PairRule(self.aggregation, self.scale, number, self.layout, self.residual_rank, self.seed)


_UNKNOWN = _LoraRule("", 0.0)
"""Of a job whose folds cannot be computed here."""


def _rule(job: JobHistory, find: Find) -> _LoraRule | None:
    try:
        spec = jobspec.parse(job.toml)
    except FleetuneError:  # of another version, whose keys are not ours
        return None
    method, scale = spec.method, spec.lora.alpha / spec.lora.rank
    if method.name == "fedspine":
        layout = _layout(job, find)
        return _LoraRule("exact", scale, layout) if layout is not None else _UNKNOWN
    if method.name not in PLAIN:
        return _UNKNOWN
    by_itself = method.aggregation == "fedsa" or (method.aggregation == "fedit" and not method.ranks)
    if method.name != "fedavg_lora" or method.server_optimizer != "none" or by_itself:
        return None
    rest = method.residual_rank if method.aggregation in pairs.WITH_REST else 0
    return _LoraRule(method.aggregation or "fedit", scale, None, rest, spec.seed)


def _layout(job: JobHistory, find: Find) -> Layout | None:
    """Of the job's base, where its config.json still lies somewhere as it was."""
    prepared = job.machine.prepared
    digest = next((digest for name, digest, _ in prepared.files if name == CONFIG_NAME), "") if prepared is not None else ""
    if prepared is None or not digest:
        return None
    path = find(digest)
    if path is None and prepared.base_folder:
        beside = Path(prepared.base_folder) / CONFIG_NAME
        path = beside if beside.is_file() and digests.of_file(beside) == digest else None
    return architectures.of_config(path) if path is not None else None


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


def _not_paired(start: Path, end: Path, updates: Sequence[Path], weights: Sequence[int], rule: PairRule) -> list[str]:
    """Names of the tensors of `end` that are not the mean, pairs as their rule has them."""
    base, result = codec.read_table(start), codec.read_table(end)
    wrong = sorted({spec.name for spec in base.specs} ^ {spec.name for spec in result.specs})
    if wrong:
        return wrong
    matrices = {name for pair in pairs.names(base) for name in pair}
    return pairs.unlike(start, end, result, updates, weights, rule) + _unlike(start, end, updates, weights, matrices)


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
