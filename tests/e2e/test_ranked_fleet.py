"""Adapters lose ranks while they are tuned, on real processes: what is sent, what is published, and what becomes of it when one dies."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fleetune.v1 import control_pb2, messages_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, JobView, metric, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

BRISK = ("--heartbeat-s", "0.5", "--lease-s", "5")
PATIENT = ("--heartbeat-s", "0.5", "--lease-s", "60")
"""No round closes without who is late to come back."""

ASSIGNED = control_pb2.DEVICE_TASK_STATE_ASSIGNED
MODULES = 4
RANK = 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    colours = tiny_models.coloured_rows(120)
    tiny_models.write_jsonl(folder / "rows.jsonl", colours[:100])
    tiny_models.write_jsonl(folder / "validation.jsonl", colours[100:])
    return folder


def job(base: Path, rounds: int, **tables: Mapping[str, object]) -> str:
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": list(tiny_models.LABELS)},
        "lora": {"rank": RANK, "alpha": 8, "targets": ["query", "value"]},
        "data": {"name": "colours", "max_length": 32},
        "training": {"batch_size": 16, "learning_rate": 0.02, "steps": 8},
        "method": {"name": "fedara", "ranks_end": 0.25, "warm_share": 0.1, "final_share": 0.2},
        "rounds": {"count": rounds},
        "devices": {"minimum": 2, "wait_s": 120},
        "evaluation": {"source": "none"},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "ranked", "seed": 3, **document})


def agents(rows: Path) -> dict[str, Agent]:
    return {name: Agent({"colours": f"{rows}/rows.jsonl,{rows}/validation.jsonl"}) for name in "ab"}


def waits_for_b(view: JobView) -> bool:
    """In a training that the other device is done with."""
    states = {(task.device_name, task.kind): task.state for task in view.current.tasks}
    train = messages_pb2.TASK_KIND_TRAIN
    return states == {("a", train): control_pb2.DEVICE_TASK_STATE_DONE, ("b", train): ASSIGNED}


def ranks_left(view: JobView) -> list[float]:
    return [next(found.value for found in entry.fold_metrics if found.name == "triplets") for entry in view.history]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_bytes_fall_with_the_ranks_and_what_is_published_loads_in_peft(tmp_path: Path, bert: Path, rows: Path) -> None:
    heldout = {"source": "heldout", "heldout": str(rows / "validation.jsonl")}
    with Fleet(tmp_path, agents(rows)) as fleet:
        view = fleet.completed(job(bert, 8, evaluation=heldout))
        exported = fleet.cli("export", view.job_id, str(tmp_path / "adapter"))
        done = fleet.cli("check", str(fleet.coordinator_state))
        reported = fleet.cli("report", view.job_id)
    assert exported.returncode == done.returncode == reported.returncode == 0, exported.stderr + done.stdout + done.stderr + reported.stderr
    left = ranks_left(view)
    assert left[0] == MODULES * RANK and left[-1] == MODULES * RANK / 4
    assert all(before >= after for before, after in itertools.pairwise(left))
    uploads = [entry.upload_bytes for entry in view.history]
    assert all(before >= after for before, after in itertools.pairwise(uploads)) and uploads[-1] < uploads[0] / 2
    assert view.history[-1].train_loss < view.history[0].train_loss

    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sum(config["rank_pattern"].values()) == left[-1]
    assert {name: mask.count("1") for name, mask in manifest["alive"].items() if "1" in mask} == config["rank_pattern"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name) == left[-1]

    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    found = [json.loads(line) for line in (rows / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        guesses = model(**tokenizer([row["text"] for row in found], padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    right = sum(tiny_models.LABELS[guess] == row["label"] for guess, row in zip(guesses, found, strict=True))
    assert metric(view.history[-1], "accuracy") == pytest.approx(right / len(found))


def test_a_device_that_is_killed_goes_on_with_the_ranks_of_the_round(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, agents(rows), coordinator=BRISK) as fleet:
        # Enough steps to be met under way: what takes moments tells nothing on the way.
        name = fleet.submit(job(bert, 5, training={"steps": 500}, devices={"minimum": 1}))

        def under_way(view: JobView) -> bool:
            found = [task for task in view.current.tasks if task.device_name == "b" and task.kind == messages_pb2.TASK_KIND_TRAIN]
            return view.current.round >= 3 and any(task.state == ASSIGNED and task.done > 0 for task in found)

        fleet.until(name, under_way, "a device under way in a later round")
        fleet.kill9("b")
        fleet.start("b")
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        done = fleet.cli("check", str(fleet.coordinator_state))
    assert done.returncode == 0, done.stdout + done.stderr
    assert ranks_left(view)[-1] == MODULES * RANK / 4


def test_the_coordinator_killed_between_rounds_goes_on_with_what_is_left(tmp_path: Path, bert: Path, rows: Path) -> None:
    with Fleet(tmp_path, agents(rows), coordinator=PATIENT) as fleet:
        fleet.freeze("b")
        name = fleet.submit(job(bert, 6, method={"arbitration": "vote"}, evaluation={"source": "devices"}))
        for _ in range(3):
            fleet.until(name, waits_for_b, "b alone to be waited for")
            fleet.pause(name)  # after this round
            fleet.thaw("b")
            fleet.until(name, lambda view: view.state == control_pb2.JOB_STATE_PAUSED, "the job to stand")
            fleet.freeze("b")
            fleet.resume(name)
        # Not in a fold, after which nobody would be connected to evaluate what comes of it.
        view = fleet.until(name, waits_for_b, "b alone to be waited for")
        assert view.rounds_committed == 3
        fleet.stop_coordinator(signal.SIGKILL)
        fleet.thaw("b")
        fleet.start_coordinator()
        view = fleet.wait(name)
        assert view.state == control_pb2.JOB_STATE_COMPLETED, view.message
        done = fleet.cli("check", str(fleet.coordinator_state))
    assert done.returncode == 0, done.stdout + done.stderr
    left = ranks_left(view)
    assert all(before >= after for before, after in itertools.pairwise(left)) and left[-1] == MODULES * RANK / 4
    assert all(metric(entry, "accuracy") >= 0 for entry in view.history)
