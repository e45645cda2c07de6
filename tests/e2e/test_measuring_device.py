"""A device that has only validation rows measures what the others have trained, and is never asked to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.v1 import control_pb2, messages_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN, EVALUATE = messages_pb2.TASK_KIND_TRAIN, messages_pb2.TASK_KIND_EVALUATE


def job(base: Path, minimum: int, rounds: int, wait_s: float) -> str:
    return toml(
        {
            "name": "panel",
            "seed": 3,
            "model": {"base": str(base), "allow_hub": False},
            "task": {"kind": "text-classification", "labels": list(tiny_models.LABELS)},
            "lora": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
            "data": {"name": "colours", "max_length": 32},
            "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.02},
            "rounds": {"count": rounds},
            "devices": {"minimum": minimum, "wait_s": wait_s, "keep_warm_s": 600},
        }
    )


def test_two_devices_train_and_a_third_measures(tmp_path: Path, bert: Path) -> None:
    rows = tiny_models.coloured_rows(60)
    for name, part in (("one", rows[:24]), ("two", rows[24:48]), ("held-out", rows[48:])):
        tiny_models.write_jsonl(tmp_path / f"{name}.jsonl", part)
    agents = {
        "one": Agent({"colours": f"{tmp_path}/one.jsonl"}),
        "two": Agent({"colours": f"{tmp_path}/two.jsonl"}),
        "panel": Agent(settings={"data.colours.validation": f"{tmp_path}/held-out.jsonl"}),
    }
    with Fleet(tmp_path / "fleet", agents) as fleet:
        view = fleet.completed(job(bert, minimum=2, rounds=2, wait_s=60))

        for entry in view.history:
            done = [(task.device_name, task.kind, task.state) for task in entry.tasks]
            assert sorted(done) == [
                ("one", TRAIN, control_pb2.DEVICE_TASK_STATE_DONE),
                ("panel", EVALUATE, control_pb2.DEVICE_TASK_STATE_DONE),
                ("two", TRAIN, control_pb2.DEVICE_TASK_STATE_DONE),
            ]
            assert entry.evaluation_rows == 12
        panel = fleet.devices()["panel"]
        assert (list(panel.train_data_names), list(panel.validation_data_names)) == ([], ["colours"])

        waiting = fleet.wait(fleet.submit(job(bert, minimum=3, rounds=1, wait_s=4)))
        assert "2 of at least 3 are ready" in waiting.message
