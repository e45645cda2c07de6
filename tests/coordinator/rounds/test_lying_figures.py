"""A device whose figures are a thousand times off: its rounds tell what it really takes, and the plan comes back to an honest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from fleetune.coordinator.domain import DeviceFigures, PlanSettings, RoundPlan
from fleetune.coordinator.rounds import timing
from support.planned_machines import LINK, PlanDesk, figures

TRUE = {"a": figures(1.0), "b": figures(1.2), "c": figures(3.0), "d": figures(0.9)}
STATE_BYTES = 100
WITHIN = 1.2


def truly_ready_s(name: str, deepest: int, settings: PlanSettings) -> float:
    return timing.ready_s(TRUE[name], LINK, deepest, settings, STATE_BYTES)


def true_round_s(plan: RoundPlan, settings: PlanSettings) -> float:
    """What the planned round takes with what the devices can really do."""
    parts = [(part.device_id.removeprefix("id-"), part) for part in plan.parts]
    return max(truly_ready_s(name, max(part.depths), settings) + part.finish_s - part.ready_s for name, part in parts)


def rounds_of(told: Mapping[str, DeviceFigures], count: int, layout: str = "blocks", fleet: Sequence[str] = tuple(TRUE)) -> list[float]:
    """True seconds of each round, of devices that tell `told` instead of what is true."""
    settings = PlanSettings(rows=8, layout=layout)  # type: ignore[arg-type]  # one of its words
    desk = PlanDesk(settings, rounds=count, quorum=1.0)
    desk.prepare()
    found: list[float] = []
    for _ in range(count):
        desk.open(*fleet)
        assert desk.machine.round is not None
        for task in [task for task in desk.machine.round.tasks.values() if task.kind == "measure"]:
            desk.tell(task.device_name, told.get(task.device_name, TRUE[task.device_name]))
        plan = desk.machine.round.plan
        assert plan is not None
        found.append(true_round_s(plan, settings))
        for part in plan.parts:
            name = part.device_id.removeprefix("id-")
            seen_s = truly_ready_s(name, max(part.depths), settings)
            desk.update(name, ready_s=seen_s, sent_s=part.finish_s - part.ready_s)
        desk.fold()
    assert desk.status() == "completed"
    return found


@pytest.mark.parametrize(("layout", "rounds"), [("blocks", 3), ("depth", 4)])
def test_a_slow_device_that_claims_to_be_a_thousand_times_faster_is_found_out(layout: str, rounds: int) -> None:
    honest = rounds_of({}, 1, layout)[0]
    lied = rounds_of({"c": figures(0.003)}, rounds + 2, layout)
    assert lied[0] > WITHIN * honest, "it was believed at first"
    assert all(took_s <= WITHIN * honest for took_s in lied[rounds - 1 :]), lied


def test_a_device_that_claims_to_be_a_thousand_times_slower_only_loses_its_own_part() -> None:
    without = rounds_of({}, 1, fleet=("b", "c", "d"))[0]
    assert max(rounds_of({"a": figures(1000.0)}, 3)) <= WITHIN * without
