"""Peak memory of training one block of MiniLM against training all of it, and what a planner reckons with: `python bench/deftmemory.py`.

Each figure is of a training child of its own, above the same child with the model loaded and nothing computed yet. A child trains a few
rounds, as a device does: its heap has grown to what it needs only after some steps. The rows' words are drawn from the whole vocabulary,
since each row of the embeddings that a text needs becomes resident.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minilm

from fleetune.agent import measuring
from fleetune.methods.v1 import deft_pb2
from fleetune.model import adapter, lora, recipe
from fleetune.model.accelerator import Accelerator
from fleetune.v1 import messages_pb2

MIB = 1 << 20
ROUNDS = 3
TARGET = 0.45
"""Most that the last block may take of what all take."""

CHILD = "fleetune.agent.trainer"
LIMITS = {"threads": 1, "accelerator": "cpu", "memory_bytes": None}


@dataclass(frozen=True)
class Peak:
    """Of one child that trained `depths`: bytes above the loaded model, and what was reckoned for its deepest depth beforehand."""

    name: str
    depths: tuple[int, ...]
    peak_bytes: int
    reckoned_bytes: int

    @property
    def reckoned_ratio(self) -> float:
        return self.reckoned_bytes / self.peak_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases alone, by their first words")
    parser.add_argument("--payload", choices=["gradients", "deltas"], default="gradients")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaks = measured(Path(folder), given.rows, given.tokens, given.payload == "deltas", given.only or [])
    by_name = {peak.name: peak.peak_bytes for peak in peaks}
    ratio = by_name["last layer"] / by_name["all"] if {"last layer", "all"} <= by_name.keys() else None
    if given.json:
        print(json.dumps({"peaks": [{**vars(peak), "reckoned_ratio": peak.reckoned_ratio} for peak in peaks], "ratio": ratio}, indent=2))
    else:
        print(f"MiniLM, {given.rows} rows of {given.tokens} tokens, {given.payload}; MiB above the loaded model")
        print(f"{'trained':<24} {'peak':>8} {'reckoned':>9} {'ratio':>6}")
        for peak in peaks:
            print(f"{peak.name:<24} {peak.peak_bytes / MIB:>8.1f} {peak.reckoned_bytes / MIB:>9.1f} {peak.reckoned_ratio:>6.2f}")
        if ratio is not None:
            print(f"last layer / all: {ratio:.2f} (target: at most {TARGET})")
    sound = (ratio is None or ratio <= TARGET) and all(1.0 <= peak.reckoned_ratio <= 1.5 for peak in peaks)
    return 0 if sound else 1


def measured(folder: Path, rows: int, tokens: int, moments: bool, names: Sequence[str]) -> list[Peak]:
    """The head, the last layer, the middle one, the first one, and all, each in a child of its own; with `names`, these of them."""
    base = minilm.minilm_folder()
    wanted = messages_pb2.Recipe(
        model_task=messages_pb2.MODEL_TASK_TEXT_CLASSIFICATION,
        labels=[str(number) for number in range(6)],
        lora=messages_pb2.Lora(rank=8, alpha=16, targets=["query", "value"]),
        data=messages_pb2.DataContract(name="rows", columns=messages_pb2.Columns(text="text", label="label"), max_length=tokens),
        dtype="float32",
    )
    adapted = lora.load(base, recipe.from_proto(wanted), Accelerator("cpu"), seed=1)
    state = adapter.write_state(folder / "state.safetensors", adapted).path
    count = len(lora.blocks(trainable.name for trainable in adapted.trainables))
    data = folder / "rows.jsonl"
    chance = random.Random(1)
    words = sorted(word for word in adapted.tokenizer.get_vocab() if word.isalpha())
    texts = (" ".join(chance.choices(words, k=tokens)) for _ in range(4 * rows))
    data.write_text("".join(json.dumps({"text": text, "label": str(row % 6)}) + "\n" for row, text in enumerate(texts)))
    cases: list[tuple[str, tuple[int, ...]]] = [
        ("head", (1,)),
        ("last layer", (2,)),
        (f"layer {count - 1 - count // 2} of {count - 1}", (count // 2 + 1,)),
        ("first layer", (count,)),
        ("all", tuple(range(1, count + 1))),
    ]
    asked = [(name, depths) for name, depths in cases if not names or any(name.startswith(begin) for begin in names)]
    reckoned = {only: _reckoned(base, wanted, rows, count, moments, only) for only in {len(depths) == 1 for _, depths in asked}}
    return [
        Peak(name, depths, _peak(base, wanted, state, data, rows, count, depths, moments), reckoned[len(depths) == 1][depths[-1] - 1])
        for name, depths in asked
    ]


def _reckoned(base: Path, wanted: messages_pb2.Recipe, rows: int, count: int, moments: bool, only: bool) -> list[int]:
    """Step bytes by depth as a device measures them before a job's first round, from a few depths."""
    task = _task(wanted, rows, count, (), moments)
    how = {"batch_rows": rows, "warmup_steps": measuring.WARMUP_STEPS, "timed_steps": measuring.TIMED_STEPS, "points": measuring.POINTS}
    fields = {"task": _encoded(task.SerializeToString()), "base_folder": str(base), **how}
    [answer] = _ask("measure", [{**fields, "only": only, "without_moments": not moments, "limits": LIMITS}])
    return [int(size) for size in answer["model"]["step_bytes"]]


def _peak(
    base: Path, wanted: messages_pb2.Recipe, state: Path, data: Path, rows: int, count: int, depths: Sequence[int], moments: bool
) -> int:
    fields = {
        "base_folder": str(base),
        "state_path": str(state),
        "out_path": str(state.with_name("update.safetensors")),
        "data": {"train": {"path": str(data), "format": None}, "validation": None},
        "limits": LIMITS,
    }
    tasks = [_task(wanted, rows, count, depths, moments, number) for number in range(1, ROUNDS + 1)]
    peaks: list[int] = []
    for answer in _ask("train", [{**fields, "task": _encoded(task.SerializeToString())} for task in tasks]):
        report = deft_pb2.DeftReport()
        messages_pb2.UpdateReport.FromString(base64.b64decode(answer["report"])).payload.Unpack(report)
        peaks.append(int(report.step_peak_bytes))
    if not all(peaks):
        raise SystemExit("this kernel does not let a process set its peak back; nothing can be measured here")
    return max(peaks)


def _task(wanted: messages_pb2.Recipe, rows: int, count: int, depths: Sequence[int], moments: bool, number: int = 1) -> messages_pb2.Task:
    task = messages_pb2.Task(task_id="bench", round=number, method="deft", recipe=wanted, base=messages_pb2.Base(digest="0" * 64))
    payload = deft_pb2.DEFT_PAYLOAD_DELTA if moments else deft_pb2.DEFT_PAYLOAD_GRADIENT
    steps = 2 if moments else 1
    task.payload.Pack(
        deft_pb2.DeftTask(
            depths=depths,
            depth_count=count,
            payload=payload,
            batch_size=rows,
            steps=steps,
            learning_rate=1e-4,
            first_step=(number - 1) * steps,
        )
    )
    return task


def _ask(op: str, requests: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """The answers of a child that is asked these one after the other."""
    lines = "".join(json.dumps({"id": number, "op": op, **fields}) + "\n" for number, fields in enumerate(requests, 1))
    done = subprocess.run([sys.executable, "-m", CHILD], input=lines, capture_output=True, text=True, check=True)
    told: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in told:
        if "error" in answer:
            raise SystemExit(f"{op} failed: {answer['error']['message']}")
    return [answer["result"] for answer in told if "result" in answer]


def _encoded(message: bytes) -> str:
    return base64.b64encode(message).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
