"""Update files: tensors under their saved names, narrowed to the wire's type, finite or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fleetune.errors import NotFiniteError, UnsupportedError
from fleetune.model import adapter

UPDATE_DTYPES = {"": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(update_dtype: str) -> None:
    """Raises UnsupportedError for a type that no update has."""
    if update_dtype not in UPDATE_DTYPES:
        raise UnsupportedError(
            f"update_dtype {update_dtype!r} is not known; allowed: float32, bfloat16, float16.", "Correct `update_dtype` in the job."
        )


def write(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], kind: str, update_dtype: str, metadata: Mapping[str, str] | None = None
) -> tuple[adapter.WrittenFile, float]:
    """The update file (metadata fleetune.update=`kind`, and `metadata`) and the Euclidean norm of the tensors before they are narrowed.

    Raises NotFiniteError when a value is NaN or Inf, also when only the narrow type cannot hold it.
    """
    dtype = UPDATE_DTYPES[update_dtype]
    kept: dict[str, torch.Tensor] = {}
    squares = 0.0
    for name, tensor in tensors:
        narrowed = tensor.to(dtype)
        if not bool(torch.isfinite(narrowed).all()):
            largest = float(tensor.abs().max())
            raise NotFiniteError(
                f"The {kind} of {name} is not finite in {update_dtype or 'float32'} (largest value {largest:g}).",
                "Lower the learning rate, bound max_grad_norm, or use a wider update_dtype.",
            )
        squares += float(tensor.double().square().sum()) if tensor.device.type != "mps" else float(tensor.square().sum())
        kept[name] = narrowed
    # No sync: until the coordinator's receipt the task can be done again.
    return adapter.write_tensors(path, kept, {"fleetune.update": kind, **(metadata or {})}, durable=False), math.sqrt(squares)
