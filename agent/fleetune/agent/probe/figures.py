"""Measured figures on disk: one JSON file per model, recipe, torch, device and number type."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from fleetune.agent.probe.freshness import RATIOS_KEPT, RoundTimes
from fleetune.wire import digests

FOLDER = "figures"
FILE_BYTES_MAX = 4 << 20
VERSION = 1
SOURCES = ("measured", "configured")


@dataclass(frozen=True)
class Key:
    """What figures hold for. Without a model the first two are empty."""

    base_digest: str
    recipe_digest: str
    batch_rows: int
    torch_version: str
    device: str
    dtype: str
    threads: int

    @property
    def digest(self) -> str:
        return digests.of_bytes(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class Figures:
    """What was measured, as the training child answered it, when, by whom, and what rounds have shown since."""

    key: Key
    source: str
    measured_unix_s: float
    answer: Mapping[str, object]
    rounds: RoundTimes = field(default_factory=RoundTimes)

    def age_s(self, now_unix_s: float | None = None) -> float:
        return (time.time() if now_unix_s is None else now_unix_s) - self.measured_unix_s


def path_of(state_dir: Path, key: Key) -> Path:
    return state_dir / FOLDER / f"{key.digest[:32]}.json"


def load(state_dir: Path, key: Key) -> Figures | None:
    """The stored figures of this very key; None where there are none or the file cannot be used: then they are measured again."""
    path = path_of(state_dir, key)
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
        document: object = json.loads(text) if len(text) <= FILE_BYTES_MAX else None
    except (OSError, ValueError, RecursionError):
        return None
    return _figures(document, key)


def save(state_dir: Path, figures: Figures, *, durable: bool = True) -> Path:
    """Written aside, flushed and renamed: a power cut leaves the old figures or the new ones.

    Where not `durable` it may leave none, which costs another measuring, but spares the disk a flush.
    """
    path = path_of(state_dir, figures.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "version": VERSION,
        "key": asdict(figures.key),
        "source": figures.source,
        "measured_unix_s": figures.measured_unix_s,
        "rounds": asdict(figures.rounds),
        "answer": dict(figures.answer),
    }
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _figures(document: object, key: Key) -> Figures | None:
    if not isinstance(document, dict):
        return None
    fields = cast("dict[str, object]", document)
    measured, answer, rounds = fields.get("measured_unix_s"), fields.get("answer"), fields.get("rounds")
    if fields.get("version") != VERSION or fields.get("key") != asdict(key) or fields.get("source") not in SOURCES:
        return None
    if not isinstance(measured, (int, float)) or not isinstance(answer, dict) or not isinstance(rounds, dict):
        return None
    average, ratios = cast("dict[str, object]", rounds).get("average"), cast("dict[str, object]", rounds).get("ratios")
    if not isinstance(average, (int, float)) or not isinstance(ratios, list):
        return None
    numbers = tuple(float(ratio) for ratio in cast("list[object]", ratios) if isinstance(ratio, (int, float)))[-RATIOS_KEPT:]
    return Figures(key, str(fields["source"]), float(measured), cast("dict[str, object]", answer), RoundTimes(float(average), numbers))
