"""Every field of a job file as a row: for the reference page and for whoever lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from pydantic.fields import FieldInfo

from fleetune.complaints import shown
from fleetune.coordinator.jobspec import allowed_words, section_models

_BY_JOB = {
    "name": "required",
    "model.base": "required",
    "task.kind": "required",
    "task.labels": "required for text-classification",
    "data.name": "required",
    "data.text": '`"text"` for text-classification, and for causal-lm without other columns',
    "data.text_pair": "none",
    "data.label": '`"label"` for text-classification',
    "data.input": '`"input"` for seq2seq-lm',
    "data.target": '`"target"` for seq2seq-lm',
    "data.chat": "none",
    "data.mask_prompt": "`true` where there is a prompt",
    "model.revision": "the hub's default branch",
    "lora.targets": "PEFT's choice for the architecture",
    "lora.init_adapter": "a fresh adapter",
    "training.steps": "none; `1` for deft's gradients",
    "training.epochs": "`1.0` without steps; none with deft",
    "method.aggregation": '`"exact"` with method.ranks, else `"fedit"`',
    "method.ranks": "lora.rank for all",
    "method.server_learning_rate": "`1.0` for fedavgm, `0.01` for fedadam and fedyogi",
    "method.server_beta2": "`0.999` for deft, else `0.99`",
    "evaluation.heldout": "none",
    "evaluation.metric": '`"accuracy"` for text-classification, else `"loss"`',
}
"""Defaults that depend on the rest of the job; all others are the models' own."""


@dataclass(frozen=True)
class JobField:
    """`default` is Markdown; `unit` is empty for plain numbers and texts."""

    path: str
    takes: str
    default: str
    unit: str
    help: str


def fields() -> Iterator[JobField]:
    """All fields in the order of the file."""
    models = section_models()
    for section, model in models.items():
        for name, field in model.model_fields.items():
            if not section and name in models:
                continue
            path = f"{section}.{name}" if section else name
            yield JobField(
                path, allowed_words(field), _BY_JOB.get(path, f"`{shown(field.default)}`"), _unit(field), field.description or ""
            )


def reference() -> str:
    """The fields as Markdown, one table for each section."""
    lines: list[str] = []
    current: str | None = None
    for field in fields():
        section, _, name = field.path.rpartition(".")
        if section != current:
            current = section
            title = f"`[{section}]`" if section else "Top of the file"
            lines += ["", f"### {title}", "", "| field | takes | default | unit | what it does |", "| --- | --- | --- | --- | --- |"]
        cells = (f"`{name}`", field.takes, field.default, field.unit, field.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def _unit(field: FieldInfo) -> str:
    # pydantic's own type of this dictionary refers to itself; only "unit" is ever put into it here.
    extra = cast("dict[str, object]", field.json_schema_extra or {})
    unit = extra.get("unit")
    return unit if isinstance(unit, str) else ""
