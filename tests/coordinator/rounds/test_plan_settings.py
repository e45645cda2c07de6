"""What a job file says of planning reaches the planner in its own units."""

from __future__ import annotations

from pathlib import Path

from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import PlanSettings
from fleetune.coordinator.rounds.job import plan_of
from support import planned_agent
from support.coordinating import echo_job


def settings(folder: Path, method: str) -> PlanSettings | None:
    return plan_of("job", jobspec.parse(planned_agent.job(folder, method=method)), 15.0).planning


def test_a_job_that_says_nothing_has_the_defaults(tmp_path: Path) -> None:
    assert settings(tmp_path, "") == PlanSettings(rows=4)


def test_rates_are_bits_and_a_half_precision_update_has_half_the_bits(tmp_path: Path) -> None:
    made = settings(tmp_path, 'uplink_mbps = 20.0\nupdate_dtype = "bfloat16"\nlayout = "depth"\nspares = false\ndeadline_factor = 2.0')
    assert made == PlanSettings(rows=4, layout="depth", uplink_bits_per_s=2e7, value_bits=16, spares=False, deadline_factor=2.0)


def test_a_task_of_several_steps_passes_as_often(tmp_path: Path) -> None:
    toml = planned_agent.job(tmp_path, method='payload = "deltas"').replace(
        "batch_size = 4", "batch_size = 4\nsteps = 5\ngradient_accumulation = 3"
    )
    made = plan_of("job", jobspec.parse(toml), 15.0).planning
    assert made is not None
    assert made.passes == 15


def test_auto_is_a_layout_of_its_own(tmp_path: Path) -> None:
    toml = planned_agent.job(tmp_path, method="").replace('name = "deft"', 'name = "auto"')
    made = plan_of("job", jobspec.parse(toml), 15.0).planning
    assert made is not None
    assert made.layout == "auto"


def test_other_methods_do_not_plan() -> None:
    assert plan_of("job", jobspec.parse(echo_job()), 15.0).planning is None
