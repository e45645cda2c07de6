"""Puts what a benchmark measured between its own markers of docs/benchmarks.md."""

from __future__ import annotations

import datetime
from pathlib import Path

import report

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace the section `name`, or add it at the end of the page where it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def measured(command: str) -> str:
    """The line that tells when, how and where."""
    return f"Measured on {datetime.date.today().isoformat()} with `{command}` on {report.machine()}."
