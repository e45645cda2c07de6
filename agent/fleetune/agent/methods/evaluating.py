"""A model's metrics on the device's own validation rows, the same for every method that trains one."""

from __future__ import annotations

from collections.abc import Callable

from fleetune.agent.methods.work import Work
from fleetune.agent.trainer import data
from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.model import adapter, evaluation
from fleetune.v1 import messages_pb2


def whole(work: Work, emit: Emit) -> data.Session:
    """The session with the global state in its model."""
    session = data.session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
    adapter.load_state(session.adapted, work.state_path, work.task.trainables_digest)
    return session


def evaluate(work: Work, emit: Emit, loaded: Callable[[Work, Emit], data.Session] = whole) -> messages_pb2.Evaluation:
    """The state's metrics on the device's own validation rows; 0 rows, which weigh nothing, where it has none.

    `loaded` makes the model ready; it is not asked where there is nothing to measure.
    """
    result = messages_pb2.Evaluation()
    if work.data is None or work.data.validation is None:
        emit("log", text="no validation rows on this device")
        return result
    session = loaded(work, emit)
    examples = session.examples(work.data.validation.path, work.data.validation.file_format, emit, session.adapted.recipe.evaluation_rows)
    progress = Pace(emit, "evaluating")
    measured = evaluation.evaluate(session.adapted, examples.items, on_progress=progress.at)
    for name, value in measured.metrics.items():
        result.metrics.add(name=name, value=value)
    result.rows = measured.rows
    return result
