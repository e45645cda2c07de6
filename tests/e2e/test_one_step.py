"""A round of deft, its devices' part and the coordinator's, is one step of AdamW on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fleetune.agent.methods import deft as device_side
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import PlannedPart, RoundPlan
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.deft import METHOD
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan, fold
from fleetune.methods.v1 import deft_pb2
from fleetune.model import adapter
from fleetune.model.batches import collate, endless_order
from fleetune.model.lora import AdaptedModel
from support.adapted import adapted, examples, quiet
from support.jobs import recipe_message, task_message
from support.tiny_models import coloured_rows, tiny_classifier, write_jsonl

LAYERS, DEPTHS = 3, 4
ROWS, BATCH = 16, 8
JOB = f"""
name = "steps"
seed = 5
[model]
base = "/srv/tiny"
[task]
kind = "text-classification"
labels = ["red", "green", "blue"]
[data]
name = "colours"
[training]
batch_size = {BATCH}
learning_rate = 0.02
schedule = "cosine"
warmup_steps = 2
weight_decay = 0.1
max_grad_norm = 0.5
[method]
name = "deft"
[rounds]
count = 6
"""


def full_gradient(model: AdaptedModel, rows: Path, chosen: Sequence[int]) -> None:
    """Into the parameters, by torch alone, of one batch."""
    items = examples(model, rows).items
    batch = collate([items[index] for index in chosen], model.tokenizer.pad_token_id, model.accelerator.device)
    model.model.zero_grad(set_to_none=True)
    model.model.train()
    model.model(**batch).loss.backward()


def round_of_devices(base: Path, state: Path, rows: Path, tasks: dict[str, deft_pb2.DeftTask], folder: Path) -> tuple[Contribution, ...]:
    found: list[Contribution] = []
    for device, task in tasks.items():
        out = folder / f"update-{device}"
        work = Work(
            task_message("deft", task, recipe_message()), base, state, out, DeviceData(DataFile(rows, None), None), Limits(1, "cpu", None)
        )
        found.append(Contribution(device, out, device_side.train(work, quiet).report.samples))
    return tuple(found)


@pytest.mark.parametrize("layout", [((1,), (2,), (3,), (4,)), ((1, 2), (3, 4)), ((1,), (1, 2), (1, 2, 3, 4)), ((1, 2, 3, 4),)], ids=str)
def test_rounds_are_steps_of_torch_on_the_same_rows(tmp_path: Path, layout: tuple[tuple[int, ...], ...]) -> None:
    base = tiny_classifier(tmp_path / "base", LAYERS)
    rows = write_jsonl(tmp_path / "rows.jsonl", coloured_rows(ROWS))
    spec = jobspec.parse(JOB)
    model = adapted(base, recipe_message())
    state, moments = adapter.write_state(tmp_path / "state-0", model).path, None
    names = {trainable.name: trainable.parameter for trainable in model.trainables}
    optimizer = torch.optim.AdamW(list(names.values()), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for number in range(1, spec.rounds.count + 1):
        # In the fourth round the last device does not deliver.
        parts = [PlannedPart(f"d{index}", depths, 1.0, 0.0, 1.0, 1.0) for index, depths in enumerate(layout)]
        plan = RoundPlan("blocks", "exact", tuple(parts[:-1] if number == 4 else parts), 1.0)
        tasks: dict[str, deft_pb2.DeftTask] = {}
        for device, message in METHOD.assign(spec, RoundFacts(number, [part.device_id for part in plan.parts], plan, DEPTHS)).items():
            assert isinstance(message, deft_pb2.DeftTask)
            tasks[device] = message
        server = METHOD.fold(spec, number)
        contributions = round_of_devices(base, state, rows, tasks, tmp_path)
        out, out_moments = tmp_path / f"state-{number}", tmp_path / f"moments-{number}"
        result = fold(FoldPlan(state, contributions, out, server, moments, out_moments))
        order = endless_order(ROWS, f"deft/{spec.seed}", (number - 1) * BATCH)
        full_gradient(model, rows, [next(order) for _ in range(BATCH)])
        for name, parameter in names.items():
            if not result.coverage[name]:
                parameter.grad = None
        present = [parameter for parameter in names.values() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(present, 0.5)
        assert server is not None
        optimizer.param_groups[0]["lr"] = server.learning_rate
        optimizer.step()
        found = load_file(out)
        assert found.keys() == names.keys()
        for name, parameter in names.items():
            np.testing.assert_allclose(found[name].numpy(), parameter.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=f"{name}, {number}")
        state, moments = out, out_moments
