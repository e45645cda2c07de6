"""What a testbed works on, laid out in its folder: rows dealt to the devices, agents' settings, the base model, a job to begin with."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.demo import material as demo
from fleetune.coordinator.demo import split
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed.spec import DeviceSpec, TestbedSpec
from fleetune.errors import ConfigError, UnsupportedError

DATA_NAME = "testbed"
JOB_FILE = "job.toml"
ROUNDS = 8
STEPS = 6


@dataclass(frozen=True)
class Dealt:
    """What one device has."""

    device: str
    rows: int
    validation_rows: int
    labels: int


def data_folder(folder: Path, device: str) -> Path:
    return folder / "data" / device


def config_file(folder: Path, device: str) -> Path:
    """The device's agent.toml. It names neither coordinator nor state_dir: those are the backend's."""
    return folder / "config" / f"{device}.toml"


def lay_out(folder: Path, spec: TestbedSpec, data: Path | None) -> list[Dealt]:
    """Deals the rows and writes the devices' settings; `data` is a folder of train, validation and test rows, None the shipped one."""
    dealt = deal(folder, spec, data)
    (folder / "config").mkdir(exist_ok=True)
    for device in spec.devices:
        write(config_file(folder, device.name), _config(device))
    return dealt


def deal(folder: Path, spec: TestbedSpec, data: Path | None) -> list[Dealt]:
    """Writes DIR/data. What an earlier deal has left is replaced, file by file, in place: a container may have the folders mounted."""
    source = demo.SHIPPED_DATA if data is None else data.absolute()
    rows = {part: demo.read_rows(source / f"{part}.jsonl") for part in ("train", "validation", "test")}
    labels = demo.label_names(source, rows["train"])
    for part in rows:
        demo.check_labels(source / f"{part}.jsonl", rows[part], labels)
    for part in ("train", "validation"):
        if len(rows[part]) < len(spec.devices):
            raise ConfigError(
                f"{source / part}.jsonl has {len(rows[part])} rows for {len(spec.devices)} devices.", "Give more rows or fewer devices."
            )
    train, validation = _parts(spec, rows["train"], rows["validation"])
    dealt: list[Dealt] = []
    for device, own, own_validation in zip(spec.devices, train, validation, strict=True):
        home = data_folder(folder, device.name)
        home.mkdir(parents=True, exist_ok=True)
        kept = [rows["train"][index] for index in own]
        _write_rows(home / "train.jsonl", kept)
        _write_rows(home / "validation.jsonl", [rows["validation"][index] for index in own_validation])
        dealt.append(Dealt(device.name, len(own), len(own_validation), len(Counter(row["label"] for row in kept))))
    _write_rows(folder / "data" / "test.jsonl", rows["test"])
    write(folder / "data" / "labels.json", json.dumps(labels, ensure_ascii=False) + "\n")
    return dealt


def base_name(given: Path | None) -> str:
    """What the copy of the base model is called."""
    return "minilm" if given is None else given.absolute().name


def find_base(given: Path | None) -> Path | None:
    """The base model's folder; None where none was named and MiniLM is not installed: other jobs than the testbed's own need none."""
    try:
        return demo.find_base(given)
    except UnsupportedError:
        return None


def copy_base(source: Path, target: Path) -> None:
    """A copy of the base model: by links where it lies on the same file system."""
    try:
        shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise MachineError(f"cannot copy the base model {source} to {target}: {error}.", "See whether the disk is full.") from error


def write_job(folder: Path, spec: TestbedSpec, base: Path) -> None:
    """DIR/job.toml."""
    (folder / JOB_FILE).write_text(job(folder, spec, base), encoding="utf-8")


def job(folder: Path, spec: TestbedSpec, base: Path) -> str:
    """The job that `run` submits where none is named: the demo's, sized for boards, with room for those that fall out."""
    labels = json.loads((folder / "data" / "labels.json").read_text(encoding="utf-8"))
    # MiniLM's targets were tried; another model gets PEFT's own choice.
    targets = "" if base.name != base_name(None) else '\ntargets = ["query", "value"]'
    return f"""\
name = "{spec.name}"
seed = {spec.seed}

[model]
base = {demo.toml(str(base))}
allow_hub = false

[task]
kind = "text-classification"
labels = {demo.toml(labels)}

[lora]
rank = 8
alpha = 16{targets}

[data]
name = "{DATA_NAME}"
max_length = 64

[training]
steps = {STEPS}
batch_size = 16
learning_rate = 0.005

[rounds]
count = {ROUNDS}
# Whoever is cut off, paused or slow beyond this is not waited for.
deadline_s = 240
quorum = 0.5

[devices]
minimum = {max(1, len(spec.devices) // 2)}
wait_s = 300

[evaluation]
source = "heldout"
heldout = {demo.toml(str(folder / "data" / "test.jsonl"))}
metric = "accuracy"
"""


def _config(device: DeviceSpec) -> str:
    lines = [
        f"name = {demo.toml(device.name)}",
        f"tags = {demo.toml(['testbed', device.kind])}",
        "",
        f"[data.{DATA_NAME}]",
        f'train = "../data/{device.name}/train.jsonl"',
        f'validation = "../data/{device.name}/validation.jsonl"',
        "",
        "[training]",
        "allow_hub = false",
    ]
    return "\n".join(lines) + "\n"


def _parts(spec: TestbedSpec, train: Sequence[demo.Row], validation: Sequence[demo.Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Row numbers of each device, of the train rows and of the validation rows."""
    count = len(spec.devices)
    total = sum(device.share for device in spec.devices)
    weights = [device.share / total for device in spec.devices]
    if spec.split == "iid":
        return _shuffled(len(train), weights, spec.seed), _shuffled(len(validation), weights, spec.seed + 1)
    labels = [str(row["label"]) for row in train]
    drawn = split.dirichlet_shares(labels, count, spec.alpha, spec.seed)
    # A device of double share gets double of what the draw gives it, of every label.
    shares = {label: _normal([part * weight for part, weight in zip(parts, weights, strict=True)]) for label, parts in drawn.items()}
    return (
        split.by_shares(labels, shares, count, spec.seed),
        split.by_shares([str(row["label"]) for row in validation], shares, count, spec.seed + 1),
    )


def _normal(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total for value in values] if total > 0 else [1 / len(values)] * len(values)


def _shuffled(count: int, weights: Sequence[float], seed: int) -> list[list[int]]:
    """Shuffled and cut by the weights; nobody gets nothing."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    sizes = [size + 1 for size in split.largest_remainder(count - len(weights), weights)]
    found: list[list[int]] = []
    for size in sizes:
        found.append(sorted(order[:size]))
        order = order[size:]
    return found


def _write_rows(path: Path, rows: Sequence[demo.Row]) -> None:
    write(path, "".join(json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) + "\n" for row in rows))


def write(path: Path, text: str) -> None:
    """Readable for whoever reaches the folder: the user of a container is another than this one."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
    path.parent.chmod(0o755)


def _link(source: str, target: str) -> None:
    real = os.path.realpath(source)
    if os.path.exists(target):
        return
    try:
        os.link(real, target)
    except OSError:  # another file system
        shutil.copyfile(real, target)
