"""What a job file may hold: one frozen model per section, one row per field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ModelTaskName = Literal["text-classification", "causal-lm", "seq2seq-lm"]
MethodName = Literal["fedavg_lora", "deft", "auto", "fedspine", "fedara", "echo"]
LayoutName = Literal["blocks", "depth", "data-parallel", "single", "auto"]
PlanSolver = Literal["exact", "crunch-equal", "dual", "random-equal", "greedy-equal"]
Payload = Literal["gradients", "deltas"]
Trains = Literal["lora", "full"]
SharedResource = Literal["ingress", "airtime"]
Sharing = Literal["weights", "hard"]
AggregationName = Literal["exact", "fedit", "zero-pad", "flexlora", "flora", "fedex", "ffa", "rolora", "fedsa"]
WITH_REST: frozenset[AggregationName | None] = frozenset({"flora", "fedex"})
"""Whose states have directions that no device trains."""

ImportanceChoice = Literal["fleet", "own"]
ArmChoice = Literal["bandit", "fixed"]
Arbitration = Literal["score", "vote"]
ServerOptimizer = Literal["none", "fedavgm", "fedadam", "fedyogi"]
EvaluationSource = Literal["devices", "heldout", "none"]
MetricName = Literal["accuracy", "macro_f1", "loss"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Names become folder names, keys in every device's configuration and arguments on command lines."""

COLUMN_CHARACTERS_MAX = 128
LABELS_MAX = 10_000

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_max_length=4096, hide_input_in_errors=True)

NAME_WORDS = "1 to 63 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"


@dataclass(frozen=True)
class Words:
    """Beside a type: what it allows, for a person."""

    words: str


Name = Annotated[str, Field(pattern=NAME_PATTERN), Words(NAME_WORDS)]
Column = Annotated[str, Field(max_length=COLUMN_CHARACTERS_MAX)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
# TOML arrays arrive as lists; only the outer type is lax, the items stay strict.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


RANK_MAX = 1024
# A table of the file; the order is kept.
Ranks = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=128)], Annotated[int, Field(ge=1, le=RANK_MAX)]], Field(max_length=256)
]


class Section(BaseModel):
    """A section of the file. Every field has a default, so that one mistake never hides another; rules say what is required."""

    model_config = _STRICT


class ModelSection(Section):
    base: str = Field(
        default="",
        description='Pretrained model: a Hugging Face id such as "org/name", or an absolute folder on the coordinator\'s machine.',
    )
    revision: str = Field(
        default="",
        max_length=128,
        description="Commit hash, tag or branch of a hub id; empty takes the hub's default branch. Not for folders.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the frozen weights on the device; auto takes what the accelerator is good at."
    )
    allow_hub: bool = Field(
        default=True, description="Whether the coordinator may ask the hub for the model; without it, base has to be a folder."
    )


class TaskSection(Section):
    kind: ModelTaskName | None = Field(default=None, description="What the model learns to do.")
    labels: Texts = Field(
        default=(),
        max_length=LABELS_MAX,
        description="Class names in id order. They stand here because a device may lack some classes. Classification only.",
    )


class LoraSection(Section):
    rank: int = Field(
        default=8,
        ge=1,
        le=RANK_MAX,
        description="Rank of the two small matrices beside each target; the highest that any device trains, see method.ranks.",
    )
    alpha: float = Field(default=16.0, gt=0, le=100_000, description="Scale: the adapter's product is multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Chance that an input element of the adapter is dropped while training.")
    targets: Texts = Field(
        default=(),
        max_length=256,
        description="Module name endings that get an adapter, such as \"query\"; empty takes PEFT's choice for the model's architecture.",
    )
    init_adapter: str = Field(
        default="", description="Start from this adapter instead of a fresh one: an absolute PEFT folder on the coordinator, or a job id."
    )


class DataSection(Section):
    name: Name | Literal[""] = Field(
        default="", description="Name of the data; each device's own configuration says where its rows of that name lie."
    )
    text: Column = Field(default="", description="Column with the text.")
    text_pair: Column = Field(default="", description="Column with a second text, for sentence pairs. Classification only.")
    label: Column = Field(
        default="", description="Column with the class, as a name from task.labels or as an index into it. Classification only."
    )
    input: Column = Field(default="", description="Column with the prompt or source text.")
    target: Column = Field(default="", description="Column with the answer or target text.")
    chat: Column = Field(
        default="",
        description="Column with a list of {role, content} messages, written with the tokenizer's chat template. causal-lm only.",
    )
    max_length: int = Field(
        default=128, ge=2, le=131_072, description="Longest sequence; what is longer is cut.", json_schema_extra={"unit": "tokens"}
    )
    max_target_length: int = Field(
        default=128, ge=2, le=131_072, description="Longest target. seq2seq-lm only.", json_schema_extra={"unit": "tokens"}
    )
    truncation: Literal["right", "left"] = Field(default="right", description="The side that is cut off.")
    mask_prompt: bool | None = Field(
        default=None, description="Compute the loss on the answer only. causal-lm with input and target, or chat."
    )


class TrainingSection(Section):
    steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Optimiser steps of a device in a round; 0 goes by epochs. deft's gradients are of one step.",
        json_schema_extra={"unit": "steps"},
    )
    epochs: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Passes of a device over its rows in a round; 0 goes by steps.",
        json_schema_extra={"unit": "passes"},
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="Rows of one optimiser step, before accumulation; a device short of memory splits them.",
        json_schema_extra={"unit": "rows"},
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Batches of one optimiser step.", json_schema_extra={"unit": "batches"}
    )
    gradient_checkpointing: bool = Field(default=False, description="Save memory at the price of a second forward pass.")
    learning_rate: float = Field(
        default=0.001, gt=0, le=10, description="AdamW's peak rate. The optimiser starts anew each round, but for deft's gradients."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the rate falls over the steps of all rounds."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="The rate rises from 0 over this many steps, counted over all rounds.",
        json_schema_extra={"unit": "steps"},
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Longer gradients are scaled down to this norm; 0 leaves them."
    )


class MethodSection(Section):
    name: MethodName = Field(
        default="fedavg_lora",
        description="Who trains what and how updates are folded. deft plans each round from what devices and links have shown; auto is "
        "deft with layout auto. fedspine prunes the model while it is tuned; fedara the adapters. echo is a link test that needs no model, "
        "task, lora, data or training.",
    )
    layout: LayoutName = Field(
        default="blocks",
        description="deft: who trains what. blocks gives each device one block of neighbouring layers; depth everything from the loss down "
        "to a depth of its own; data-parallel everything to each device that holds it; single everything to the one that is fastest. auto "
        "takes the one that is predicted to take least time for a row's full gradient, anew each round.",
    )
    solver: PlanSolver = Field(
        default="exact", description="deft in blocks: how blocks and shares of the uplink are found. All but exact are for comparison."
    )
    payload: Payload = Field(
        default="gradients",
        description="deft: what devices send. For gradients the coordinator holds AdamW and a round is one of its steps; deltas are "
        "the way of training.steps local ones.",
    )
    trains: Trains = Field(
        default="lora", description="deft: adapters beside the frozen layers, or the layers' own weights, without adapters."
    )
    layers_per_block: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="deft in blocks or depth: neighbouring layers that are given to a device as one.",
        json_schema_extra={"unit": "layers"},
    )
    resource: SharedResource = Field(
        default="ingress",
        description="deft: what uploads share. ingress is a bandwidth of the coordinator, as with devices on separate links; airtime is "
        "one radio channel, on which a device that sends a half of the time gets a half of its own rate.",
    )
    uplink_mbps: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="deft with resource ingress: what all uploads of a round may take together; 0 leaves each device its own rate.",
        json_schema_extra={"unit": "Mbit/s"},
    )
    sharing: Sharing = Field(
        default="weights",
        description="deft: weights gives those who send what others do not use at the time, in proportion to their shares; hard holds each "
        "device to its share, as the paper does.",
    )
    rotate_rounds: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="deft in blocks: a device does not get a block that it had in this many rounds before, where another can take it; for "
        "devices with unlike data.",
        json_schema_extra={"unit": "rounds"},
    )
    deadline_factor: float = Field(
        default=1.5,
        ge=0,
        le=1000,
        description="deft: devices that are not done after this many times the predicted round are not waited for; 0 waits as long as "
        "rounds.deadline_s does.",
    )
    spares: bool = Field(
        default=True, description="deft: whether an idle device takes over from one that has failed, where it can still be in time."
    )
    aggregation: AggregationName | None = Field(
        default=None,
        description="fedavg_lora: how the pairs of many devices become one. exact is the mean of their products, cut to lora.rank by an "
        "SVD; fedit the mean of each matrix by itself; zero-pad that of HetLoRA, weighted by norms; flexlora the exact mean with "
        "orthonormal A; flora gathers the exact mean in further directions and begins each round with a fresh pair; fedex goes on with the "
        "means of both matrices and gathers there what these are wrong by; ffa trains B alone; rolora B and A in turn; fedsa averages A "
        "alone, and B and head stay on each device.",
    )
    residual_rank: int = Field(
        default=64,
        ge=1,
        le=RANK_MAX,
        description="fedavg_lora with flora or fedex: directions that the state has past lora.rank, which devices add to their frozen "
        "weights for the time of a round. From the smaller side of a weight on nothing is lost; truncation_error tells what is.",
    )
    ranks: Annotated[Ranks, Words("a table of device name patterns and ranks")] = Field(
        default={},
        description='fedavg_lora: ranks below lora.rank for devices by name, for example { "pi4-*" = 4, "*" = 8 }. The first pattern '
        "that fits holds; * stands for any characters, ? for one.",
    )
    sparsity: float = Field(
        default=0.5,
        gt=0,
        le=0.9,
        description="fedspine: the share of attention heads and feed-forward neurons that is cut in the end.",
        json_schema_extra={"unit": "fraction"},
    )
    prune_every: int = Field(
        default=20, ge=1, le=10_000, description="fedspine: local steps after each cut.", json_schema_extra={"unit": "steps"}
    )
    prune_step: float = Field(
        default=0.1, gt=0, le=0.9, description="fedspine: what one round may cut at the most.", json_schema_extra={"unit": "fraction"}
    )
    warm_rounds: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="fedspine: the job's first rounds, in which nothing is cut. Where importance is the fleet's there is always one.",
        json_schema_extra={"unit": "rounds"},
    )
    recovery_rounds: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="fedspine: the job's last rounds, before which the sparsity is to be reached.",
        json_schema_extra={"unit": "rounds"},
    )
    arms: ArmChoice = Field(
        default="bandit",
        description="fedspine: who chooses each device's pace and rank. bandit learns them from how the loss falls and how long the device "
        "takes beside the others; fixed takes pace and lora.rank for all.",
    )
    pace: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="fedspine with fixed arms: the share of what a round may cut that it does cut.",
        json_schema_extra={"unit": "fraction"},
    )
    rank_min: int = Field(
        default=0, ge=0, le=RANK_MAX, description="fedspine with a bandit: the lowest rank; lora.rank is the highest, 0 is half of it."
    )
    exploration: float = Field(
        default=0.1, ge=0, le=10, description="fedspine: how much the bandit tries what it knows little of; rewards lie between 0 and 1."
    )
    importance: ImportanceChoice = Field(
        default="fleet",
        description="fedspine: by whose gradients heads and neurons are cut. fleet: devices tell theirs, and what matters least to all "
        "goes; nothing is cut in the first round. own: each device cuts what matters least to itself.",
    )
    importance_decay: float = Field(
        default=0.9, ge=0, lt=1, description="fedspine: decay of the moving average of importance over local steps."
    )
    probe_rows: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="fedspine: rows of its own on which a device measures its loss before and after a round.",
        json_schema_extra={"unit": "rows"},
    )
    ranks_end: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="fedara: the share of all ranks that is left in the end; lora.rank is what every module begins with.",
        json_schema_extra={"unit": "fraction"},
    )
    warm_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="fedara: the share of the rounds before any rank goes.",
        json_schema_extra={"unit": "fraction"},
    )
    final_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="fedara: the share of the rounds, the last ones, in which no rank goes any more.",
        json_schema_extra={"unit": "fraction"},
    )
    arbitration: Arbitration = Field(
        default="score",
        description="fedara: which ranks stay. score keeps those whose mean score over the devices is highest; vote those that enough "
        "devices have among their own best.",
    )
    vote_threshold: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="fedara with arbitration by vote: the share of the devices' rows that a rank must have behind it to come first.",
        json_schema_extra={"unit": "fraction"},
    )
    orthogonality: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="fedara: strength of the penalty on adapters whose ranks say the same as each other; AdaLoRA's usual is 0.1 to 0.5.",
    )
    proximal_mu: float = Field(
        default=0.0, ge=0, le=1000, description="FedProx: strength of the pull back to the round's global state; 0 is plain FedAvg."
    )
    server_optimizer: ServerOptimizer = Field(
        default="none", description="How the coordinator applies the mean update; none adds it as it is."
    )
    server_learning_rate: float | None = Field(default=None, gt=0, le=100, description="Rate of the server optimiser.")
    server_momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of fedavgm.")
    server_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="First-moment decay of fedadam and fedyogi, and of the coordinator's AdamW in deft."
    )
    server_beta2: float | None = Field(
        default=None, ge=0, lt=1, description="Second-moment decay of fedadam and fedyogi, and of the coordinator's AdamW in deft."
    )
    server_epsilon: float = Field(
        default=1e-8, gt=0, le=1, description="Added to the root of the second moment of the coordinator's AdamW in deft."
    )
    server_tau: float = Field(
        default=0.001, gt=0, le=1, description="Adaptivity floor added to the root of the second moment of fedadam and fedyogi."
    )
    update_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of the updates on the wire; the halves halve the upload."
    )
    state_mib: float = Field(
        default=1.0, gt=0, le=2048, description="Size of the state that echo moves.", json_schema_extra={"unit": "MiB"}
    )

    @property
    def uncut_rounds(self) -> int:
        """The first rounds in which fedspine cuts nothing: what matters to the fleet is known after one."""
        return max(self.warm_rounds, 1 if self.importance == "fleet" else 0)


class RoundsSection(Section):
    count: int = Field(default=10, ge=1, le=100_000, description="Rounds at the most.", json_schema_extra={"unit": "rounds"})
    deadline_s: float = Field(
        default=0.0,
        ge=0,
        le=2_592_000,
        description="A round waits this long for its devices, then closes without the rest; 0 waits while they live.",
        json_schema_extra={"unit": "seconds"},
    )
    quorum: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Part of the asked devices that must have delivered for a round to count.",
        json_schema_extra={"unit": "fraction"},
    )
    early_stop_patience: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="End after this many evaluations without a better metric; 0 never ends early.",
        json_schema_extra={"unit": "evaluations"},
    )
    early_stop_min_delta: float = Field(
        default=0.0, ge=0, le=1000, description="A metric is better only if it is better by more than this."
    )
    update_norm_bound: float = Field(
        default=10.0,
        ge=0,
        le=1_000_000,
        description="A device's update may be this many times as large (Euclidean norm) as the median of the last three committed rounds, "
        "in deft of those over the same blocks; a larger one is refused, and the third quarantines its device for the job. 0 allows any "
        "size, as deft does for gradients.",
    )


class DevicesSection(Section):
    minimum: int = Field(
        default=1, ge=1, le=100_000, description="Devices that must be ready before a round begins.", json_schema_extra={"unit": "devices"}
    )
    per_round: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Devices asked in each round, drawn by the job's seed; 0 asks all that are ready.",
        json_schema_extra={"unit": "devices"},
    )
    tags: Texts = Field(default=(), max_length=64, description="Only devices that carry all of these tags.")
    wait_s: float = Field(
        default=0.0,
        ge=0,
        le=2_592_000,
        description="Give the job up when too few devices were ready for this long; 0 waits for ever.",
        json_schema_extra={"unit": "seconds"},
    )
    keep_warm_s: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="A device keeps the model loaded this long after a task; its own setting may lower it.",
        json_schema_extra={"unit": "seconds"},
    )


class EvaluationSection(Section):
    source: EvaluationSource = Field(
        default="devices",
        description="Whose rows measure a round: each device's validation rows, a held-out file on the coordinator, or nobody's.",
    )
    every: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="Evaluate after every so many rounds, and after the last.",
        json_schema_extra={"unit": "rounds"},
    )
    heldout: str = Field(default="", description="Absolute path of a JSONL file on the coordinator's machine, for source heldout.")
    metric: MetricName | None = Field(default=None, description="What the best round and the early stop go by.")
    max_rows: int = Field(
        default=0,
        ge=0,
        le=100_000_000,
        description="Rows measured at the most, on each device or of the held-out file; 0 is all.",
        json_schema_extra={"unit": "rows"},
    )


class JobSpec(Section):
    """A whole job file. What `jobspec.parse` returns is complete: settings that depend on others are filled in."""

    name: Name | Literal[""] = Field(default="", description="What people call the job.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Seeds the initial adapter, the choice of devices, shuffling and dropout.")
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    method: MethodSection = MethodSection()
    rounds: RoundsSection = RoundsSection()
    devices: DevicesSection = DevicesSection()
    evaluation: EvaluationSection = EvaluationSection()
