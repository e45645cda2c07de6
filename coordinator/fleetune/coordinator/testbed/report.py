"""From the record of a run to its report: figures as JSON, a page for people, the time line as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import htmlpage, records, runfigures, timeline
from fleetune.coordinator.testbed.runfigures import LEVELS, RunFigures

FORMAT = "fleetune-testbed-report/1"
"""First field of report.json; the number grows when a figure changes its meaning or its place."""


@dataclass(frozen=True)
class ReportPaths:
    """The files of one report."""

    json: Path
    html: Path
    timeline: Path


def write_report(record: Path, out: Path, levels: Sequence[float] = LEVELS) -> ReportPaths:
    """Read `record` (run.jsonl) and write report.json, report.html and timeline.svg into the folder `out`, made where it is not there.

    RecordError where `record` is none; MachineError where `out` cannot be written. Files that stand there are replaced whole.
    """
    told = records.read(record)
    figures = runfigures.run_figures(told, levels)
    paths = ReportPaths(out / "report.json", out / "report.html", out / "timeline.svg")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(paths.json, json.dumps(document(figures), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _replace(paths.html, htmlpage.page(figures, told))
        _replace(paths.timeline, timeline.timeline(figures))
    except OSError as error:
        raise MachineError(f"The report cannot be written to {out}: {error.strerror}.", "Name another folder with --out.") from error
    return paths


def document(figures: RunFigures) -> Mapping[str, object]:
    """What report.json holds: the figures as they are, names and all."""
    return {"format": FORMAT, **asdict(figures)}


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Names come from the network: a lone surrogate is no reason to lose the report.
        aside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
