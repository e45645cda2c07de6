"""The training child's entry: requests in, methods run, results out."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from fleetune.agent.methods import table
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work, peak_rss_bytes
from fleetune.child.entry import Emit, serve
from fleetune.v1 import messages_pb2

_HEAVY_MODULES = ("numpy", "torch", "transformers", "peft")


def main() -> int:
    # Libraries may fill their caches; they may not fetch anything while they train.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return serve({"train": train, "evaluate": evaluate, "ping": ping, "measure": measure})


def train(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Runs the method's training; the answer holds the report, and digest and size of the update file."""
    work = parse(fields)
    trained = table.load(work.task.method).train(work, emit)
    return {"report": _encoded(trained.report.SerializeToString()), "digest": trained.digest, "size_bytes": trained.size_bytes}


def evaluate(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Runs the method's evaluation; no tensors come back."""
    work = parse(fields)
    return {"evaluation": _encoded(table.load(work.task.method).evaluate(work, emit).SerializeToString())}


def ping(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """What this child is and holds. With "probe": true it imports torch to tell its accelerators, else it imports nothing."""
    answer: dict[str, object] = {
        "pid": os.getpid(),
        "peak_rss_bytes": peak_rss_bytes(),
        "methods": sorted(table.METHODS),
        "heavy_modules": [name for name in _HEAVY_MODULES if name in sys.modules],
        "accelerator": "",
    }
    if fields.get("probe") or "torch" in sys.modules:
        from fleetune.model import accelerator as accelerators

        answer["accelerator"] = accelerators.pick("auto").kind
        answer["accelerators"] = list(accelerators.available())
    return answer


def measure(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Speed and memory of this machine, and of a model on it."""
    from fleetune.agent.trainer import measure as measuring

    return measuring.measure(fields, emit)


def parse(fields: Mapping[str, object]) -> Work:
    """A request's fields as a Work. The parent is the same version of the same program, so the types are its word."""
    task = messages_pb2.Task.FromString(base64.b64decode(str(fields["task"])))
    limits = cast("Mapping[str, object]", fields.get("limits") or {})
    memory = limits.get("memory_bytes")
    return Work(
        task=task,
        base_folder=_path(fields.get("base_folder")),
        state_path=Path(str(fields["state_path"])),
        out_path=_path(fields.get("out_path")),
        data=_data(fields.get("data")),
        limits=Limits(
            threads=int(str(limits.get("threads") or 0)),
            accelerator=str(limits.get("accelerator") or "auto"),
            memory_bytes=int(str(memory)) if memory else None,
        ),
        keep_folder=_path(fields.get("keep_folder")),
    )


def _path(value: object) -> Path | None:
    return Path(str(value)) if value else None


def _data(value: object) -> DeviceData | None:
    if not value:
        return None
    files = cast("Mapping[str, object]", value)
    return DeviceData(_file(files.get("train")), _file(files.get("validation")))


def _file(value: object) -> DataFile | None:
    if not value:
        return None
    fields = cast("Mapping[str, object]", value)
    named = fields.get("format")
    return DataFile(Path(str(fields["path"])), str(named) if named else None)


def _encoded(message: bytes) -> str:
    return base64.b64encode(message).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
