"""The global state as a pruned device sees it: which rows and columns of which tensors it has left, and its slice of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune import architectures, importances, structures
from fleetune.architectures import Layout
from fleetune.errors import WireError
from fleetune.structures import Structure
from fleetune.wire import codec
from fleetune.wire.codec import TensorTable

STRUCTURE_KEY = "fleetune.structure"
"""In an update's metadata: hex of what its device's model has left."""

IMPORTANCE_KEY = "fleetune.importance"
"""The same: how much its heads and neurons matter, as `importances.to_text` writes it."""

Array = npt.NDArray[Any]  # of whatever type the state has
Indices = npt.NDArray[np.integer]


def kept(layout: Layout, structure: Structure, name: str) -> tuple[int, Indices] | None:
    """(axis, kept places in the numbers of the whole tensor) of a state's tensor; None for one that the device has whole."""
    cut = architectures.tensor_cut(layout, name)
    if cut is None:
        return None
    return cut.axis, np.asarray(structures.kept_elements(layout, structure, cut), dtype=np.intp)


def pair_kept(layout: Layout, structure: Structure, left: str, right: str) -> tuple[Indices | None, Indices | None]:
    """(rows, columns) that a device kept of the pair whose matrices B and A have these names; None for all of them."""
    rows, columns = kept(layout, structure, left), kept(layout, structure, right)
    return None if rows is None else rows[1], None if columns is None else columns[1]


def sliced(layout: Layout, structure: Structure, name: str, whole: Array) -> Array:
    """The device's part of a tensor: a copy where it is smaller."""
    found = kept(layout, structure, name)
    return whole if found is None else whole.take(found[1], axis=found[0])


def shape(layout: Layout, structure: Structure, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
    """What shape the device's update of a tensor has to have."""
    found = kept(layout, structure, name)
    if found is None:
        return whole
    axis, places = found
    return (*whole[:axis], len(places), *whole[axis + 1 :])


def structure_of(table: TensorTable, layout: Layout) -> Structure:
    """What an update says that its device has left. WireError for what is no structure of this layout."""
    word = table.metadata.get(STRUCTURE_KEY, "")
    if len(word) != 2 * structures.size_bytes(layout):
        needed = f"{2 * structures.size_bytes(layout)} hex digits are needed"
        raise WireError(
            f"An update's metadata say {STRUCTURE_KEY} = {word[:40]!r}; {needed}.", "Use the same version of Fleetune on both sides."
        )
    try:
        data = bytes.fromhex(word)
    except ValueError as error:
        raise WireError(f"An update's metadata say {STRUCTURE_KEY} = {word[:40]!r}; hex digits are needed.") from error
    return structures.from_bytes(layout, data)


def importance_of(table: TensorTable, layout: Layout) -> str:
    """How much heads and neurons matter on an update's device, as it tells; empty where it does not. WireError for what is none of it."""
    word = table.metadata.get(IMPORTANCE_KEY, "") if importances.is_told(layout) else ""
    if word:
        importances.from_text(layout, word)
    return word


def table_of(layout: Layout, structure: Structure, whole: TensorTable) -> TensorTable:
    """The tensors of a state as a device with this structure has them; for comparison alone: their places in a file are not ones."""
    specs = [codec.reshaped(spec, shape(layout, structure, spec.name, spec.shape)) for spec in whole.specs]
    return TensorTable(tuple(specs), whole.metadata, whole.data_start, whole.file_size)
