"""Folds of triplet adapters computed once more: the mean of each tensor, of which the places that the round let live are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fleetune.coordinator.history.tensorfiles import DTYPES, Values, values
from fleetune.wire import codec

PREFIX = "base_model.model."
AXES = {".lora_A": 0, ".lora_B": 1, ".lora_E": 0}


def unlike(start: Path, end: Path, updates: Sequence[Path], weights: Sequence[int], alive: Mapping[str, str]) -> list[str]:
    """Names of the tensors of `end` that are not the mean, or not what `alive` leaves of it: a 1 for each triplet that stays."""
    base, result = codec.read_table(start), codec.read_table(end)
    tables = [codec.read_table(path) for path in updates]
    wrong: list[str] = []
    for spec in base.specs:
        ending = spec.name[-7:]
        mask = alive.get(spec.name.removesuffix(ending).removeprefix(PREFIX)) if ending in AXES else None
        kept = [place for place, bit in enumerate(mask) if bit == "1"] if mask is not None else None
        if kept == []:
            if spec.name in result.by_name:
                wrong.append(spec.name)
            continue
        if spec.name not in result.by_name:
            wrong.append(spec.name)
            continue
        whole = _mean(start, base, spec.name, updates, tables, weights)
        expected = whole if kept is None else np.take(np.reshape(whole, spec.shape), kept, axis=AXES[ending])
        found = values(end, result, spec.name)
        shape = tuple(len(kept) if kept is not None and axis == AXES.get(ending) else size for axis, size in enumerate(spec.shape))
        rounded = np.ravel(expected).astype(DTYPES[spec.dtype]).astype(np.float64)
        if result.by_name[spec.name].shape != shape or not np.array_equal(rounded, found):
            wrong.append(spec.name)
    return sorted({*wrong, *(spec.name for spec in result.specs if spec.name not in base.by_name)})


def _mean(
    start: Path, base: codec.TensorTable, name: str, updates: Sequence[Path], tables: Sequence[codec.TensorTable], weights: Sequence[int]
) -> Values:
    old = values(start, base, name)
    holders = [index for index, table in enumerate(tables) if name in table.by_name]
    if not holders:
        return old
    total = np.zeros_like(old)
    for index in holders:
        total += values(updates[index], tables[index], name) * weights[index]
    return old + total / sum(weights[index] for index in holders)
