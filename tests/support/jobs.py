"""Recipes and tasks of small jobs, as the coordinator would send them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import Message

from fleetune.methods.v1 import echo_pb2, fedavg_lora_pb2
from fleetune.v1 import messages_pb2

TASKS = {
    "text-classification": messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION,
    "causal-lm": messages_pb2.MODEL_TASK_CAUSAL_LM,
    "seq2seq-lm": messages_pb2.MODEL_TASK_SEQ2SEQ_LM,
}


def recipe_message(
    model_task: str = "text-classification",
    targets: Sequence[str] = ("query", "value"),
    labels: Sequence[str] = ("red", "green", "blue"),
    dtype: str = "float32",
    rank: int = 4,
    dropout: float = 0.0,
    max_length: int = 32,
    max_target_length: int = 0,
    truncation: str = "right",
    mask_prompt: bool = False,
    gradient_checkpointing: bool = False,
    evaluation_rows: int = 0,
    columns: dict[str, str] | None = None,
) -> messages_pb2.Recipe:
    """A recipe for the tiny models."""
    if columns is None:
        columns = {"text": "text", "label": "label"} if model_task == "text-classification" else {"input": "input", "target": "target"}
    return messages_pb2.Recipe(
        model_task=TASKS[model_task],
        labels=labels if model_task == "text-classification" else (),
        lora=messages_pb2.Lora(rank=rank, alpha=2.0 * rank, dropout=dropout, targets=targets),
        data=messages_pb2.DataContract(
            name="colours",
            columns=messages_pb2.Columns(**columns),
            max_length=max_length,
            max_target_length=max_target_length,
            truncation=truncation,
            mask_prompt=mask_prompt,
        ),
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        evaluation_rows=evaluation_rows,
        metric="accuracy",
    )


def fedavg_payload(
    steps: int = 4,
    epochs: float = 0.0,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 1e-2,
    proximal_mu: float = 0.0,
    update_dtype: str = "float32",
    max_grad_norm: float = 0.0,
) -> fedavg_lora_pb2.FedavgLoraTask:
    """A short round of local training."""
    return fedavg_lora_pb2.FedavgLoraTask(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        proximal_mu=proximal_mu,
        update_dtype=update_dtype,
        max_grad_norm=max_grad_norm,
        schedule="constant",
        schedule_total=1000,
    )


def task_message(
    method: str,
    payload: Message,
    recipe: messages_pb2.Recipe | None = None,
    trainables_digest: str = "",
    seed: int = 7,
) -> messages_pb2.Task:
    """Round 1 of job `job` on device `device`."""
    task = messages_pb2.Task(
        task_id="job/1/device/train", job_id="job", round=1, lease=1, method=method, seed=seed, trainables_digest=trainables_digest
    )
    task.payload.Pack(payload)
    if recipe is not None:
        task.recipe.CopyFrom(recipe)
        task.base.digest = "0" * 64
    return task


def echo_task(constant: int) -> messages_pb2.Task:
    """A link test."""
    return task_message("echo", echo_pb2.EchoTask(constant=constant))


def encoded(message: Message) -> str:
    """As messages travel between a daemon and its child."""
    return base64.b64encode(message.SerializeToString()).decode("ascii")


def train_fields(
    task: messages_pb2.Task,
    state: Path,
    out: Path | None,
    base: Path | None = None,
    train: Path | None = None,
    validation: Path | None = None,
) -> dict[str, object]:
    """Fields of a train or evaluate request to the training child."""
    files = {"train": train, "validation": validation}
    data = {name: {"path": str(path), "format": None} if path is not None else None for name, path in files.items()}
    return {
        "task": encoded(task),
        "base_folder": str(base) if base is not None else None,
        "state_path": str(state),
        "out_path": str(out) if out is not None else None,
        "data": data if train is not None or validation is not None else None,
        "limits": {"threads": 1, "accelerator": "cpu", "memory_bytes": None},
    }
