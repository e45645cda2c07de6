"""How the agent logs: one line each, as text for people or as JSON for collectors."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone

_PAIR = re.compile(r"(?:^|\s)([a-z_]+)=('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)")


def configure(level: str, log_format: str) -> None:
    """Send all loggers to stderr. `log_format` is auto, text or json; auto is text on a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its debug lines tell about its own selector.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """"2026-03-01 10:20:30.123 info  connected coordinator=..."; tracebacks follow on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S")
        line = f"{at}.{int(record.msecs):03d} {record.levelname.lower():<7} {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the message's key=value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        message = _one_line(record.getMessage())
        pairs: dict[str, str] = {key: value.strip("'\"") for key, value in _PAIR.findall(message)}
        entry: dict[str, object] = {
            **pairs,
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")
