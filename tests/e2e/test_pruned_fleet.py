"""A model is pruned while it is tuned, on real processes: what every device keeps, and what becomes of it when one dies."""

from __future__ import annotations

import itertools
import json
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from fleetune import architectures, importances, structures
from fleetune.v1 import control_pb2, messages_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, JobView, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

BRISK = ("--heartbeat-s", "0.5", "--lease-s", "5")
PATIENT = ("--heartbeat-s", "0.5", "--lease-s", "60")
"""No round closes without who is late to come back."""

ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
ASSIGNED = control_pb2.DEVICE_TASK_STATE_ASSIGNED
DONE = control_pb2.DEVICE_TASK_STATE_DONE


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tiny_models.write_jsonl(path, tiny_models.coloured_rows(400))
    return path


def job(base: Path, rounds: int, **tables: Mapping[str, object]) -> str:
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": list(tiny_models.LABELS)},
        "lora": {"rank": 8, "alpha": 16, "targets": list(ALL)},
        "data": {"name": "colours", "max_length": 32},
        "training": {"batch_size": 16, "learning_rate": 0.01, "steps": 12},
        "method": {"name": "fedspine", "prune_every": 4, "prune_step": 0.25, "recovery_rounds": 1},
        "rounds": {"count": rounds},
        "devices": {"minimum": 2, "wait_s": 120},
        "evaluation": {"source": "none"},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "pruned", "seed": 3, **document})


def trained(view: control_pb2.RoundView) -> dict[str, control_pb2.DeviceTask]:
    return {task.device_name: task for task in view.tasks if task.kind == messages_pb2.TASK_KIND_TRAIN}


def kept(fleet: Fleet, base: Path, view: JobView) -> dict[str, structures.Structure]:
    """Device -> what its model has left after the last round."""
    layout = architectures.layout(json.loads((base / "config.json").read_text()))
    manifest = json.loads((fleet.published(view) / "manifest.json").read_text())
    return {device["name"]: structures.from_bytes(layout, bytes.fromhex(device["structure"])) for device in manifest["devices"]}


def remembered(fleet: Fleet) -> tuple[str, list[set[bool]]]:
    """The fleet's importance as the coordinator keeps it, and for each round whether its updates kept what their devices told."""
    with closing(sqlite3.connect(fleet.coordinator_state / "coordinator.sqlite")) as raw:
        (machine,) = raw.execute("SELECT machine FROM jobs").fetchone()
        entries = [json.loads(entry) for (entry,) in raw.execute("SELECT entry FROM rounds ORDER BY round").fetchall()]
    return json.loads(machine)["importance"], [
        {bool(task["update"]["importance"]) for task in entry["tasks"].values()} for entry in entries
    ]


def test_every_device_ends_at_the_sparsity_and_the_loss_falls(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "ab"}) as fleet:
        view = fleet.completed(job(bert, 6))
        left = kept(fleet, bert, view)
        importance, stored = remembered(fleet)
        exported = fleet.cli("export", view.job_id, str(tmp_path / "adapter"))
        small = [
            fleet.cli("shrink", str(tmp_path / "adapter"), str(tmp_path / name), "--base", str(bert), "--json", *words)
            for name, words in (("of-a", ("--device", "a")), ("voted", ()))
        ]
        wrong = fleet.cli("shrink", str(tmp_path / "adapter"), str(tmp_path / "none"), "--base", str(bert), "--device", "z")
        done = fleet.cli("check", str(fleet.coordinator_state))
    assert done.returncode == exported.returncode == 0, done.stdout + done.stderr + exported.stderr
    for made in small:
        assert made.returncode == 0, made.stderr
        told = json.loads(made.stdout)
        assert (Path(told["folder"]) / "structure.json").is_file()
        assert 0.45 <= told["sparsity"] <= 0.55
        assert told["parameters"] < told["base_parameters"]
    assert wrong.returncode != 0
    assert "has no device 'z'; it has a, b" in wrong.stderr
    last = trained(view.history[-1])
    assert {task.pruning.sparsity_after for task in last.values()} == {0.5}
    for entry, after in zip(view.history, view.history[1:], strict=False):
        ends = {name: task.pruning.sparsity_after for name, task in trained(entry).items()}
        assert ends == {name: task.pruning.sparsity_before for name, task in trained(after).items()}
    layout = architectures.layout(json.loads((bert / "config.json").read_text()))
    assert [len(group) for group in importances.from_text(layout, importance)] == [group.units for group in layout.groups]
    # From the round before recovery on each device's own is kept, for whoever takes the result.
    assert stored == [{False}, {False}, {False}, {False}, {True}, {True}]
    assert {task.pruning.sparsity_after for task in trained(view.history[0]).values()} == {0.0}
    assert all(0.45 <= structures.sparsity(layout, structure) <= 0.55 for structure in left.values())
    assert view.history[-1].train_loss < 0.8 * view.history[0].train_loss
    assert {task.pruning.rank for entry in view.history for task in trained(entry).values()} <= set(range(2, 9))


def test_a_device_that_is_killed_goes_on_from_the_structure_that_the_coordinator_has(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "ab"}, coordinator=BRISK) as fleet:
        # Enough steps to be met under way: what takes moments tells nothing on the way.
        name = fleet.submit(job(bert, 5, training={"steps": 500}, devices={"minimum": 1}))

        def is_pruned(view: JobView) -> bool:
            tasks = trained(view.current)
            return view.current.round >= 3 and "b" in tasks and tasks["b"].state == ASSIGNED and tasks["b"].done > 0

        fleet.until(name, is_pruned, "a device under way in a later round")
        fleet.kill9("b")
        fleet.start("b")
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        done = fleet.cli("check", str(fleet.coordinator_state))
    assert done.returncode == 0, done.stdout + done.stderr
    way = [task.pruning for entry in view.history if (task := trained(entry).get("b")) and task.state == DONE]
    assert all(before.sparsity_after <= after.sparsity_before + 1e-9 for before, after in itertools.pairwise(way))
    assert way[-1].sparsity_after > 0


def test_the_coordinator_killed_between_rounds_remembers_what_every_device_has_left(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {name: Agent({"colours": str(rows)}) for name in "ab"}, coordinator=PATIENT) as fleet:
        name = fleet.submit(job(bert, 5))
        fleet.until(name, lambda view: len(view.history) >= 2, "two rounds")
        fleet.restart_coordinator(signal.SIGKILL)
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        left = kept(fleet, bert, view)
    assert {task.pruning.sparsity_after for task in trained(view.history[-1]).values()} == {0.5}
    assert len(left) == 2


def test_a_model_that_cannot_be_pruned_is_told_before_the_first_round(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, {"a": Agent({"colours": str(rows)})}) as fleet:
        view = fleet.wait(fleet.submit(job(bert, 6, lora={"targets": ["query", "value"]}, devices={"minimum": 1})))
    assert view.state == control_pb2.JOB_STATE_FAILED
    assert "importance of neurons" in view.message
    assert not view.history
