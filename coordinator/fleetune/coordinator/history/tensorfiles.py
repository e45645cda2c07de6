"""Values of a tensors' file, one tensor at a time, for the folds that are computed again."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fleetune.wire import codec

DTYPES: dict[str, npt.DTypeLike] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

Values = npt.NDArray[np.float64]


def values(path: Path, table: codec.TensorTable, name: str) -> Values:
    """Flat; KeyError for a name that is not there, or a type that is no float."""
    spec = table.by_name[name]
    with path.open("rb") as file:
        file.seek(table.data_start + spec.begin)
        raw = file.read(spec.size_bytes)
    return np.frombuffer(raw, DTYPES[spec.dtype]).astype(np.float64)


def matrix(path: Path, table: codec.TensorTable, name: str) -> Values:
    """In its shape."""
    return np.reshape(values(path, table, name), table.by_name[name].shape)
