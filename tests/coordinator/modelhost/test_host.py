"""The model host as a real process: a first adapter that PEFT loads, and metrics on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
from blake3 import blake3
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fleetune.v1 import messages_pb2
from fleetune.wire import basefiles, codec
from support.child_client import ChildClient
from support.jobs import encoded, recipe_message

# peft asks transformers by an older name.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def host() -> Iterator[ChildClient]:
    with ChildClient("fleetune.coordinator.modelhost") as client:
        yield client


def _fields(base: Path, out: Path, recipe: messages_pb2.Recipe | None = None, **changes: object) -> dict[str, object]:
    return {
        "base": str(base),
        "revision": "",
        "allow_hub": False,
        "recipe": encoded(recipe or recipe_message()),
        "seed": 3,
        "init_adapter": None,
        "out_folder": str(out),
        **changes,
    }


@PEFT_WARNS
def test_prepare_writes_an_adapter_that_peft_loads(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    result = host.ask("prepare", **_fields(bert, tmp_path / "out"))["result"]
    state = tmp_path / "out" / "adapter_model.safetensors"
    peft.PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), str(tmp_path / "out"))
    assert result["state_digest"] == blake3(state.read_bytes()).hexdigest()
    assert result["size_bytes"] == state.stat().st_size
    assert result["trainables_digest"] == codec.trainables_digest(codec.read_table(state))
    assert sorted(name for block in result["blocks"] for name in block) == sorted(load_file(state))
    assert (result["base_digest"], result["base_folder"], result["hub_id"]) == (basefiles.scan(bert).digest, str(bert), "")
    assert {file["name"] for file in result["files"]} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert 0 < result["trainable_parameters"] < result["parameters"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == result["base_name"] == "tiny-bert"


def test_the_seed_makes_the_adapter(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    first, again, other = (
        host.ask("prepare", **_fields(bert, tmp_path / name, seed=seed))["result"]["state_digest"]
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again != other


def test_a_job_starts_from_an_existing_adapter(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    first = host.ask("prepare", **_fields(bert, tmp_path / "first"))["result"]
    second = host.ask("prepare", **_fields(bert, tmp_path / "second", seed=9, init_adapter=str(tmp_path / "first")))["result"]
    assert first["state_digest"] == second["state_digest"]


def test_a_starting_adapter_of_another_rank_is_a_model_error(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    host.ask("prepare", **_fields(bert, tmp_path / "first"))
    fields = _fields(bert, tmp_path / "second", recipe_message(rank=2), init_adapter=str(tmp_path / "first"))
    error = host.ask("prepare", **fields)["error"]
    assert error["kind"] == "model"
    assert "its r is 4, the job's 2" in error["message"]


def test_wrong_targets_are_a_model_error_that_lists_the_models_names(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    error = host.ask("prepare", **_fields(bert, tmp_path / "out", recipe_message(targets=["q_proj"])))["error"]
    assert error["kind"] == "model"
    assert "key, query, value" in error["message"]
    assert not (tmp_path / "out").exists()


def test_an_unknown_base_is_a_model_error(host: ChildClient, tmp_path: Path) -> None:
    error = host.ask("prepare", **_fields(Path("org/name"), tmp_path / "out"))["error"]
    assert (error["kind"], error["stage"]) == ("model", "load")
    assert "'org/name'" in error["message"]


def test_evaluate_measures_held_out_rows(host: ChildClient, bert: Path, rows_file: Path, tmp_path: Path) -> None:
    host.ask("prepare", **_fields(bert, tmp_path / "out"))
    fields = {
        "base_folder": str(bert),
        "recipe": encoded(recipe_message()),
        "state_path": str(tmp_path / "out" / "adapter_model.safetensors"),
        "rows_path": str(rows_file),
    }
    result = host.ask("evaluate", **fields)["result"]
    assert result["rows"] == 24
    assert set(result["metrics"]) == {"loss", "accuracy", "macro_f1"}
    assert host.ask("evaluate", **fields)["result"] == result


def test_missing_held_out_rows_are_a_data_error(host: ChildClient, bert: Path, tmp_path: Path) -> None:
    fields = {
        "base_folder": str(bert),
        "recipe": encoded(recipe_message()),
        "state_path": str(tmp_path / "state"),
        "rows_path": str(tmp_path / "absent.jsonl"),
    }
    assert host.ask("evaluate", **fields)["error"]["kind"] == "data"
