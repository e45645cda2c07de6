"""How both daemons log: one line an event, as text for people or as JSON for collectors."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send everything to `stream` (standard error). `style` is "text", "json" or "auto": text, wherever it goes."""
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class TextLines(logging.Formatter):
    """2026-01-31T12:00:00.123Z info engine: job=... round=..."""

    @staticmethod
    def converter(timestamp: float | None) -> time.struct_time:
        """Times of a fleet are compared across machines: UTC."""
        return time.gmtime(timestamp)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = super().format(record).split("\n")
        # Further lines (tracebacks) are indented, so that nothing from outside can look like a line of its own.
        return "\n".join([first, *("    " + line for line in rest)])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "unix_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
