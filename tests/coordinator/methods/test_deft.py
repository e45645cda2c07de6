"""What deft asks of devices follows from the plan, and what it does with their gradients from the job file."""

from __future__ import annotations

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import PlannedPart, RoundPlan
from fleetune.coordinator.jobspec import JobSpec
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.deft import METHOD
from fleetune.coordinator.rounds.optimizers import AdamW
from fleetune.methods.v1 import deft_pb2

PLAN = RoundPlan("blocks", "exact", (PlannedPart("id-a", (3, 4), 0.5, 1e6, 1.0, 2.0), PlannedPart("id-b", (1,), 0.5, 1e6, 1.0, 2.0)), 2.0)


def job(method: str = "", training: str = "") -> JobSpec:
    return jobspec.parse(
        f"""
name = "job"
seed = 9
[model]
base = "org/name"
[task]
kind = "causal-lm"
[data]
name = "rows"
[training]
batch_size = 4
learning_rate = 0.5
weight_decay = 0.25
max_grad_norm = 2.0
{training}
[method]
name = "deft"
{method}
[rounds]
count = 10
"""
    )


def tasks(spec: JobSpec, facts: RoundFacts) -> dict[str, deft_pb2.DeftTask]:
    found: dict[str, deft_pb2.DeftTask] = {}
    for device, message in METHOD.assign(spec, facts).items():
        assert isinstance(message, deft_pb2.DeftTask)
        found[device] = message
    return found


def test_each_device_of_the_plan_gets_its_depths_and_nobody_else_a_task() -> None:
    found = tasks(job(), RoundFacts(3, ["id-a", "id-b", "id-c"], PLAN, 6))
    assert {device: list(task.depths) for device, task in found.items()} == {"id-a": [3, 4], "id-b": [1]}
    assert {task.depth_count for task in found.values()} == {6}


def test_for_gradients_the_device_has_no_optimiser() -> None:
    task = tasks(job(), RoundFacts(3, ["id-a"], PLAN, 6))["id-a"]
    assert task.payload == deft_pb2.DEFT_PAYLOAD_GRADIENT
    assert (task.steps, task.first_step, task.order_seed) == (1, 2, 9)
    assert (task.learning_rate, task.weight_decay, task.max_grad_norm) == (0, 0, 0)


def test_for_deltas_it_has_the_job_s_own_at_the_round_s_place_of_the_schedule() -> None:
    spec = job('payload = "deltas"', 'steps = 5\nschedule = "linear"')
    task = tasks(spec, RoundFacts(3, ["id-a"], PLAN, 6))["id-a"]
    assert task.payload == deft_pb2.DEFT_PAYLOAD_DELTA
    assert (task.steps, task.first_step) == (5, 10)
    assert task.learning_rate == pytest.approx(0.5 * (1 - 10 / 50))
    assert (task.weight_decay, task.max_grad_norm) == (0.25, 2.0)
    assert METHOD.fold(spec, 3) is None
    assert METHOD.kinds(spec) == {"delta"}


def test_before_there_is_a_plan_devices_measure_what_they_may_have_to_train() -> None:
    facts = RoundFacts(1, ["id-a", "id-b"], None, 3)
    alone = tasks(job(), facts)
    assert {device: list(task.depths) for device, task in alone.items()} == {"id-a": [], "id-b": []}
    for method in ('layout = "depth"', 'layout = "auto"', "layers_per_block = 2"):
        assert [list(task.depths) for task in tasks(job(method), facts).values()] == [[1, 2, 3]] * 2


def test_the_coordinator_s_step_is_the_job_s_at_the_round_s_rate() -> None:
    spec = job("server_beta1 = 0.8\nserver_beta2 = 0.98\nserver_epsilon = 1e-6", 'schedule = "linear"\nwarmup_steps = 2')
    assert METHOD.kinds(spec) == {"gradient"}
    assert METHOD.fold(spec, 1) == AdamW(0.25, 0.8, 0.98, 1e-6, 0.25, 2.0)
    rates = [METHOD.fold(spec, number) for number in range(1, 11)]
    assert [round(server.learning_rate, 4) for server in rates if server] == [
        0.25, 0.5, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625,
    ]  # fmt: skip
