"""What a job tells every device to compute, as the message that travels."""

from __future__ import annotations

from fleetune.coordinator import loraranks
from fleetune.coordinator.jobspec import JobSpec
from fleetune.v1 import messages_pb2

_MODEL_TASKS = {
    "text-classification": messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION,
    "causal-lm": messages_pb2.MODEL_TASK_CAUSAL_LM,
    "seq2seq-lm": messages_pb2.MODEL_TASK_SEQ2SEQ_LM,
}


def _lora(spec: JobSpec) -> messages_pb2.Lora | None:
    """None where the layers' own weights are trained."""
    if spec.method.trains == "full":
        return None
    rank, alpha = loraranks.state_rank(spec), loraranks.state_alpha(spec)
    return messages_pb2.Lora(rank=rank, alpha=alpha, dropout=spec.lora.dropout, targets=spec.lora.targets)


def recipe(spec: JobSpec) -> messages_pb2.Recipe:
    """The recipe of a complete job; an empty one for methods without a model. The same job gives the same bytes."""
    if spec.task.kind is None:
        return messages_pb2.Recipe()
    return messages_pb2.Recipe(
        model_task=_MODEL_TASKS[spec.task.kind],
        labels=spec.task.labels,
        lora=_lora(spec),
        data=messages_pb2.DataContract(
            name=spec.data.name,
            columns=messages_pb2.Columns(
                text=spec.data.text,
                text_pair=spec.data.text_pair,
                label=spec.data.label,
                input=spec.data.input,
                target=spec.data.target,
                chat=spec.data.chat,
            ),
            max_length=spec.data.max_length,
            max_target_length=spec.data.max_target_length if spec.task.kind == "seq2seq-lm" else 0,
            truncation=spec.data.truncation,
            mask_prompt=bool(spec.data.mask_prompt),
        ),
        dtype=spec.model.dtype,
        gradient_checkpointing=spec.training.gradient_checkpointing,
        evaluation_rows=spec.evaluation.max_rows,
        metric=spec.evaluation.metric or "",
    )
