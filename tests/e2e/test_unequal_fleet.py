"""A job of devices with unlike ranks through the real service: processes, uploads, checks, folds, and the adapter at the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fleetune.v1 import control_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, JobView, metric, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    colours = tiny_models.coloured_rows(72)
    for index, name in enumerate(("pi4-a", "laptop")):
        tiny_models.write_jsonl(folder / f"{name}.jsonl", colours[index * 30 : 30 + index * 30])
    tiny_models.write_jsonl(folder / "validation.jsonl", colours[60:])
    return folder


def agents(rows: Path) -> dict[str, Agent]:
    return {name: Agent({"colours": f"{rows}/{name}.jsonl,{rows}/validation.jsonl"}) for name in ("pi4-a", "laptop")}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet"), agents(rows)) as running:
        yield running


@pytest.fixture
def own_fleet(tmp_path: Path, rows: Path) -> Iterator[Fleet]:
    """For tests that kill: what is started in the place of the dead is the test's own. No round closes without who is late to come back."""
    with Fleet(tmp_path / "fleet", agents(rows), coordinator=("--heartbeat-s", "0.5", "--lease-s", "60")) as running:
        yield running


def job(base: Path, **method: object) -> str:
    return toml(
        {
            "name": "unequal",
            "seed": 3,
            "model": {"base": str(base), "allow_hub": False},
            "task": {"kind": "text-classification", "labels": list(tiny_models.LABELS)},
            "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
            "data": {"name": "colours", "max_length": 32},
            "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.02},
            "rounds": {"count": 5},
            "devices": {"minimum": 2, "wait_s": 60, "keep_warm_s": 600},
            "method": method,
        }
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", [{}, {"aggregation": "rolora"}, {"aggregation": "ffa"}], ids=["exact", "rolora", "ffa"])
def test_devices_of_unlike_ranks_learn_together(fleet: Fleet, bert: Path, rows: Path, method: dict[str, object]) -> None:
    text = job(bert, **method) + '\n[method.ranks]\n"pi4-*" = 2\n'
    done = fleet.completed(text)

    assert [entry.updates_folded for entry in done.history] == [2] * 5
    assert done.history[-1].train_loss < done.history[0].train_loss
    assert all({found.name for found in entry.fold_metrics} >= {"aggregation_error"} for entry in done.history)
    folder = fleet.published(done)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fold_metrics"]["aggregation_error"] >= 0
    small, large = (next(device["bytes"] for device in manifest["devices"] if device["name"] == name) for name in ("pi4-a", "laptop"))
    assert small < large
    assert {tensor.shape[0] for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name} == {8}

    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), folder).eval()
    assert metric(done.history[-1], "accuracy") == pytest.approx(_accuracy(model, bert, rows))


def _halt(fleet: Fleet, job_id: str, rounds: int) -> JobView:
    """The job, standing, after so many rounds or more."""
    fleet.until(job_id, lambda view: view.rounds_committed >= rounds, f"{rounds} rounds")
    fleet.pause(job_id)
    fleet.until(job_id, lambda view: view.state == control_pb2.JOB_STATE_PAUSED, "the job to stand")
    return fleet.view(job_id)


def _accuracy(model: PeftModel, base: Path, rows: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = [json.loads(line) for line in (rows / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        guesses = model(**tokenizer([row["text"] for row in found], padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    right: int = sum(tiny_models.LABELS[guess] == row["label"] for guess, row in zip(guesses, found, strict=True))
    return right / len(found)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("aggregation", ["flora", "fedex"])
def test_who_has_missed_rounds_goes_on_from_the_same_weights(own_fleet: Fleet, bert: Path, rows: Path, aggregation: str) -> None:
    text = job(bert, aggregation=aggregation, residual_rank=24).replace("minimum = 2", "minimum = 1").replace("count = 5", "count = 20")
    job_id = own_fleet.submit(text)
    _halt(own_fleet, job_id, 1)
    own_fleet.kill9("laptop")
    own_fleet.offline("laptop")
    own_fleet.resume(job_id)
    alone = _halt(own_fleet, job_id, own_fleet.view(job_id).rounds_committed + 1)
    own_fleet.start("laptop")
    own_fleet.resume(job_id)
    done = own_fleet.wait(job_id)

    assert done.rounds_committed == 20, done.message
    assert alone.history[-1].updates_folded == 1, "without it"
    assert all(entry.updates_folded == 2 for entry in done.history[alone.rounds_committed :]), "it has come back"
    assert all({found.name for found in entry.fold_metrics} == {"aggregation_error", "truncation_error"} for entry in done.history)
    assert done.history[-1].train_loss < done.history[0].train_loss
    folder = own_fleet.published(done)
    assert {tensor.shape[0] for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name} == {32}
    assert "rank 8 and 24 more" in (folder / "README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), folder).eval()
    assert _accuracy(model, bert, rows) == pytest.approx(metric(done.history[-1], "accuracy"))
    checked = own_fleet.cli("check", str(own_fleet.coordinator_state))
    assert checked.returncode == 0 and "sound" in checked.stdout, checked.stdout + checked.stderr


def test_a_coordinator_that_is_killed_folds_again_from_what_it_has(own_fleet: Fleet, bert: Path) -> None:
    job_id = own_fleet.submit(job(bert) + '\n[method.ranks]\n"pi4-*" = 2\n')
    own_fleet.until(job_id, lambda view: view.rounds_committed >= 2, "two rounds")
    own_fleet.restart_coordinator(signal.SIGKILL)
    done = own_fleet.wait(job_id)

    assert done.rounds_committed == 5
    assert all(entry.updates_folded == 2 and entry.fold_metrics for entry in done.history)
    checked = own_fleet.cli("report", job_id)
    assert "aggregation error" in checked.stdout


def test_b_and_head_stay_on_their_devices_and_survive_a_kill(own_fleet: Fleet, bert: Path) -> None:
    job_id = own_fleet.submit(job(bert, aggregation="fedsa"))
    own_fleet.until(job_id, lambda view: view.rounds_committed >= 2, "two rounds")
    own_fleet.kill9("laptop")
    own_fleet.start("laptop")
    done = own_fleet.wait(job_id)
    assert done.rounds_committed == 5, done.message
    assert done.history[-1].train_loss < done.history[0].train_loss
    folder = own_fleet.published(done)
    published = load_file(folder / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in published.items() if ".lora_B." in name)
    own: dict[str, dict[str, object]] = {}
    for name in ("pi4-a", "laptop"):
        files = sorted((own_fleet.state_of(name) / "personal" / job_id).iterdir())
        assert 1 <= len(files) <= 2, "the last two rounds that it took part in"
        own[name] = dict(load_file(files[-1]))
        assert set(own[name]) == set(published)
    differs = [name for name in published if not (own["pi4-a"][name] == own["laptop"][name]).all()]  # type: ignore[attr-defined]
    assert any(".lora_B." in name for name in differs)
    assert any("classifier" in name for name in differs)
    text = own_fleet.cli("logs", job_id).stdout
    assert 1 <= text.count("nothing of this job is kept on this device") <= 2, "in each device's first round alone"
    assert "are lost" not in text
