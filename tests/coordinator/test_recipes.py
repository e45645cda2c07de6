"""The message that tells devices what to compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.recipes import recipe
from fleetune.v1 import messages_pb2

JOBS = Path(__file__).resolve().parents[2] / "deploy/config/jobs"


def of(name: str) -> messages_pb2.Recipe:
    return recipe(jobspec.parse((JOBS / f"{name}.toml").read_text("utf-8")))


def test_a_classification_carries_its_labels_in_order() -> None:
    made = of("text-classification")
    assert made.model_task == messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION
    assert list(made.labels) == ["description", "entity", "abbreviation", "person", "place", "number"]
    assert (made.data.columns.text, made.data.columns.label, made.data.max_target_length) == ("text", "label", 0)
    assert (made.lora.rank, made.lora.alpha, list(made.lora.targets)) == (8, 16.0, ["query", "value"])
    assert made.metric == "accuracy"


def test_a_chat_job_masks_the_prompt_and_reads_no_text_column() -> None:
    made = of("causal-lm")
    assert made.data.columns.chat == "messages"
    assert made.data.columns.text == ""
    assert made.data.mask_prompt
    assert (made.dtype, made.gradient_checkpointing, made.evaluation_rows) == ("bfloat16", True, 200)


def test_a_seq2seq_job_bounds_its_targets() -> None:
    made = of("seq2seq-lm")
    assert (made.data.columns.input, made.data.columns.target, made.data.max_target_length) == ("dialogue", "summary", 64)


def test_a_method_without_a_model_has_an_empty_recipe() -> None:
    assert of("echo") == messages_pb2.Recipe()


@pytest.mark.parametrize("name", ["text-classification", "causal-lm", "seq2seq-lm", "minimal"])
def test_the_same_job_gives_the_same_bytes(name: str) -> None:
    assert of(name).SerializeToString(deterministic=True) == of(name).SerializeToString(deterministic=True)
