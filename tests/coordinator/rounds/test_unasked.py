"""A sound update that nobody asked for is refused by the names of what it holds."""

from __future__ import annotations

import pytest

from fleetune.coordinator import jobspec, recipes
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.rounds.admission import unasked
from fleetune.coordinator.rounds.aggregate import UpdateFacts
from fleetune.coordinator.rounds.job import LiveJob, plan_of
from fleetune.coordinator.rounds.machine import JobMachine

JOB = """
name = "job"
[model]
base = "org/name"
[task]
kind = "causal-lm"
[data]
name = "rows"
[method]
aggregation = "fedsa"
"""
A, B, HEAD = "m.query.lora_A.weight", "m.query.lora_B.weight", "m.classifier.weight"


@pytest.mark.parametrize(("names", "told"), [((A,), ""), ((A, B), B), ((A, HEAD), HEAD), ((B,), B)])
def test_what_stays_on_its_device_is_not_taken(names: tuple[str, ...], told: str) -> None:
    spec = jobspec.parse(JOB)
    job = LiveJob("job-1", spec, JOB, "", 0.0, METHOD, recipes.recipe(spec), JobMachine(plan_of("job-1", spec, 15.0)))
    wrong = unasked(job, "device", UpdateFacts("delta", names, "F32", 1.0, finite=True))
    assert bool(wrong) == bool(told)
    assert told in wrong
