"""The history of rounds of LoRA pairs: folds by products are computed again, whole, and one that is none is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import Blob, RoundEntry, TaskEntry, Update
from fleetune.coordinator.history import arithmetic
from fleetune.coordinator.history.facts import JobHistory, RoundRow, StateFolder
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.rounds import lorafold, machine
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan
from fleetune.wire import digests
from support import tensors
from support.tensors import Array

JOB = """
name = "job"
[model]
base = "org/name"
[task]
kind = "causal-lm"
[lora]
rank = 4
[data]
name = "rows"
[method]
aggregation = "{aggregation}"
ranks = {{ "a" = 2 }}
"""


def shapes(rank: int) -> dict[str, tuple[int, int]]:
    return {"m.lora_A.weight": (rank, 9), "m.lora_B.weight": (7, rank), "m.head": (2, 3)}


def values(seed: int, rank: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(rank).items()}


class History:
    """One committed round of two devices, its files in a folder by their digests."""

    def __init__(self, folder: Path, aggregation: str) -> None:
        self.folder = folder
        self.toml = JOB.format(aggregation=aggregation)
        self.start = self._put(values(0, 4), {"format": "pt"})
        self.updates = {
            name: self._put(values(seed, rank), {"fleetune.update": "delta"}) for name, seed, rank in (("a", 1, 2), ("b", 2, 4))
        }
        rule = METHOD.fold(jobspec.parse(self.toml), 1)
        assert isinstance(rule, LoraFold)
        parts = tuple(
            Contribution(name, folder / blob.digest, weight) for (name, blob), weight in zip(self.updates.items(), (3, 5), strict=True)
        )
        lorafold.fold(FoldPlan(folder / self.start.digest, parts, folder / "out"), rule)
        self.end = self._adopt(folder / "out")

    def _put(self, arrays: dict[str, Array], metadata: dict[str, str]) -> Blob:
        return self._adopt(tensors.write(self.folder / "file", arrays, metadata))

    def _adopt(self, path: Path) -> Blob:
        blob = Blob(digests.of_file(path), path.stat().st_size)
        path.rename(self.folder / blob.digest)
        return blob

    def wrong(self, end: Blob | None = None) -> list[str]:
        tasks = {
            name: TaskEntry(name, name, name, "train", 1, status="done", update=Update(blob, weight, kind="delta"))
            for (name, blob), weight in zip(self.updates.items(), (3, 5), strict=True)
        }
        entry = RoundEntry(1, "committed", 0.0, tasks=tasks, start_state=self.start, state=end or self.end)
        assert entry.state is not None
        state = machine.JobMachine(machine.JobPlan("job", 1, 1, 0, 1.0, 0.0, 0.0, 0, "none", 1, "loss", 0, 0.0, 15.0))
        row = RoundRow(1, entry.state.digest, entry.state.size_bytes, entry)
        job = JobHistory("job", "completed", self.toml, state, [row], [], [])
        return [violation.message for violation in arithmetic.check(StateFolder([job]), self.folder)]

    def spoilt(self, name: str) -> Blob:
        arrays = {key: array.copy() for key, array in tensors.read(self.folder / self.end.digest).items()}
        arrays[name] *= 1.1
        return self._put(arrays, {"format": "pt"})


@pytest.mark.parametrize("aggregation", ["exact", "flexlora"])
def test_a_fold_by_products_is_computed_again(tmp_path: Path, aggregation: str) -> None:
    history = History(tmp_path, aggregation)
    assert history.wrong() == []
    for name in shapes(4):
        (message,) = history.wrong(history.spoilt(name))
        assert name in message


def test_the_one_rule_s_state_is_not_the_other_s(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = History(tmp_path / "one", "exact"), History(tmp_path / "other", "flexlora")
    (tmp_path / "one" / other.end.digest).write_bytes((tmp_path / "other" / other.end.digest).read_bytes())
    assert one.wrong(other.end)


@pytest.mark.parametrize("aggregation", ["zero-pad", "rolora"])
def test_rules_that_are_not_known_here_are_left_alone(tmp_path: Path, aggregation: str) -> None:
    assert History(tmp_path, aggregation).wrong() == []
