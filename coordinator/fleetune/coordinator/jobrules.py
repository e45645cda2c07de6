"""What holds between the settings of a job file: which are required, which exclude each other, which follow from others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fleetune.complaints import Complaint, shown
from fleetune.coordinator.jobsections import (
    NAME_WORDS,
    WITH_REST,
    ArmChoice,
    DataSection,
    EvaluationSection,
    JobSpec,
    LoraSection,
    MethodSection,
    ModelSection,
    TaskSection,
    TrainingSection,
)

HUB_ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?$")
JOB_ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")

_COLUMNS = ("text", "text_pair", "label", "input", "target", "chat")
_COLUMN_SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text-classification": (("text", "label"), ("text", "text_pair", "label")),
    "causal-lm": (("text",), ("input", "target"), ("chat",)),
    "seq2seq-lm": (("input", "target"),),
}
_SERVER_SETTINGS: dict[str, tuple[str, ...]] = {
    "server_learning_rate": ("fedavgm", "fedadam", "fedyogi"),
    "server_momentum": ("fedavgm",),
    "server_beta1": ("fedadam", "fedyogi"),
    "server_beta2": ("fedadam", "fedyogi"),
    "server_tau": ("fedadam", "fedyogi"),
}
_SERVER_LEARNING_RATE = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}
_LAYOUTS_OF: dict[str, tuple[str, ...]] = {
    "solver": ("blocks", "auto"),
    "layers_per_block": ("blocks", "depth", "auto"),
    "rotate_rounds": ("blocks", "auto"),
}
"""Settings of deft that only some layouts have a use for."""

_ARMS_OF: dict[str, ArmChoice] = {"pace": "fixed", "rank_min": "bandit", "exploration": "bandit"}
"""Settings of fedspine that only one way to choose arms has a use for."""

CUTS_PER_ROUND = 3
"""Of fedspine, where a job does not say how many steps a round has."""

_METHODS_OF: dict[str, tuple[str, ...]] = {
    "layout": ("deft",),
    "solver": ("deft",),
    "payload": ("deft",),
    "trains": ("deft",),
    "layers_per_block": ("deft",),
    "resource": ("deft",),
    "uplink_mbps": ("deft",),
    "sharing": ("deft",),
    "rotate_rounds": ("deft",),
    "deadline_factor": ("deft",),
    "spares": ("deft",),
    "aggregation": ("fedavg_lora",),
    "ranks": ("fedavg_lora",),
    "residual_rank": ("fedavg_lora",),
    "sparsity": ("fedspine",),
    "prune_every": ("fedspine",),
    "prune_step": ("fedspine",),
    "warm_rounds": ("fedspine",),
    "recovery_rounds": ("fedspine",),
    "arms": ("fedspine",),
    "pace": ("fedspine",),
    "rank_min": ("fedspine",),
    "exploration": ("fedspine",),
    "importance": ("fedspine",),
    "importance_decay": ("fedspine",),
    "probe_rows": ("fedspine",),
    "ranks_end": ("fedara",),
    "warm_share": ("fedara",),
    "final_share": ("fedara",),
    "arbitration": ("fedara",),
    "vote_threshold": ("fedara",),
    "orthogonality": ("fedara",),
    "proximal_mu": ("fedavg_lora",),
    "server_optimizer": ("fedavg_lora",),
    "server_learning_rate": ("fedavg_lora",),
    "server_momentum": ("fedavg_lora",),
    "server_beta1": ("fedavg_lora", "deft"),
    "server_beta2": ("fedavg_lora", "deft"),
    "server_epsilon": ("deft",),
    "server_tau": ("fedavg_lora",),
    "update_dtype": ("fedavg_lora", "deft", "fedspine", "fedara"),
    "state_mib": ("echo",),
}
"""The methods that have a use for a setting of [method]."""


@dataclass(frozen=True)
class Draft:
    """A job whose settings are right one by one. `given` are the paths that the file sets, `wrong` those already complained about."""

    spec: JobSpec
    given: frozenset[str]
    wrong: frozenset[str]

    def sets(self, path: str) -> bool:
        return path in self.given

    def sound(self, *paths: str) -> bool:
        """Whether nothing is wrong yet with these paths or with their sections: a rule about them would only repeat it."""
        return not any(path in self.wrong or path.partition(".")[0] in self.wrong for path in paths)


def complaints(draft: Draft) -> list[Complaint]:
    """Every broken rule, in the order of the file."""
    return [complaint for rule in _RULES for complaint in rule(draft)]


def completed(spec: JobSpec) -> JobSpec:
    """The job with every setting filled in that follows from others. Takes a job that breaks no rule."""
    if spec.method.name == "echo":
        return spec.model_copy(
            update={
                "model": ModelSection(),
                "task": TaskSection(),
                "lora": LoraSection(),
                "data": DataSection(),
                "training": TrainingSection(),
                "evaluation": EvaluationSection(source="none"),
            }
        )
    training, method = spec.training, _completed_method(spec)
    if not training.steps and not training.epochs:
        steps = {"deft": 1, "fedspine": CUTS_PER_ROUND * method.prune_every}.get(method.name, 0)
        training = training.model_copy(update={"steps": steps} if steps else {"epochs": 1.0})
    metric = spec.evaluation.metric or ("accuracy" if spec.task.kind == "text-classification" else "loss")
    return spec.model_copy(
        update={
            "data": _completed_data(spec),
            "training": training,
            "method": method,
            "evaluation": spec.evaluation.model_copy(update={"metric": metric}),
        }
    )


def _completed_method(spec: JobSpec) -> MethodSection:
    method = spec.method
    update: dict[str, object] = {}
    if method.name == "auto":
        update |= {"name": "deft", "layout": "auto"}
    if method.aggregation is None:
        # With equal ranks the plain means of federated averaging, which a server optimiser can follow.
        update["aggregation"] = "exact" if method.ranks else "fedit"
    if method.server_learning_rate is None:
        update["server_learning_rate"] = _SERVER_LEARNING_RATE.get(method.server_optimizer, 1.0)
    if method.server_beta2 is None:
        update["server_beta2"] = 0.999 if is_deft(spec) else 0.99
    return method.model_copy(update=update)


def is_deft(spec: JobSpec) -> bool:
    """Whether the job's method is deft, under either of its names in a file."""
    return spec.method.name in ("deft", "auto")


def is_folder(base: str) -> bool:
    """Whether a base or an adapter is named by its folder; hub ids and job ids never look like one."""
    return base.startswith(("/", "~", "./", "../", ".\\", "..\\")) or base in {".", ".."} or bool(re.match(r"^[A-Za-z]:[\\/]", base))


def _completed_data(spec: JobSpec) -> DataSection:
    data = spec.data
    update: dict[str, object] = {}
    if spec.task.kind == "text-classification":
        update = {"text": data.text or "text", "label": data.label or "label"}
    elif spec.task.kind == "seq2seq-lm":
        update = {"input": data.input or "input", "target": data.target or "target"}
    elif spec.task.kind == "causal-lm" and not any((data.text, data.input, data.target, data.chat)):
        update = {"text": "text"}
    has_prompt = spec.task.kind == "causal-lm" and bool(data.input or data.chat)
    update["mask_prompt"] = has_prompt if data.mask_prompt is None else data.mask_prompt
    return data.model_copy(update=update)


def _name(draft: Draft) -> Iterator[Complaint]:
    if not draft.spec.name and draft.sound("name"):
        yield Complaint("name", "", NAME_WORDS, 'Give the job a name, for example name = "my-first-job".')


def _model(draft: Draft) -> Iterator[Complaint]:
    model = draft.spec.model
    if not draft.sound("model.base"):
        return
    allowed = 'a Hugging Face id such as "org/name", or an absolute folder on the coordinator\'s machine'
    if not model.base:
        yield Complaint("model.base", "", allowed, "Name the pretrained model to start from.")
    elif is_folder(model.base):
        if not model.base.startswith(("/", "~")) and model.base[1:2] != ":":
            yield Complaint(
                "model.base", shown(model.base), allowed, "Write the folder with its full path: the coordinator may run elsewhere."
            )
        if model.revision and draft.sound("model.revision"):
            yield Complaint("model.revision", shown(model.revision), "nothing, for a folder", "Remove it: a folder has no revisions.")
    elif not HUB_ID_PATTERN.match(model.base) or ".." in model.base or "--" in model.base:
        yield Complaint("model.base", shown(model.base), allowed, "Correct the id, or write the folder with its full path.")


def _hub(draft: Draft) -> Iterator[Complaint]:
    model = draft.spec.model
    if model.base and not is_folder(model.base) and not model.allow_hub and draft.sound("model.base", "model.allow_hub"):
        yield Complaint(
            "model.allow_hub", "false", "true, for a hub id", "Allow the hub, or name in model.base the folder that holds the model."
        )


def _task(draft: Draft) -> Iterator[Complaint]:
    task = draft.spec.task
    if task.kind is None:
        if draft.sound("task.kind"):
            yield Complaint("task.kind", "", "text-classification, causal-lm, seq2seq-lm", "Say what the model is to learn, in [task].")
        return
    if not draft.sound("task.kind", "task.labels"):
        return
    if task.kind != "text-classification":
        if draft.sets("task.labels"):
            yield Complaint("task.labels", shown(task.labels), f"nothing, for {task.kind}", "Remove it: only classification has labels.")
        return
    if len(task.labels) < 2:
        found = shown(task.labels) if draft.sets("task.labels") else ""
        yield Complaint(
            "task.labels", found, "at least 2 different texts", "List all classes in id order, also those that some devices lack."
        )
    twice = _repeated(task.labels)
    if twice:
        yield Complaint("task.labels", shown(tuple(twice)), "at least 2 different texts", "Each label may stand once only.")


def _repeated(words: Iterable[str]) -> list[str]:
    return sorted(word for word, count in Counter(words).items() if count > 1)


def _lora(draft: Draft) -> Iterator[Complaint]:
    lora = draft.spec.lora
    if draft.sound("lora.targets"):
        twice = _repeated(lora.targets)
        if twice:
            yield Complaint("lora.targets", shown(tuple(twice)), "different module name endings", "Each target may stand once only.")
    start = lora.init_adapter
    if not start or not draft.sound("lora.init_adapter"):
        return
    allowed = "an absolute PEFT folder on the coordinator's machine, or a job id"
    if is_folder(start):
        if not start.startswith(("/", "~")) and start[1:2] != ":":
            yield Complaint(
                "lora.init_adapter", shown(start), allowed, "Write the folder with its full path: the coordinator may run elsewhere."
            )
    elif not JOB_ID_PATTERN.match(start):
        yield Complaint("lora.init_adapter", shown(start), allowed, "Take the id that `fleetune jobs` shows, or a full path.")


def _data(draft: Draft) -> Iterator[Complaint]:
    data = draft.spec.data
    if not data.name and draft.sound("data.name"):
        yield Complaint(
            "data.name", "", "a name under [data.NAME] in the devices' own configuration", "Name the data that the devices train on."
        )
    kind = draft.spec.task.kind
    if kind is None or not draft.sound("task.kind"):
        return
    yield from _column_set(draft, kind)
    if kind != "seq2seq-lm" and draft.sets("data.max_target_length") and draft.sound("data.max_target_length"):
        yield Complaint(
            "data.max_target_length",
            str(data.max_target_length),
            f"nothing, for {kind}",
            "Remove it: max_length bounds the whole sequence.",
        )
    if draft.sets("data.mask_prompt") and draft.sound("data.mask_prompt"):
        if kind != "causal-lm":
            yield Complaint(
                "data.mask_prompt", shown(data.mask_prompt), f"nothing, for {kind}", "Remove it: here the loss never covers the input."
            )
        elif data.mask_prompt and not (data.input or data.chat) and draft.sound("data.input", "data.chat"):
            yield Complaint(
                "data.mask_prompt",
                "true",
                "false, for rows of plain text",
                "Remove it, or name the columns data.input and data.target, or data.chat.",
            )


def _column_set(draft: Draft, kind: str) -> Iterator[Complaint]:
    """Complains about columns that the task has no use for, and about a set that is not one of those allowed."""
    data = draft.spec.data
    if not draft.sound(*(f"data.{name}" for name in _COLUMNS)):
        return
    sets = _COLUMN_SETS[kind]
    useful = {name for columns in sets for name in columns}
    allowed = "; or ".join(", ".join(f"data.{name}" for name in columns) for columns in sets)
    named = {name for name in _COLUMNS if getattr(data, name)}
    for name in _COLUMNS:
        if name in named and name not in useful:
            yield Complaint(f"data.{name}", shown(getattr(data, name)), allowed, f"Remove it: {kind} has no such column.")
        elif draft.sets(f"data.{name}") and name not in named:
            yield Complaint(f"data.{name}", '""', "the name of a column", "Name the column, or remove the line.")
    named &= useful
    if kind == "causal-lm" and named and named not in [set(columns) for columns in sets]:
        words = ", ".join(f"data.{name}" for name in _COLUMNS if name in named)
        yield Complaint("data", words, allowed, "Name the columns of exactly one kind of row.")
    columns = [getattr(data, name) for name in named]
    if len(set(columns)) < len(columns):
        yield Complaint(
            "data", ", ".join(shown(column) for column in sorted(columns)), "different columns", "Two settings name the same column."
        )


def _training(draft: Draft) -> Iterator[Complaint]:
    training = draft.spec.training
    if not draft.sound("training.steps", "training.epochs"):
        return
    if is_deft(draft.spec):
        yield from _training_of_deft(draft)
        return
    if training.steps and training.epochs:
        yield Complaint("training.epochs", str(training.epochs), "either training.steps or training.epochs", "Remove one of the two.")
    elif not training.steps and not training.epochs:
        for name in ("steps", "epochs"):
            if draft.sets(f"training.{name}") and not draft.sets("training.steps" if name == "epochs" else "training.epochs"):
                yield Complaint(
                    f"training.{name}", shown(getattr(training, name)), "more than 0", "Say how long a device trains in a round."
                )
        if draft.sets("training.steps") and draft.sets("training.epochs"):
            yield Complaint("training.steps", "0", "more than 0 for one of steps and epochs", "Say how long a device trains in a round.")


def _training_of_deft(draft: Draft) -> Iterator[Complaint]:
    training = draft.spec.training
    if not draft.sound("method.payload"):
        return
    gradients = draft.spec.method.payload == "gradients"
    if draft.sets("training.epochs"):
        allowed = "nothing, for deft" + ("'s gradients" if gradients else "")
        remedy = "Remove it: a round is one step." if gradients else "Remove it, and set training.steps: rounds are planned in steps."
        yield Complaint("training.epochs", str(training.epochs), allowed, remedy)
    elif gradients and training.steps != 1 and draft.sets("training.steps"):
        remedy = 'Remove it: a round is one step of the coordinator\'s; for several local ones set method.payload = "deltas".'
        yield Complaint("training.steps", str(training.steps), "1, for deft's gradients", remedy)
    elif not gradients and not training.steps:
        found = "0" if draft.sets("training.steps") else ""
        yield Complaint("training.steps", found, "1 to 1000000", "Say how many local steps a device takes in a round.")


def _method(draft: Draft) -> Iterator[Complaint]:
    method = draft.spec.method
    if not draft.sound("method.name"):
        return
    name = "deft" if is_deft(draft.spec) else method.name
    for setting, methods in _METHODS_OF.items():
        path = f"method.{setting}"
        if name not in methods and draft.sets(path) and draft.sound(path):
            remedy = f"Remove it: only {' and '.join(methods)} {'have' if len(methods) > 1 else 'has'} a use for it."
            yield Complaint(path, shown(getattr(method, setting)), f"nothing, for {name}", remedy)
    if name == "deft":
        yield from _deft(draft)
    elif name == "fedspine":
        yield from _fedspine(draft)
    elif name == "fedara":
        yield from _fedara(draft)
    elif name == "fedavg_lora" and draft.sound("method.server_optimizer"):
        yield from _aggregation(draft)
        for setting, optimizers in _SERVER_SETTINGS.items():
            path = f"method.{setting}"
            if draft.sets(path) and draft.sound(path) and method.server_optimizer not in optimizers:
                yield Complaint(
                    path,
                    shown(getattr(method, setting)),
                    f"nothing, for server_optimizer = {shown(method.server_optimizer)}",
                    f"Remove it, or set method.server_optimizer to {' or '.join(optimizers)}.",
                )


def _aggregation(draft: Draft) -> Iterator[Complaint]:
    method, rank = draft.spec.method, draft.spec.lora.rank
    if not draft.sound("method.aggregation", "method.ranks", "lora.rank"):
        return
    if large := {pattern: found for pattern, found in method.ranks.items() if found > rank}:
        remedy = "Raise lora.rank, which is the highest, or lower these."
        yield Complaint("method.ranks", shown(next(iter(large.values()))), f"1 to {rank}, which is lora.rank", remedy)
    patterns = list(method.ranks)
    if "*" in patterns[:-1]:
        remedy = 'Put "*" last: the first pattern that fits holds.'
        yield Complaint("method.ranks", shown(patterns[patterns.index("*") + 1]), 'patterns before "*"', remedy)
    yield from _fedsa(draft)
    yield from _rest(draft)
    if method.server_optimizer == "none":
        return
    remedy = "Remove it, or the server optimiser: its moments mean nothing once the directions of the pairs have been turned."
    if method.aggregation not in (None, "fedit"):
        yield Complaint("method.aggregation", shown(method.aggregation), "fedit, with a server optimiser", remedy)
    elif method.ranks:
        yield Complaint("method.ranks", shown(next(iter(method.ranks))), "nothing, with a server optimiser", remedy)


def _fedsa(draft: Draft) -> Iterator[Complaint]:
    """What each device has of the model is known to nobody else."""
    spec, method = draft.spec, draft.spec.method
    if method.aggregation != "fedsa":
        return
    if method.ranks:
        remedy = "Remove it: the directions of A are the devices' common ones, and each B has all of them."
        yield Complaint("method.ranks", shown(next(iter(method.ranks))), "nothing, with aggregation = fedsa", remedy)
    if draft.sound("evaluation.source") and spec.evaluation.source == "heldout":
        remedy = "Set it to devices, each of which measures its own model, or choose another aggregation."
        yield Complaint("evaluation.source", "heldout", "devices or none, with aggregation = fedsa", remedy)


def _rest(draft: Draft) -> Iterator[Complaint]:
    """Of a state with directions that no device trains."""
    method, path = draft.spec.method, "method.residual_rank"
    if method.aggregation not in WITH_REST:
        if draft.sets(path) and draft.sound(path):
            found = shown(method.aggregation) if method.aggregation else "its default"
            remedy = 'Remove it, or set method.aggregation to "flora" or "fedex".'
            yield Complaint(path, shown(method.residual_rank), f"nothing, for aggregation = {found}", remedy)
    elif method.aggregation == "fedex" and method.ranks:
        remedy = 'Remove it: matrices of unlike ranks have no mean; or set method.aggregation = "flora" or "exact".'
        yield Complaint("method.ranks", shown(next(iter(method.ranks))), "nothing, with aggregation = fedex", remedy)


def _deft(draft: Draft) -> Iterator[Complaint]:
    spec, method = draft.spec, draft.spec.method
    if method.name == "auto" and draft.sets("method.layout") and method.layout != "auto" and draft.sound("method.layout"):
        remedy = 'Remove it, or set method.name = "deft", for which the layout can be chosen.'
        yield Complaint("method.layout", shown(method.layout), "auto, for method.name = auto", remedy)
    elif draft.sound("method.layout"):
        layout = "auto" if method.name == "auto" else method.layout
        for setting, layouts in _LAYOUTS_OF.items():
            path = f"method.{setting}"
            if layout not in layouts and draft.sets(path) and draft.sound(path):
                remedy = f"Remove it, or set method.layout to {' or '.join(layouts)}."
                yield Complaint(path, shown(getattr(method, setting)), f"nothing, for layout = {shown(layout)}", remedy)
    if draft.sound("method.payload") and method.payload == "deltas":
        for setting in ("server_beta1", "server_beta2", "server_epsilon"):
            path = f"method.{setting}"
            if draft.sets(path) and draft.sound(path):
                remedy = 'Remove it: for deltas the coordinator has no optimiser; or set method.payload = "gradients".'
                yield Complaint(path, shown(getattr(method, setting)), 'nothing, for payload = "deltas"', remedy)
    bound = "rounds.update_norm_bound"
    if draft.sound("method.payload", bound) and method.payload == "gradients" and draft.sets(bound) and spec.rounds.update_norm_bound:
        remedy = "Remove it: honest gradients differ too much in size. training.max_grad_norm bounds what all of them do together."
        yield Complaint(bound, shown(spec.rounds.update_norm_bound), "0, for deft's gradients", remedy)
    shared = method.resource == "airtime" or method.uplink_mbps > 0
    if not shared and draft.sets("method.sharing") and draft.sound("method.sharing", "method.resource", "method.uplink_mbps"):
        remedy = 'Remove it, or say what uploads share: method.uplink_mbps, or method.resource = "airtime".'
        yield Complaint("method.sharing", shown(method.sharing), "nothing, where nothing is shared", remedy)
    if method.resource == "airtime" and method.uplink_mbps and draft.sound("method.resource", "method.uplink_mbps"):
        remedy = 'Remove it: the links\' own rates bound what a channel carries; or set method.resource = "ingress".'
        yield Complaint("method.uplink_mbps", shown(method.uplink_mbps), "0, for resource = airtime", remedy)
    if 0 < method.deadline_factor < 1 and draft.sound("method.deadline_factor"):
        remedy = "Below 1 every round would be cut short; 1.5 leaves room for what was not predicted."
        yield Complaint("method.deadline_factor", shown(method.deadline_factor), "0, or 1 to 1000", remedy)
    if method.trains == "full" and draft.sound("method.trains"):
        for setting in LoraSection.model_fields:
            path = f"lora.{setting}"
            if draft.sets(path) and draft.sound(path):
                remedy = 'Remove it: without adapters nothing has a use for it; or set method.trains = "lora".'
                yield Complaint(path, shown(getattr(spec.lora, setting)), 'nothing, for trains = "full"', remedy)


def _fedspine(draft: Draft) -> Iterator[Complaint]:
    spec, method, training = draft.spec, draft.spec.method, draft.spec.training
    for setting, choice in _ARMS_OF.items():
        path = f"method.{setting}"
        if draft.sets(path) and draft.sound(path, "method.arms") and method.arms != choice:
            remedy = f'Remove it, or set method.arms = "{choice}".'
            yield Complaint(path, shown(getattr(method, setting)), f"nothing, for arms = {shown(method.arms)}", remedy)
    if draft.sound("lora.targets") and not spec.lora.targets:
        remedy = (
            "Name every linear layer of a block, since a head or neuron is judged by the gradients of the pairs beside it; for BERT "
            '["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"], for LLaMA and Qwen '
            '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], for T5 ["q", "k", "v", "o", "wi", "wo"].'
        )
        yield Complaint("lora.targets", "", "all linear layers of the model's blocks", remedy)
    if draft.sound("training.epochs") and training.epochs:
        yield Complaint(
            "training.epochs", shown(training.epochs), "0, for fedspine", "Set training.steps: cuts are counted in local steps."
        )
    if draft.sound("training.steps", "method.prune_every") and 0 < training.steps < method.prune_every:
        remedy = "Raise it, or lower method.prune_every: a round without a cut would never reach the sparsity."
        yield Complaint("training.steps", shown(training.steps), f"at least {method.prune_every}, which is method.prune_every", remedy)
    if draft.sound("method.rank_min", "lora.rank") and method.arms == "bandit" and method.rank_min > spec.lora.rank:
        remedy = "Lower it, or raise lora.rank, which is the highest."
        yield Complaint("method.rank_min", shown(method.rank_min), f"0 to {spec.lora.rank}, which is lora.rank", remedy)
    paths = ("rounds.count", "method.sparsity", "method.prune_step", "method.warm_rounds", "method.recovery_rounds")
    needed = method.uncut_rounds + math.ceil(method.sparsity / method.prune_step - 1e-9) + method.recovery_rounds
    if draft.sound(*paths, "method.importance") and spec.rounds.count < needed:
        remedy = "Raise it, or method.prune_step, or lower method.sparsity, method.warm_rounds or method.recovery_rounds."
        yield Complaint("rounds.count", shown(spec.rounds.count), f"at least {needed}, to reach the sparsity before the recovery", remedy)


def _fedara(draft: Draft) -> Iterator[Complaint]:
    spec, method = draft.spec, draft.spec.method
    path = "method.vote_threshold"
    if draft.sets(path) and draft.sound(path, "method.arbitration") and method.arbitration != "vote":
        remedy = 'Remove it, or set method.arbitration = "vote".'
        yield Complaint(path, shown(method.vote_threshold), f"nothing, for arbitration = {shown(method.arbitration)}", remedy)
    if draft.sound("method.warm_share", "method.final_share") and method.warm_share + method.final_share > 1:
        given = "method.final_share" if draft.sets("method.final_share") else "method.warm_share"
        shares = {"method.final_share": method.final_share, "method.warm_share": method.warm_share}
        remedy = "Lower it, or the other of method.warm_share and method.final_share: together they are all rounds at the most."
        yield Complaint(given, shown(shares[given]), f"at most {1 - (sum(shares.values()) - shares[given]):g}", remedy)
    if spec.lora.init_adapter and draft.sound("lora.init_adapter"):
        remedy = "Remove it: an adapter that PEFT saves is a product of two, and which part of it are the values cannot be told."
        yield Complaint("lora.init_adapter", shown(spec.lora.init_adapter), "nothing, for fedara", remedy)


def _evaluation(draft: Draft) -> Iterator[Complaint]:
    evaluation = draft.spec.evaluation
    if draft.sound("evaluation.source", "evaluation.heldout"):
        if evaluation.source == "heldout" and not evaluation.heldout:
            yield Complaint(
                "evaluation.heldout", "", "an absolute path on the coordinator's machine", "Name the JSONL file with the held-out rows."
            )
        elif evaluation.source == "heldout" and not evaluation.heldout.startswith(("/", "~")) and evaluation.heldout[1:2] != ":":
            yield Complaint(
                "evaluation.heldout", shown(evaluation.heldout), "an absolute path on the coordinator's machine", "Write the full path."
            )
        elif evaluation.source != "heldout" and evaluation.heldout:
            yield Complaint(
                "evaluation.heldout",
                shown(evaluation.heldout),
                f"nothing, for source = {shown(evaluation.source)}",
                "Remove it, or set evaluation.source to heldout.",
            )
    kind = draft.spec.task.kind
    if (
        draft.sound("evaluation.metric", "task.kind")
        and kind in ("causal-lm", "seq2seq-lm")
        and evaluation.metric in ("accuracy", "macro_f1")
    ):
        yield Complaint(
            "evaluation.metric",
            shown(evaluation.metric),
            f"loss, for {kind}",
            "Remove it: only classification has classes to be right about.",
        )
    patience = draft.spec.rounds.early_stop_patience
    if patience and evaluation.source == "none" and draft.sound("rounds.early_stop_patience", "evaluation.source"):
        yield Complaint(
            "rounds.early_stop_patience", str(patience), "0 where nothing is evaluated", "Remove it, or choose an evaluation.source."
        )
    if (
        not patience
        and draft.sets("rounds.early_stop_min_delta")
        and draft.sound("rounds.early_stop_min_delta", "rounds.early_stop_patience")
    ):
        delta = draft.spec.rounds.early_stop_min_delta
        if delta:
            yield Complaint(
                "rounds.early_stop_min_delta", str(delta), "0 without early_stop_patience", "Set rounds.early_stop_patience, or remove it."
            )


def _for_models(rule: Callable[[Draft], Iterator[Complaint]]) -> Callable[[Draft], Iterator[Complaint]]:
    """The rule, for methods that have a model; echo ignores those sections, so that any job file can be tried as a link test."""

    def applied(draft: Draft) -> Iterator[Complaint]:
        if draft.spec.method.name != "echo":
            yield from rule(draft)

    return applied


_RULES: tuple[Callable[[Draft], Iterator[Complaint]], ...] = (
    _name,
    _for_models(_model),
    _for_models(_hub),
    _for_models(_task),
    _for_models(_lora),
    _for_models(_data),
    _for_models(_training),
    _method,
    _for_models(_evaluation),
)
