"""The training child as a real process: a tiny model learns, and each kind of trouble comes back as what it is."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from fleetune.methods.v1 import fedavg_lora_pb2
from fleetune.model import adapter
from fleetune.v1 import messages_pb2
from support.adapted import adapted
from support.child_client import ChildClient
from support.jobs import fedavg_payload, recipe_message, task_message, train_fields
from support.tiny_models import write_jsonl


@pytest.fixture(scope="module")
def child() -> Iterator[ChildClient]:
    """One child for all tests here: starting torch takes seconds, and a child that stays usable after errors is what is wanted."""
    with ChildClient("fleetune.agent.trainer") as client:
        yield client


@pytest.fixture(scope="module")
def state(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    adapter.write_state(path, adapted(bert, recipe_message()))
    return path


def _task(**changes: object) -> messages_pb2.Task:
    return task_message("fedavg_lora", fedavg_payload(**changes), recipe_message())  # type: ignore[arg-type]  # settings of the round


def test_a_child_trains_and_evaluates_what_it_learned(child: ChildClient, bert: Path, state: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "update.safetensors"
    fields = train_fields(_task(steps=25, learning_rate=2e-2), state, out, bert, rows_file, rows_file)
    answer = child.ask("train", **fields)["result"]
    report = messages_pb2.UpdateReport.FromString(base64.b64decode(answer["report"]))
    details = fedavg_lora_pb2.FedavgLoraReport()
    assert report.payload.Unpack(details)
    assert answer["digest"] == blake3(out.read_bytes()).hexdigest()
    assert (answer["size_bytes"], report.samples, details.steps) == (out.stat().st_size, 200, 25)
    assert details.last_loss < 0.5
    assert [event["done"] for event in child.events if event.get("stage") == "training"][-1] == 25

    before, delta = load_file(state), load_file(out)
    learned = tmp_path / "learned.safetensors"
    save_file({name: before[name] + delta[name] for name in before}, learned)
    evaluated = child.ask("evaluate", **train_fields(_task(), learned, None, bert, rows_file, rows_file))["result"]
    evaluation = messages_pb2.Evaluation.FromString(base64.b64decode(evaluated["evaluation"]))
    assert {metric.name: metric.value for metric in evaluation.metrics}["accuracy"] == 1.0
    assert evaluation.rows == 24


def test_a_second_request_of_the_job_loads_nothing(child: ChildClient, bert: Path, state: Path, rows_file: Path, tmp_path: Path) -> None:
    fields = train_fields(_task(), state, tmp_path / "update", bert, rows_file)
    child.ask("train", **fields)
    child.ask("train", **fields)
    assert next(event["stage"] for event in child.events if event["event"] == "progress") == "training"


def test_an_unknown_label_is_a_data_error_with_its_line(child: ChildClient, bert: Path, state: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "red"}, {"text": "b", "label": "pink"}])
    error = child.ask("train", **train_fields(_task(), state, tmp_path / "update", bert, rows))["error"]
    assert error["kind"] == "data"
    assert f"{rows}:2" in error["message"]
    assert "'pink'" in error["message"]
    assert not (tmp_path / "update").exists()


def test_a_state_of_other_tensors_is_a_model_error(child: ChildClient, bert: Path, rows_file: Path, tmp_path: Path) -> None:
    save_file({"strange": torch.zeros(2)}, tmp_path / "state")
    error = child.ask("train", **train_fields(_task(), tmp_path / "state", tmp_path / "update", bert, rows_file))["error"]
    assert error["kind"] == "model"
    assert "strange" in error["message"]


def test_a_torn_state_is_a_transfer_error(child: ChildClient, bert: Path, state: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(state.read_bytes()[:-1])
    error = child.ask("train", **train_fields(_task(), tmp_path / "torn", tmp_path / "update", bert, rows_file))["error"]
    assert error["kind"] == "transfer"


def test_an_absurd_rate_is_a_not_finite_error(child: ChildClient, bert: Path, state: Path, rows_file: Path, tmp_path: Path) -> None:
    fields = train_fields(_task(steps=10, learning_rate=1e30), state, tmp_path / "update", bert, rows_file)
    error = child.ask("train", **fields)["error"]
    assert error["kind"] == "not_finite"
    assert not (tmp_path / "update").exists()


def test_an_absent_accelerator_is_an_unsupported_error(
    child: ChildClient, bert: Path, state: Path, rows_file: Path, tmp_path: Path
) -> None:
    absent = next(kind for kind in ("mps", "cuda") if kind not in child.ask("ping", probe=True)["result"]["accelerators"])
    fields = train_fields(_task(), state, tmp_path / "update", bert, rows_file)
    fields["limits"] = {"threads": 1, "accelerator": absent, "memory_bytes": None}
    error = child.ask("train", **fields)["error"]
    assert error["kind"] == "unsupported"
    assert absent in error["message"]


def test_an_unknown_method_is_an_unsupported_error(child: ChildClient, state: Path, tmp_path: Path) -> None:
    task = task_message("fedsgd", fedavg_payload())
    assert child.ask("train", **train_fields(task, state, tmp_path / "update"))["error"]["kind"] == "unsupported"


def test_a_device_without_rows_is_a_data_error(child: ChildClient, bert: Path, state: Path, tmp_path: Path) -> None:
    error = child.ask("train", **train_fields(_task(), state, tmp_path / "update", bert))["error"]
    assert error["kind"] == "data"


def test_a_device_with_only_validation_rows_measures_and_says_why_it_does_not_train(
    child: ChildClient, bert: Path, state: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "held-out.jsonl", [{"text": "the red lamp", "label": "red"}, {"text": "the sea", "label": "blue"}])
    fields = train_fields(_task(), state, tmp_path / "update", bert, validation=rows)
    answer = child.ask("evaluate", **{**fields, "out_path": None})
    assert messages_pb2.Evaluation.FromString(base64.b64decode(answer["result"]["evaluation"])).rows == 2
    error = child.ask("train", **fields)["error"]
    assert error["kind"] == "data"
    assert "only validation rows of 'colours'" in error["message"]
