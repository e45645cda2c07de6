"""The history of planned rounds: steps along gradients are computed again, and one that is none is found."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from fleetune.coordinator.history import arithmetic, reader
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.v1 import messages_pb2
from support import planned_agent, tensors
from support.coordinating import committed, coordinating
from support.planned_agent import NAMES, VALUES, PlannedAgent, file_of

ROUNDS = 4
TRAINING = 'learning_rate = 0.01\nschedule = "cosine"\nwarmup_steps = 1\nweight_decay = 0.1\nmax_grad_norm = 1.5'


class Drawing(PlannedAgent):
    """Its gradients differ from task to task."""

    async def trained(self, task: messages_pb2.Task) -> bytes:
        await super().trained(task)
        rng = np.random.default_rng([task.round, *self.trained_depths[-1]])
        drawn = [(NAMES[depth - 1], rng.standard_normal(VALUES).astype(np.float32)) for depth in self.trained_depths[-1]]
        return file_of(drawn, **{"fleetune.update": "gradient"})


def places(folder: Path) -> tuple[Path, Path]:
    """Where the state lies, and where what it clears away is kept."""
    (folder / "state").mkdir()
    (folder / "retained").mkdir()
    return folder / "state", folder / "retained"


async def finished(folder: Path, retained: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A planned job from its first round to its end, with the blobs that it clears away kept; the last update's digest and weight."""
    planned_agent.hosted(monkeypatch)

    def retire(blobs: BlobStore, digest: str) -> bool:
        if blobs.has(digest):
            blobs.path(digest).rename(retained / digest)
        return True

    monkeypatch.setattr(BlobStore, "delete", retire)
    async with coordinating(folder) as coordinator, contextlib.AsyncExitStack() as stack:
        # Two devices for four blocks, the second of which holds the first two only: half of the blocks rest in each round.
        for name, room in (("a", 0), ("b", 1250)):
            (await stack.enter_async_context(Drawing(coordinator.address, name, room_bytes=room))).serve()
        toml = planned_agent.job(folder, ROUNDS, minimum=2).replace("batch_size = 4", f"batch_size = 4\n{TRAINING}")
        job = await coordinator.ended(await coordinator.submit(toml))
        assert job.machine.status == "completed", job.machine.message
        entries = [committed(job, number) for number in range(1, ROUNDS + 1)]
        assert all(entry.plan is not None and len(entry.plan.uncovered_depths) == 2 for entry in entries)
        return {task.update.blob.digest: task.update.samples for task in entries[-1].trained() if task.update}


async def test_each_step_is_computed_again_and_a_gradient_in_another_s_place_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, retained = places(tmp_path)
    last = await finished(folder, retained, monkeypatch)
    assert [str(violation) for violation in reader.examine(folder, retained=retained)] == []
    (job,) = reader.read(folder).jobs
    kept = {path.name: path for place in (retained, folder / "blobs") for path in place.iterdir()}
    assert arithmetic.folded(job, kept.get) == list(range(1, ROUNDS + 1))

    path = kept[next(iter(last))]
    path.chmod(0o600)
    arrays = {name: array * np.float32(1.001) for name, array in tensors.read(path).items()}
    tensors.write(path, arrays, {"format": "pt", "fleetune.update": "gradient"})
    found = reader.examine(folder, retained=retained)
    assert "state_not_the_fold" in {violation.rule for violation in found}


async def test_without_the_moments_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, retained = places(tmp_path)
    await finished(folder, retained, monkeypatch)
    (job,) = reader.read(folder).jobs
    moments = {row.entry.optimizer.digest for row in job.rounds if row.entry.optimizer is not None}
    kept = {path.name: path for place in (retained, folder / "blobs") for path in place.iterdir() if path.name not in moments}
    assert arithmetic.folded(job, kept.get) == []
