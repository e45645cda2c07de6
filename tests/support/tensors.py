"""Tensor files for tests: written through our codec, read by plain slicing, with bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fleetune.wire import codec

Array = npt.NDArray[np.generic]
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Path:
    """A tensor file with these arrays, packed in name order."""
    specs = codec.pack((name, WORDS[array.dtype], array.shape) for name, array in arrays.items())
    path.write_bytes(codec.build_header(specs, metadata) + b"".join(arrays[spec.name].tobytes() for spec in specs))
    return path


def read(path: Path) -> dict[str, Array]:
    """All arrays of a tensor file."""
    table = codec.read_table(path)
    data = path.read_bytes()[table.data_start :]
    return {spec.name: np.frombuffer(data[spec.begin : spec.end], DTYPES[spec.dtype]).reshape(spec.shape) for spec in table.specs}
