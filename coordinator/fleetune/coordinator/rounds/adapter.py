"""The result of a committed round on disk: a PEFT adapter folder that loads as it is, and a manifest of what went into it.

    jobs/<job>/rounds/0007/adapter_model.safetensors   hard link of the global state's blob: no second copy
                           adapter_config.json  README.md  manifest.json
    jobs/<job>/best -> rounds/0005     jobs/<job>/final -> rounds/0007

A folder is a projection of the database: it is written after the commit, and written again by a restart that misses it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator import loraranks
from fleetune.coordinator.domain import Prepared, RoundEntry, TaskEntry
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.rounds import ranking, triplets
from fleetune.coordinator.store.blobs import BlobStore

STATE_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
README_FILE = "README.md"
MANIFEST_FILE = "manifest.json"

_ASIDE = re.compile(r"\.([0-9]{4,}|best|final)\.[0-9a-f]{8}")
"""A folder or a link before it gets its name, and a folder after it has lost it."""


@dataclass(frozen=True)
class Adapter:
    """Everything a round's folder is made of."""

    job_id: str
    spec: JobSpec
    prepared: Prepared
    entry: RoundEntry


def folder(jobs: Path, job_id: str, round_number: int) -> Path:
    return jobs / job_id / "rounds" / f"{round_number:04d}"


def write(jobs: Path, blobs: BlobStore, adapter: Adapter) -> Path:
    """Write the folder aside and rename it; what is there already stays. Returns the folder. Blocks on disk."""
    target = folder(jobs, adapter.job_id, adapter.entry.number)
    if target.exists():
        return target
    assert adapter.entry.published is not None
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        blobs.link_out(adapter.entry.published.digest, aside / STATE_FILE)
        for name, text in texts(adapter).items():
            (aside / name).write_text(text, encoding="utf-8")
        os.replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def is_whole(jobs: Path, adapter: Adapter) -> bool:
    """Whether the folder holds what `write` would put there; False where there is none. Blocks on disk."""
    target = folder(jobs, adapter.job_id, adapter.entry.number)
    assert adapter.entry.published is not None
    try:
        if (target / STATE_FILE).stat().st_size != adapter.entry.published.size_bytes:
            return False
        return all((target / name).read_text(encoding="utf-8") == text for name, text in texts(adapter).items())
    except (OSError, UnicodeDecodeError):
        return False


def texts(adapter: Adapter) -> dict[str, str]:
    """The folder's files beside the tensors: name -> content."""
    files = {MANIFEST_FILE: manifest(adapter), README_FILE: readme(adapter)}
    if adapter.prepared.adapter_config:
        files[CONFIG_FILE] = adapter.prepared.adapter_config
    if adapter.entry.alive:
        spec = adapter.spec.lora
        files[CONFIG_FILE] = triplets.config(files[CONFIG_FILE], ranking.left(adapter.entry.alive), spec.alpha / spec.rank)
    return files


def point(jobs: Path, job_id: str, name: str, round_number: int) -> None:
    """Let the link `name` ("best", "final") of the job lead to a round's folder."""
    link = jobs / job_id / name
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
    aside.symlink_to(Path("rounds") / f"{round_number:04d}")
    os.replace(aside, link)


def rounds(jobs: Path, job_id: str) -> list[int]:
    """Numbers of the rounds that have a folder, in order. Blocks on disk."""
    try:
        names = os.listdir(jobs / job_id / "rounds")
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def drop(jobs: Path, job_id: str, round_number: int) -> None:
    """Remove a round's folder; readers that opened a file keep it."""
    target = folder(jobs, job_id, round_number)
    if target.exists():
        # Gone at once: whoever looks after a crash finds all of it or nothing.
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        os.replace(target, aside)
        shutil.rmtree(aside)


def tidy(jobs: Path, job_id: str) -> None:
    """Remove what a crash has left of folders and links that were being made or removed; for a start, when nobody makes any."""
    for place in (jobs / job_id, jobs / job_id / "rounds"):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if not _ASIDE.fullmatch(path.name):
                continue
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)


def manifest(adapter: Adapter) -> str:
    """Who contributed what: enough to recompute the fold from the updates."""
    entry, prepared = adapter.entry, adapter.prepared
    assert entry.state is not None
    assert entry.start_state is not None
    document = {
        "format": "fleetune-adapter/1",
        "job": adapter.job_id,
        "name": adapter.spec.name,
        "round": entry.number,
        "method": adapter.spec.method.name,
        "base": {"hub_id": prepared.hub_id, "revision": prepared.revision, "name": prepared.base_name, "digest": prepared.base_digest},
        "start_state": {"digest": entry.start_state.digest, "bytes": entry.start_state.size_bytes},
        "state": {
            **({} if entry.adapter else {"file": STATE_FILE}),
            "digest": entry.state.digest,
            "bytes": entry.state.size_bytes,
        },
        **(
            {"adapter": {"file": STATE_FILE, "digest": entry.adapter.digest, "bytes": entry.adapter.size_bytes}, "ranks": entry.ranks}
            if entry.adapter
            else {}
        ),
        **({"alive": entry.alive} if entry.alive else {}),
        "trainables_digest": entry.trainables_digest or prepared.trainables_digest,
        "devices": [
            {
                "name": task.device_name,
                "id": task.device_id,
                "weight": task.update.samples,
                "bytes": task.update.blob.size_bytes,
                "digest": task.update.blob.digest,
                "metrics": task.update.metrics,
                **_pruned(entry, task),
            }
            for task in entry.trained()
            if task.update
        ],
        **({"task": {"kind": adapter.spec.task.kind, "labels": list(adapter.spec.task.labels)}} if entry.prunings else {}),
        "metrics": entry.metrics,
        "evaluation_rows": entry.evaluation_rows,
        **({"fold_metrics": entry.fold_metrics} if entry.fold_metrics else {}),
        "started_unix_s": entry.started_unix_s,
        "ended_unix_s": entry.ended_unix_s,
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _pruned(entry: RoundEntry, task: TaskEntry) -> dict[str, object]:
    """What a device's model keeps, for whoever makes it from the base and the adapter."""
    pruning = entry.pruning_of(task.device_id)
    if pruning is None or task.update is None:
        return {}
    told = {"importance": task.update.importance} if task.update.importance else {}
    return {
        "structure": task.update.structure,
        "sparsity": task.update.sparsity,
        "rank": pruning.rank,
        "hardware": pruning.hardware,
        **told,
    }


def readme(adapter: Adapter) -> str:
    """A model card: labels, how to load it, what trained it."""
    spec, prepared, entry = adapter.spec, adapter.prepared, adapter.entry
    base = prepared.hub_id or prepared.base_name
    lines = ["---", *(["library_name: peft"] if prepared.adapter_config else [])]
    if prepared.hub_id:
        lines.append(f"base_model: {prepared.hub_id}")
    lines += [
        "tags: [fleetune, federated]",
        "---",
        f"# {spec.name}, round {entry.number}",
        "",
        f"Trained by Fleetune with method `{spec.method.name}` on {len(entry.trained())} devices; their data never left them.",
        "",
    ]
    if prepared.base_digest:
        lines += [
            f"- Base: `{base}`" + (f" at revision `{prepared.revision}`" if prepared.revision else ""),
            f"- Base digest: `{prepared.base_digest}`",
            f"- LoRA: rank {spec.lora.rank}{_ranks(entry)}{_rest(spec)}, alpha {spec.lora.alpha:g}, targets {_targets(spec)}"
            if spec.method.trains == "lora"
            else "- Trained: the layers' own weights",
        ]
    if spec.method.aggregation == "fedsa":
        lines.append("- A of each pair alone: B is zero here, as it and the head are each device's own, in `personal/` of its state folder")
    lines += [f"- {name}: {value:.4f} on {entry.evaluation_rows} rows" for name, value in sorted(entry.metrics.items())]
    if spec.task.labels:
        lines += ["", "## Labels", "", *(f"{index}. `{label}`" for index, label in enumerate(spec.task.labels))]
    if prepared.adapter_config:
        lines += ["", "## Load it", "", "```python", *loading_lines(spec, base, "."), "```"]
    return "\n".join(lines) + "\n"


def _targets(spec: JobSpec) -> str:
    return ", ".join(spec.lora.targets) or "PEFT defaults"


def _ranks(entry: RoundEntry) -> str:
    """What is left of the rank where modules have lost some."""
    if not entry.alive:
        return ""
    left = ranking.left(entry.alive)
    return f" at first, now {sum(left.values())} in all over {len(left)} of {len(entry.alive)} modules"


def _rest(spec: JobSpec) -> str:
    rest = loraranks.residual_rank(spec)
    return f" and {rest} more that gather what earlier rounds brought" if rest else ""


AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def loading_lines(spec: JobSpec, base: str, adapter_folder: str) -> list[str]:
    """Three lines of Python that load the adapter on its base."""
    auto = AUTO_CLASSES[spec.task.kind or "causal-lm"]
    labels = f", num_labels={len(spec.task.labels)}" if spec.task.labels else ""
    return [
        f"from transformers import {auto}; from peft import PeftModel",
        f'base = {auto}.from_pretrained("{base}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{adapter_folder}")',
    ]
