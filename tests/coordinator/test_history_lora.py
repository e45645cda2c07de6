"""The history of rounds of LoRA pairs: folds by products are computed again, whole, and one that is none is found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fleetune import architectures, sparsity, structures
from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import Blob, Prepared, RoundEntry, TaskEntry, Update
from fleetune.coordinator.history import arithmetic
from fleetune.coordinator.history.facts import JobHistory, RoundRow, StateFolder
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.methods.fedspine import METHOD as FEDSPINE
from fleetune.coordinator.rounds import lorafold, machine, structured
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan
from fleetune.structures import Structure
from fleetune.wire import codec, digests
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
{further}
"""
WITH_REST = ("flora", "fedex")


def shapes(rank: int) -> dict[str, tuple[int, int]]:
    return {"m.lora_A.weight": (rank, 9), "m.lora_B.weight": (7, rank), "m.head": (2, 3)}


def values(seed: int, rank: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(rank).items()}


class History:
    """One committed round of two devices, its files in a folder by their digests."""

    weights: tuple[int, ...] = (3, 5)
    config: Blob | None = None

    def __init__(self, folder: Path, aggregation: str) -> None:
        self.folder = folder
        # Of the state's rank of 4 devices then train 2: which they all must for FedEx.
        further = "residual_rank = 2" if aggregation in WITH_REST else 'ranks = { "a" = 2 }'
        job = JOB.format(aggregation=aggregation, further=further)
        self.toml = job.replace("rank = 4", "rank = 2", 1) if aggregation in WITH_REST else job
        self.start = self._put(values(0, 4), {"format": "pt"})
        sent = {"ffa": ".lora_A.", "rolora": ".lora_A."}.get(aggregation, "none")
        self.updates = {
            name: self._put({k: v for k, v in values(seed, rank).items() if sent not in k}, {"fleetune.update": "delta"})
            for name, seed, rank in (("a", 1, 2), ("b", 2, 2 if aggregation in WITH_REST else 4))
        }
        rule = METHOD.fold(jobspec.parse(self.toml), 1)
        assert isinstance(rule, LoraFold)
        parts = tuple(Contribution(n, folder / b.digest, w) for (n, b), w in zip(self.updates.items(), self.weights, strict=True))
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
            for (name, blob), weight in zip(self.updates.items(), self.weights, strict=True)
        }
        entry = RoundEntry(1, "committed", 0.0, tasks=tasks, start_state=self.start, state=end or self.end)
        assert entry.state is not None
        state = machine.JobMachine(machine.JobPlan("job", 1, 1, 0, 1.0, 0.0, 0.0, 0, "none", 1, "loss", 0, 0.0, 15.0))
        files = (("config.json", self.config.digest, self.config.size_bytes),) if self.config is not None else ()
        state.prepared = Prepared(self.start, "", files=files)
        row = RoundRow(1, entry.state.digest, entry.state.size_bytes, entry)
        job = JobHistory("job", "completed", self.toml, state, [row], [], [])
        return [violation.message for violation in arithmetic.check(StateFolder([job]), self.folder)]

    def spoilt(self, name: str) -> Blob:
        arrays = {key: array.copy() for key, array in tensors.read(self.folder / self.end.digest).items()}
        arrays[name] *= 1.1
        return self._put(arrays, {"format": "pt"})


RULES = ["exact", "flexlora", "fedit", "zero-pad", "ffa", "rolora", "flora", "fedex"]


@pytest.mark.parametrize("aggregation", RULES)
def test_a_fold_of_unequal_pairs_is_computed_again(tmp_path: Path, aggregation: str) -> None:
    history = History(tmp_path, aggregation)
    assert history.wrong() == []
    for name in shapes(4):
        (message,) = history.wrong(history.spoilt(name))
        assert name in message


@pytest.mark.parametrize("one", RULES)
def test_the_one_rule_s_state_is_not_the_other_s(tmp_path: Path, one: str) -> None:
    histories: dict[str, History] = {}
    for aggregation in RULES:
        (tmp_path / aggregation).mkdir()
        histories[aggregation] = History(tmp_path / aggregation, aggregation)
    # In round 1 RoLoRA trains what FFA does.
    alike = {"ffa", "rolora"} if one in ("ffa", "rolora") else {one}
    for aggregation in sorted(set(RULES) - alike):
        other = histories[aggregation].end
        (tmp_path / one / other.digest).write_bytes((tmp_path / aggregation / other.digest).read_bytes())
        assert histories[one].wrong(other), f"{aggregation} passed for {one}"


PRUNED_JOB = """
name = "job"
[model]
base = "org/name"
[task]
kind = "causal-lm"
[lora]
rank = 4
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
[data]
name = "rows"
[method]
name = "fedspine"
[training]
steps = 20
[rounds]
count = 9
"""
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 40,
}  # fmt: skip
LAYOUT = architectures.layout(CONFIG)
STEM = "base_model.model.model.layers.0"
MODULES = {"self_attn.q_proj": (32, 32), "self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 40)}


def whole_shapes(rank: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"base_model.model.score.weight": (3, 32)}
    for module, (rows, columns) in MODULES.items():
        found[f"{STEM}.{module}.lora_B.weight"], found[f"{STEM}.{module}.lora_A.weight"] = (rows, rank), (rank, columns)
    return found


def kept(share: float, seed: int) -> Structure:
    draw = random.Random(seed)
    scores = [[draw.random() for _ in range(group.units)] for group in LAYOUT.groups]
    return structures.choose(LAYOUT, structures.whole(LAYOUT), sparsity.keeps(LAYOUT, share), scores)


class PrunedHistory(History):
    """The same of a job whose devices have cut the model: three of them, of unlike ranks and structures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.toml = PRUNED_JOB
        self.start = self._put(self._arrays(0, 4), {"format": "pt"})
        self.updates: dict[str, Blob] = {}
        for seed, (name, rank, share) in enumerate((("a", 2, 0.5), ("b", 4, 0.4), ("c", 3, 0.5)), 1):
            structure = kept(share, seed)
            arrays = {key: structured.sliced(LAYOUT, structure, key, value) for key, value in self._arrays(seed, rank).items()}
            told = {
                "fleetune.update": "delta",
                "fleetune.structure": structures.to_bytes(LAYOUT, structure).hex(),
                "fleetune.lora_scale": "4",
            }
            self.updates[name] = self._put(arrays, told)
        self.weights = (3, 5, 2)
        config = folder / "config"
        config.write_text(json.dumps(CONFIG))
        self.config = self._adopt(config)
        parts = tuple(Contribution(n, folder / b.digest, w) for (n, b), w in zip(self.updates.items(), self.weights, strict=True))
        rule = FEDSPINE.fold(jobspec.parse(self.toml), 1)
        lorafold.fold(FoldPlan(folder / self.start.digest, parts, folder / "out", layout=LAYOUT), rule)
        self.end = self._adopt(folder / "out")

    def _arrays(self, seed: int, rank: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in whole_shapes(rank).items()}


def test_a_fold_of_pruned_devices_is_computed_again(tmp_path: Path) -> None:
    history = PrunedHistory(tmp_path)
    assert history.wrong() == []
    for name in whole_shapes(4):
        (message,) = history.wrong(history.spoilt(name))
        assert name in message


def test_rows_that_nobody_kept_must_be_what_they_were(tmp_path: Path) -> None:
    history = PrunedHistory(tmp_path)
    name = f"{STEM}.mlp.down_proj.lora_A.weight"
    cut = set(range(40))
    for blob in history.updates.values():
        found = structured.kept(LAYOUT, structured.structure_of(codec.read_table(tmp_path / blob.digest), LAYOUT), name)
        assert found is not None
        cut -= {int(place) for place in found[1]}
    assert cut, "somewhere everybody has cut the same"
    arrays = {key: array.copy() for key, array in tensors.read(tmp_path / history.end.digest).items()}
    arrays[name][:, sorted(cut)] = 0
    (message,) = history.wrong(history._put(arrays, {"format": "pt"}))  # pyright: ignore[reportPrivateUsage]
    assert name in message


def test_a_mean_that_counts_what_was_cut_as_zeros_is_found(tmp_path: Path) -> None:
    history = PrunedHistory(tmp_path)
    arrays = {key: array.copy() for key, array in tensors.read(tmp_path / history.start.digest).items()}
    total = sum(history.weights)
    for blob, weight in zip(history.updates.values(), history.weights, strict=True):
        table = codec.read_table(tmp_path / blob.digest)
        structure = structured.structure_of(table, LAYOUT)
        for key, array in tensors.read(tmp_path / blob.digest).items():
            found = structured.kept(LAYOUT, structure, key)
            places = [list(range(length)) for length in array.shape]
            if found is not None:
                places[found[0]] = [int(place) for place in found[1]]
            arrays[key][np.ix_(*places)] += array * np.float32(weight / total)
    assert history.wrong(history._put(arrays, {"format": "pt"}))  # pyright: ignore[reportPrivateUsage]


def test_without_the_base_s_config_nothing_is_said_of_pruned_folds(tmp_path: Path) -> None:
    history = PrunedHistory(tmp_path)
    assert history.config is not None
    (tmp_path / history.config.digest).unlink()
    assert history.wrong(history.spoilt("base_model.model.score.weight")) == []
