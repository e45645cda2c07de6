"""Planned rounds on real processes: who trains which blocks, what becomes of them when a device or the coordinator dies."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from fleetune.v1 import control_pb2, messages_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, JobView, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

BRISK = ("--heartbeat-s", "0.5", "--lease-s", "5")
PATIENT = ("--heartbeat-s", "0.5", "--lease-s", "60")
"""No round closes without who is late to come back."""

DEPTHS = {1, 2, 3}
"""Of the tiny model: its head and two layers."""

DONE = control_pb2.DEVICE_TASK_STATE_DONE
ASSIGNED = control_pb2.DEVICE_TASK_STATE_ASSIGNED
MISSED = control_pb2.DEVICE_TASK_STATE_MISSED


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tiny_models.write_jsonl(path, tiny_models.coloured_rows(400))
    return path


def job(base: Path, rounds: int, **tables: Mapping[str, object]) -> str:
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": list(tiny_models.LABELS)},
        "lora": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
        "data": {"name": "colours", "max_length": 32},
        "training": {"batch_size": 16, "learning_rate": 0.02},
        # No deadline: a device that is held up for a moment is late, and its blocks are trained all the same.
        "method": {"name": "deft", "deadline_factor": 0},
        "rounds": {"count": rounds},
        "devices": {"minimum": 4, "wait_s": 120},
        "evaluation": {"source": "none"},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "planned", "seed": 3, **document})


def trained(view: control_pb2.RoundView) -> dict[str, control_pb2.DeviceTask]:
    return {task.device_name: task for task in view.tasks if task.kind == messages_pb2.TASK_KIND_TRAIN}


def depths(view: control_pb2.RoundView) -> list[int]:
    """Of all updates that were folded."""
    return sorted(depth for task in trained(view).values() if task.state == DONE for depth in task.plan.depths)


def sound(fleet: Fleet) -> str:
    """The checker's last word on what the stopped coordinator has left."""
    done = fleet.cli("check", str(fleet.coordinator_state))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_block_is_trained_once_a_round_and_the_loss_falls(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "abcd"}) as fleet:
        view = fleet.completed(job(bert, 30, method={"rotate_rounds": 1}))
        devices = fleet.devices()
    assert all(depths(entry) == sorted(DEPTHS) for entry in view.history)
    assert all(entry.plan.layout == "blocks" and entry.plan.predicted_s > 0 and entry.plan.actual_s > 0 for entry in view.history)
    assert all(len(entry.plan.idle_devices) == 1 for entry in view.history)
    for before, after in zip(view.history, view.history[1:], strict=False):
        both = trained(before).keys() & trained(after).keys()
        assert not any(list(trained(before)[name].plan.depths) == list(trained(after)[name].plan.depths) for name in both)
    assert view.history[-1].train_loss < 0.8 * view.history[0].train_loss
    assert all(device.figures.step_s and device.link.up_bits_per_s > 0 for device in devices.values())


def test_auto_tells_what_it_has_compared(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "ab"}) as fleet:
        view = fleet.completed(job(bert, 2, method={"name": "auto"}, devices={"minimum": 2}))
    plan = view.history[-1].plan
    assert {told.layout for told in plan.predictions} == {"blocks", "depth", "data-parallel", "single"}
    assert plan.layout in plan.reason
    assert set(depths(view.history[-1])) == DEPTHS


@pytest.mark.parametrize("sharing", ["hard", "weights"])
def test_all_uploads_together_keep_to_the_shared_uplink(tmp_path: Path, bert: Path, rows: Path, sharing: str) -> None:
    # Slow enough for uploads of seconds, beside which a moment between two clocks is nothing.
    uplink_mbps, rounds = 0.2, 3
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "abcd"}) as fleet:
        method = {"uplink_mbps": uplink_mbps, "sharing": sharing, "layout": "depth"}
        view = fleet.completed(job(bert, rounds, method=method, lora={"rank": 32}))
    for entry in view.history:
        parts = [task.plan for task in trained(entry).values()]
        seconds = max(part.actual_finish_s for part in parts) - min(part.actual_ready_s for part in parts)
        assert 8 * entry.upload_bytes / seconds <= uplink_mbps * 1e6 * 1.05


def test_the_block_of_a_killed_device_goes_to_an_idle_one(tmp_path: Path, bert: Path, rows: Path) -> None:
    agents = {name: Agent({"colours": str(rows)}) for name in "abcd"}
    with Fleet(tmp_path, agents, coordinator=BRISK) as fleet:
        name = fleet.submit(job(bert, KILLED_ROUNDS, method={"payload": "deltas"}, training={"steps": 600}, devices={"minimum": 3}))
        number, victim, lost = killed_in_its_training(fleet, name)
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        killed = trained(view.history[number - 1])
        assert killed[victim].state == MISSED
        assert [list(task.plan.depths) for task in killed.values() if task.state == DONE].count(lost) == 1
        assert all(depths(entry) == sorted(DEPTHS) for entry in view.history)
        fleet.start(victim)


KILLED_ROUNDS = 3


def killed_in_its_training(fleet: Fleet, name: str) -> tuple[int, str, list[int]]:
    """Kill a device that trains: the round, the device and its depths.

    One that had sent its update a moment before it was killed is started again, and another is killed in a later round.
    """

    def under_way(view: JobView) -> list[str]:
        return [device for device, task in trained(view.current).items() if task.state == ASSIGNED and task.done > 0]

    while True:
        view = fleet.until(name, lambda view: bool(under_way(view)), "a device to train")
        number, victim = view.current.round, under_way(view)[0]
        fleet.kill9(victim)

        def end(number: int = number, victim: str = victim) -> int:
            """How the training of the dead has ended; it is assigned until then."""
            view = fleet.view(name)
            entry = view.history[number - 1] if len(view.history) >= number else view.current
            return trained(entry)[victim].state

        fleet.poll(lambda end=end: end() != ASSIGNED, f"the end of {victim}'s training")  # type: ignore[misc]
        if end() == MISSED:
            return number, victim, list(trained(view.current)[victim].plan.depths)
        fleet.start(victim)


def test_a_planned_round_goes_on_as_it_was_after_the_coordinator_was_killed(tmp_path: Path, bert: Path, rows: Path) -> None:
    agents = {name: Agent({"colours": str(rows)}) for name in "abcd"}
    with Fleet(tmp_path, agents, coordinator=PATIENT) as fleet:
        name = fleet.submit(job(bert, 2, method={"payload": "deltas"}, training={"steps": 600}))
        view = fleet.until(name, lambda view: any(task.done > 0 for task in trained(view.current).values()), "a device to train")
        planned = {device: list(task.plan.depths) for device, task in trained(view.current).items()}
        fleet.restart_coordinator(signal.SIGKILL)
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        assert {device: list(task.plan.depths) for device, task in trained(view.history[0]).items()} == planned
        assert all(depths(entry) == sorted(DEPTHS) for entry in view.history)
        for device in planned:
            received = [line for line in fleet.log_of(device).splitlines() if "task received" in line and "round=1 " in line]
            assert len(received) == 2  # to measure, and to train
    sound(fleet)
