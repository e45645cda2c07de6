"""How much heads and neurons matter to a fleet: the mean of what the devices of a round tell; pure."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np

from fleetune.coordinator.domain import RoundEntry


def mean(entry: RoundEntry) -> str:
    """Of the round's updates, as `importances.to_text` writes it; empty where none tells any.

    Devices count alike, whatever their rows, since each of them says how its own rows see the model. A unit that a device has cut counts
    as one that does not matter there: who cuts faster goes ahead of the others on the same way.
    """
    told = [task.update.importance for task in entry.trained() if task.update is not None and task.update.importance]
    if not told:
        return ""
    # Squared, bytes are in proportion to importance; each device's are to the same mean already.
    found = [np.square(np.frombuffer(base64.b64decode(text), np.uint8).astype(np.float64)) for text in sorted(told)]
    root = np.sqrt(np.mean(found, axis=0))
    return base64.b64encode(np.rint(root).astype(np.uint8).tobytes()).decode("ascii")


def drop(entry: RoundEntry) -> None:
    """Forgets what each device told; the mean is all that later rounds need of it."""
    for task in entry.trained():
        if task.update is not None and task.update.importance:
            task.update = replace(task.update, importance="")
