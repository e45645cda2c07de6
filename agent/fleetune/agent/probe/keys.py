"""What measured figures depend on: the model's costly traits, PyTorch's version, the processor."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata

from fleetune.agent.probe import compute
from fleetune.errors import UnsupportedError
from fleetune.v1 import messages_pb2
from fleetune.wire import digests


def torch_version() -> str:
    """Raises UnsupportedError where PyTorch is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise UnsupportedError("PyTorch is not installed, so nothing can be measured.", "Run `fleetune-agent doctor`.") from error


def device(accelerator: str) -> str:
    """What the figures were measured on, as far as it changes them: board or processor, and the accelerator."""
    found = compute.accelerator()
    kind = found.kind if accelerator == "auto" else accelerator
    processor = compute.board() or compute.processor() or platform.machine()
    return f"{processor}, {kind} {found.name}".strip() if kind != "cpu" else processor


def recipe_digest(recipe: messages_pb2.Recipe, depths: Sequence[int] = (), *, only: bool = False, moments: bool = True) -> str:
    """Of what a step costs by: not how the data are called, nor what the labels say. `depths` are those asked for, none: the usual ones."""
    known = messages_pb2.Recipe()
    known.CopyFrom(recipe)
    known.labels[:] = [str(number) for number in range(len(known.labels))]
    known.data.CopyFrom(
        messages_pb2.DataContract(
            max_length=recipe.data.max_length, max_target_length=recipe.data.max_target_length or recipe.data.max_length
        )
    )
    known.evaluation_rows, known.metric, known.dtype = 0, "", recipe.dtype or "auto"
    if recipe.HasField("lora"):  # else whole layers are trained
        known.lora.targets[:] = sorted(known.lora.targets)
        known.lora.alpha = 0.0
    how = json.dumps([sorted(set(depths)), only, moments]).encode()
    return digests.of_bytes(known.SerializeToString(deterministic=True) + how)
