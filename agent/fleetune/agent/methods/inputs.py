"""What a training begins with: the warm model, the device's rows, the global state."""

from __future__ import annotations

from pathlib import Path

from fleetune.agent.methods.work import DataFile, Work
from fleetune.agent.trainer import data
from fleetune.child.entry import Emit
from fleetune.errors import DataError
from fleetune.model import adapter
from fleetune.model.batches import Examples


def loaded(work: Work, emit: Emit) -> tuple[data.Session, Examples, Path]:
    """The session with the global state in its model, the rows to train on, and where the update goes."""
    rows, out_path = places(work)
    session = data.session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
    examples = session.examples(rows.path, rows.file_format, emit)
    adapter.load_state(session.adapted, work.state_path, work.task.trainables_digest)
    return session, examples, out_path


def places(work: Work) -> tuple[DataFile, Path]:
    """The rows to train on and where the update goes. DataError where this device has none."""
    name = work.task.recipe.data.name
    if work.out_path is None or work.data is None:
        raise DataError(f"This device has no rows for the data {name!r}.", "Name the file of this data in the device's configuration.")
    if work.data.train is None:
        raise DataError(
            f"This device has only validation rows of {name!r}, none to train on.",
            f"Set data.{name}.train in its configuration, or let it measure only: a coordinator of its version asks it for nothing else.",
        )
    return work.data.train, work.out_path
