"""What a device computes, as frozen facts of ours instead of a protobuf message."""

from __future__ import annotations

from dataclasses import dataclass

from fleetune.errors import ModelError, UnsupportedError
from fleetune.v1 import messages_pb2

CLASSIFICATION = "text-classification"
CAUSAL_LM = "causal-lm"
SEQ2SEQ_LM = "seq2seq-lm"

_TASK_WORDS: dict[int, str] = {
    int(messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION): CLASSIFICATION,
    int(messages_pb2.MODEL_TASK_CAUSAL_LM): CAUSAL_LM,
    int(messages_pb2.MODEL_TASK_SEQ2SEQ_LM): SEQ2SEQ_LM,
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRUNCATION_SIDES = ("right", "left")
DEFAULT_MAX_LENGTH_TOKENS = 128


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2021): W + alpha / rank * B A on every module whose name ends in one of `targets`."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a row; empty where the rows have no such column."""

    text: str = ""
    text_pair: str = ""
    label: str = ""
    input: str = ""
    target: str = ""
    chat: str = ""

    def named(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(name for name in (self.text, self.text_pair, self.label, self.input, self.target, self.chat) if name)


@dataclass(frozen=True)
class DataContract:
    """What rows look like and how they become tokens."""

    name: str
    columns: Columns
    max_length_tokens: int
    max_target_length_tokens: int
    truncation_side: str
    mask_prompt: bool


@dataclass(frozen=True)
class Recipe:
    """The same for all devices of a job."""

    model_task: str
    labels: tuple[str, ...]
    lora: Lora | None
    """None: whole layers are trained, in their own weights."""
    data: DataContract
    dtype: str
    gradient_checkpointing: bool
    evaluation_rows: int
    metric: str


def from_proto(message: messages_pb2.Recipe) -> Recipe:
    """The recipe as frozen facts, with the defaults for what is unset.

    Raises ModelError for an unusable LoRA, dtype or label list and UnsupportedError for a task of a newer protocol.
    """
    task_number = int(message.model_task)
    if task_number not in _TASK_WORDS:
        raise UnsupportedError(
            f"The recipe's model task number {task_number} is not known here; known: {', '.join(_TASK_WORDS.values())}.",
            "Update Fleetune on this machine.",
        )
    model_task = _TASK_WORDS[task_number]
    labels = tuple(message.labels)
    if model_task == CLASSIFICATION and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise ModelError(
            f"The job's label list {list(labels)} cannot be used: text-classification needs at least two different labels.",
            "Correct `labels` in the job.",
        )
    dtype = message.dtype or "auto"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; allowed: {', '.join(DTYPES)}.", "Correct `dtype` in the job.")
    if not message.HasField("lora"):
        if dtype not in ("auto", "float32"):
            raise ModelError(
                f"dtype {dtype!r} cannot be used where whole layers are trained; allowed: float32.", "Correct `dtype` in the job."
            )
        dtype = "float32"
    data = message.data
    max_length = int(data.max_length) or DEFAULT_MAX_LENGTH_TOKENS
    side = data.truncation or "right"
    if side not in TRUNCATION_SIDES:
        raise ModelError(f"truncation {side!r} is not known; allowed: right, left.", "Correct `truncation` in the job.")
    return Recipe(
        model_task=model_task,
        labels=labels,
        lora=_lora(message.lora) if message.HasField("lora") else None,
        data=DataContract(
            name=data.name,
            columns=_columns(data.columns, model_task),
            max_length_tokens=max_length,
            max_target_length_tokens=int(data.max_target_length) or max_length,
            truncation_side=side,
            mask_prompt=bool(data.mask_prompt),
        ),
        dtype=dtype,
        gradient_checkpointing=bool(message.gradient_checkpointing),
        evaluation_rows=int(message.evaluation_rows),
        metric=message.metric or ("accuracy" if model_task == CLASSIFICATION else "loss"),
    )


def _lora(message: messages_pb2.Lora) -> Lora:
    if message.rank < 1:
        raise ModelError(f"LoRA rank {message.rank} cannot be used; allowed: 1 or more.", "Correct `rank` in the job.")
    if not 0.0 <= message.dropout < 1.0:
        raise ModelError(
            f"LoRA dropout {message.dropout} cannot be used; allowed: 0 up to, not including, 1.", "Correct `dropout` in the job."
        )
    return Lora(int(message.rank), float(message.alpha) or 2.0 * message.rank, float(message.dropout), tuple(message.targets))


def _columns(message: messages_pb2.Columns, model_task: str) -> Columns:
    columns = Columns(message.text, message.text_pair, message.label, message.input, message.target, message.chat)
    if columns.named():
        return columns
    if model_task == CLASSIFICATION:
        return Columns(text="text", label="label")
    if model_task == SEQ2SEQ_LM:
        return Columns(input="input", target="target")
    return Columns(text="text")
