"""A round of devices with unlike ranks in one process: assigned, trained, folded, and equal to the dense computation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from fleetune.agent.methods import fedavg_lora as agent_side
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.coordinator import jobspec, loraranks, recipes
from fleetune.coordinator.jobspec import JobSpec
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.rounds import aggregate, lorafold
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan, FoldResult
from fleetune.methods.v1 import fedavg_lora_pb2
from fleetune.model import adapter
from support.adapted import adapted, quiet
from support.jobs import task_message
from support.tiny_fixtures import bert, offline
from support.tiny_models import write_jsonl

__all__ = ["bert", "offline"]

NAMES = {"id-1": "pi4-a", "id-2": "nano", "id-3": "laptop"}
RANKS = {"id-1": 2, "id-2": 4, "id-3": 8}
COLOURS = ("red", "green", "blue")
Tensors = Mapping[str, npt.NDArray[np.floating]]


def job(aggregation: str = "", ranks: str = '{ "pi4-*" = 2, "nano" = 4 }', dtype: str = "float32", rest: int = 0) -> JobSpec:
    chosen = f'aggregation = "{aggregation}"' if aggregation else ""
    chosen += f"\nresidual_rank = {rest}" if rest else ""
    return jobspec.parse(
        f"""
name = "unequal"
[model]
base = "/models/tiny"
dtype = "float32"
[task]
kind = "text-classification"
labels = ["red", "green", "blue"]
[lora]
rank = 8
alpha = 16.0
targets = ["query", "intermediate.dense"]
[data]
name = "colours"
max_length = 32
[training]
steps = 3
batch_size = 4
learning_rate = 0.02
[method]
{chosen}
update_dtype = "{dtype}"
{"ranks = " + ranks if ranks else ""}
[rounds]
count = 4
"""
    )


class Federation:
    """Three devices' rows, and the state between them."""

    def __init__(self, base: Path, folder: Path, spec: JobSpec) -> None:
        self.base, self.folder, self.spec = base, folder, spec
        self.recipe = recipes.recipe(spec)
        self.state = folder / "state-0"
        self.model = adapted(base, self.recipe)
        adapter.write_state(self.state, self.model)
        rng = np.random.default_rng(4)
        for device in NAMES:
            rows = [{"text": f"{word} {word} thing {rng.integers(9)}", "label": word} for word in rng.choice(COLOURS, 12)]
            write_jsonl(folder / f"{device}.jsonl", rows)

    def train(self, number: int) -> dict[str, tuple[Path, int]]:
        """Device -> its update and weight."""
        found: dict[str, tuple[Path, int]] = {}
        payloads = METHOD.assign(self.spec, RoundFacts(number, sorted(NAMES), names=NAMES))
        for device, payload in payloads.items():
            out = self.folder / f"{device}-{number}"
            assert isinstance(payload, fedavg_lora_pb2.FedavgLoraTask)
            task = task_message("fedavg_lora", payload, self.recipe)
            data = DeviceData(DataFile(self.folder / f"{device}.jsonl", None), None)
            trained = agent_side.train(Work(task, self.base, self.state, out, data, Limits(1, "cpu", None)), quiet)
            found[device] = (out, int(trained.report.samples))
        return found

    def fold(self, number: int, updates: Mapping[str, tuple[Path, int]]) -> FoldResult:
        rule = METHOD.fold(self.spec, number)
        assert isinstance(rule, LoraFold)
        out = self.folder / f"state-{number}"
        contributions = tuple(Contribution(device, path, weight) for device, (path, weight) in updates.items())
        result = lorafold.fold(FoldPlan(self.state, contributions, out), rule)
        self.state = out
        return result


def pairs(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))


def product(tensors: Tensors, module: str, scale: float) -> npt.NDArray[np.float64]:
    return scale * (tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[f"{module}.lora_A.weight"].astype(np.float64))


def tail(tensors: Tensors, module: str, rank: int, scale: float) -> npt.NDArray[np.float64]:
    """The directions that a device of this rank was not given."""
    left, right = (tensors[f"{module}.lora_{word}.weight"].astype(np.float64) for word in "BA")
    return scale * (left[:, rank:] @ right[rank:])


def local(start: Tensors, delta: Tensors, rank: int) -> dict[str, npt.NDArray[np.floating]]:
    """What a device ended with, from the directions that it was given."""
    found = dict(start)
    for module in pairs(start):
        found[f"{module}.lora_A.weight"] = start[f"{module}.lora_A.weight"][:rank]
        found[f"{module}.lora_B.weight"] = start[f"{module}.lora_B.weight"][:, :rank]
    return {name: found[name].astype(np.float64) + delta.get(name, 0.0) for name in found}


@pytest.mark.usefixtures("offline")
def test_rounds_of_unlike_ranks_are_the_truncated_mean_of_what_devices_stand_for(bert: Path, tmp_path: Path) -> None:
    federation = Federation(bert, tmp_path, job())
    scale = loraranks.scale(federation.spec)
    for number in (1, 2, 3):
        start = load_file(federation.state)
        updates = federation.train(number)
        ends = {device: local(start, load_file(path), RANKS[device]) for device, (path, _) in updates.items()}
        weights = {device: weight for device, (_, weight) in updates.items()}
        result = federation.fold(number, updates)
        after = load_file(federation.state)
        rests, norms = 0.0, 0.0
        for module in pairs(after):
            dense = sum(
                weights[d] / sum(weights.values()) * (product(end, module, scale) + tail(start, module, RANKS[d], scale))
                for d, end in ends.items()
            )
            left, values, right = np.linalg.svd(dense)
            best = (left[:, :8] * values[:8]) @ right[:8]
            assert np.linalg.norm(product(after, module, scale) - best) <= 1e-6 * np.linalg.norm(best)
            rests, norms = rests + float(np.sum(values[8:] ** 2)), norms + float(np.sum(values**2))
        assert result.metrics == pytest.approx(dict.fromkeys(("aggregation_error", "truncation_error"), np.sqrt(rests / norms)), rel=1e-6)
        head = [name for name in after if "lora" not in name]
        assert head
        for name in head:
            mean = sum(weights[d] / sum(weights.values()) * end[name] for d, end in ends.items())
            assert np.allclose(after[name], mean, atol=1e-6)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("aggregation", ["flora", "fedex"])
def test_what_a_pair_cannot_say_of_the_exact_mean_is_in_the_rest(bert: Path, tmp_path: Path, aggregation: str) -> None:
    federation = Federation(bert, tmp_path, job(aggregation, ranks="", rest=32))  # the smaller side of each weight: nothing is cut
    scale = loraranks.scale(federation.spec)
    for number in (1, 2, 3):
        start = load_file(federation.state)
        updates = federation.train(number)
        total = sum(weight for _, weight in updates.values())
        ends = {device: local(start, load_file(path), 8) for device, (path, _) in updates.items()}
        result = federation.fold(number, updates)
        after = load_file(federation.state)
        for module in pairs(after):
            dense = sum(updates[d][1] / total * (product(end, module, scale) + tail(start, module, 8, scale)) for d, end in ends.items())
            assert np.linalg.norm(product(after, module, scale) - dense) <= 1e-5 * np.linalg.norm(dense)
            left, right = after[f"{module}.lora_B.weight"][:, :8], after[f"{module}.lora_A.weight"][:8]
            if aggregation == "flora":
                assert not left.any() and right.any()
            else:
                for word, found in (("B", left), ("A", right)):
                    mean = sum(updates[d][1] / total * end[f"{module}.lora_{word}.weight"] for d, end in ends.items())
                    assert np.allclose(found, mean, atol=1e-6)
        assert result.metrics["truncation_error"] <= 1e-6


@pytest.mark.usefixtures("offline")
def test_a_device_trains_no_more_directions_than_its_rank(bert: Path, tmp_path: Path) -> None:
    federation = Federation(bert, tmp_path, job())
    for device, (path, _) in federation.train(1).items():
        shapes = {tensor.shape for name, tensor in load_file(path).items() if "lora_A" in name}
        assert {shape[0] for shape in shapes} == {RANKS[device]}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("aggregation", "sides"), [("", "AB"), ("ffa", "B")])
def test_an_upload_has_the_bytes_of_its_rank_and_of_its_matrices(bert: Path, tmp_path: Path, aggregation: str, sides: str) -> None:
    federation = Federation(bert, tmp_path, job(aggregation))
    start = load_file(federation.state)
    for device, (path, _) in federation.train(1).items():
        lora = sum(tensor.size // 8 * RANKS[device] for name, tensor in start.items() if any(f"lora_{side}." in name for side in sides))
        head = sum(tensor.size for name, tensor in start.items() if "lora" not in name)
        assert sum(tensor.size for tensor in load_file(path).values()) == lora + head


@pytest.mark.usefixtures("offline")
def test_the_model_is_whole_again_after_a_narrow_round(bert: Path, tmp_path: Path) -> None:
    federation = Federation(bert, tmp_path, job())
    federation.train(1)
    wide = Federation(bert, tmp_path, job(ranks=""))
    assert {tensor.shape[0] for name, tensor in load_file(wide.train(1)["id-1"][0]).items() if "lora_A" in name} == {8}


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_plain_peft_loads_what_came_of_it(bert: Path, tmp_path: Path) -> None:
    federation = Federation(bert, tmp_path, job(dtype="bfloat16"))
    for number in (1, 2):
        federation.fold(number, federation.train(number))
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.write_config(folder / adapter.CONFIG_NAME, federation.model, "")
    federation.state.rename(folder / adapter.STATE_NAME)
    assert json.loads((folder / adapter.CONFIG_NAME).read_text())["r"] == 8
    loaded = peft.PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), str(folder)).eval()
    adapter.load_state(federation.model, folder / adapter.STATE_NAME)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, federation.model.model.eval()(**inputs).logits, atol=1e-5)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("aggregation", ["ffa", "rolora"])
def test_a_matrix_that_stands_still_is_neither_trained_nor_sent(bert: Path, tmp_path: Path, aggregation: str) -> None:
    federation = Federation(bert, tmp_path, job(aggregation))
    for number in (1, 2):
        still = "lora_B" if aggregation == "rolora" and number == 2 else "lora_A"
        start = load_file(federation.state)
        updates = federation.train(number)
        for path, _ in updates.values():
            names = load_file(path).keys()
            assert not any(still in name for name in names) and any("lora" in name for name in names)
        result = federation.fold(number, updates)
        after = load_file(federation.state)
        assert all(np.array_equal(after[name], start[name]) for name in after if still in name)
        assert result.metrics["aggregation_error"] <= 1e-5


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("aggregation", ["fedit", "zero-pad", "flexlora", "flora"])
def test_the_other_rules_fold_the_same_updates(bert: Path, tmp_path: Path, aggregation: str) -> None:
    federation = Federation(bert, tmp_path, job(aggregation))
    start = load_file(federation.state)
    result = federation.fold(1, federation.train(1))
    after = load_file(federation.state)
    assert after.keys() == start.keys() and all(np.isfinite(tensor).all() for tensor in after.values())
    assert any(not np.array_equal(after[name], start[name]) for name in after if "lora_B" in name)
    assert 0 < result.metrics["aggregation_error"] < 2


@pytest.mark.usefixtures("offline")
def test_with_equal_ranks_the_default_is_the_plain_fold_to_the_byte(bert: Path, tmp_path: Path) -> None:
    federation = Federation(bert, tmp_path, job(ranks=""))
    start, updates = federation.state, federation.train(1)
    contributions = tuple(Contribution(device, path, weight) for device, (path, weight) in updates.items())
    plain = aggregate.fold(FoldPlan(start, contributions, tmp_path / "plain"))
    result = federation.fold(1, updates)
    assert result.digest == plain.digest
    assert set(result.metrics) == {"aggregation_error"}
