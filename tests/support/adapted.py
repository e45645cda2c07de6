"""Tiny models with an adapter, and rows tokenised for them."""

from __future__ import annotations

from pathlib import Path

from fleetune.model import batches, lora, recipe, rows
from fleetune.model.accelerator import Accelerator
from fleetune.model.batches import Examples
from fleetune.v1 import messages_pb2

CPU = Accelerator("cpu")


def adapted(folder: Path, message: messages_pb2.Recipe, seed: int | None = 1) -> lora.AdaptedModel:
    """The base in `folder` with a fresh adapter of the recipe."""
    return lora.load(folder, recipe.from_proto(message), CPU, seed)


def examples(model: lora.AdaptedModel, path: Path) -> Examples:
    """The rows of a file, tokenised."""
    return batches.encode(rows.read(path, None, model.recipe), model.recipe, model.tokenizer)


def quiet(event: str, **fields: object) -> None:
    """An emit that nobody hears."""
