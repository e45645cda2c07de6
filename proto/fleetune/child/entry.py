"""The child's side of the JSON-lines protocol: read requests, run handlers, answer with a result or a typed error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from fleetune import errors

Emit = Callable[..., None]
"""emit("progress", stage="training", done=3, total=12, loss=0.52) sends an event that belongs to the running request."""

Handler = Callable[[Mapping[str, object], Emit], dict[str, object]]

TRACEBACK_CHARS_KEPT = 8 * 1024
ORPHAN_CHECK_S = 0.2

_PR_SET_PDEATHSIG = 1
# The last is all that oneDNN, which computes for torch on CPUs, says when an allocation of its own fails.
_MEMORY_WORDS = ("not enough memory", "out of memory", "can't allocate memory", "could not create a primitive")
_STAGE_WORDS = {"loading": "load", "training": "train", "evaluating": "evaluate", "measuring": "load", "writing": "train"}
_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (errors.DataError, "data"),
    (errors.ModelError, "model"),
    (errors.NotFiniteError, "not_finite"),
    (errors.DiskFullError, "disk_full"),
    (errors.UnsupportedError, "unsupported"),
    (errors.WireError, "transfer"),
    (errors.UnreachableError, "transfer"),
    (MemoryError, "out_of_memory"),
    (ModuleNotFoundError, "unsupported"),
)


def serve(handlers: Mapping[str, Handler]) -> int:
    """Answer requests from stdin until its end; returns the exit code.

    Standard output belongs to the protocol, so descriptor 1 is redirected to standard error first: whatever a library
    prints does no harm. Ctrl-C is left to the parent, and a parent that dies takes the child with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    reading_fd, writing_fd = _take_pipes()
    busy = threading.Event()
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(reading_fd, lines, busy), name="requests", daemon=True).start()
    send_lock = threading.Lock()

    def send(message: Mapping[str, object]) -> None:
        line = json.dumps(_finite(message)).encode() + b"\n"
        with send_lock:
            _write_all(writing_fd, line)

    try:
        while True:
            line = lines.get()
            if line is None:
                return 0
            if line.strip():
                busy.set()
                _answer(line, handlers, send)
                busy.clear()
    except BrokenPipeError:
        # The parent closed its end: nobody is left to answer.
        return 0


def _answer(line: bytes, handlers: Mapping[str, Handler], send: Callable[[Mapping[str, object]], None]) -> None:
    request_id: object = None
    stage = ""

    def emit(event: str, **fields: object) -> None:
        nonlocal stage
        if "stage" in fields:
            stage = str(fields["stage"])
        send({"id": request_id, "event": event, **fields})

    try:
        parsed: object = json.loads(line)
        if not isinstance(parsed, dict):
            raise errors.UnsupportedError(f"A request must be a JSON object, this one is {type(parsed).__name__}.")
        request = cast("dict[str, object]", parsed)
        request_id = request.get("id")
        op = str(request.get("op"))
        stage = op
        if op not in handlers:
            raise errors.UnsupportedError(
                f"This child does not know the request {op!r}; it knows {', '.join(sorted(handlers))}.",
                "Use the same version of Fleetune on both sides.",
            )
        result = handlers[op](request, emit)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001
        # The one place where every error of a request ends: it is reported with its kind, and the child serves on.
        send({"id": request_id, "error": describe_error(error, _STAGE_WORDS.get(stage, stage))})
        return
    send({"id": request_id, "result": result})


def describe_error(error: BaseException, stage: str) -> dict[str, object]:
    """The protocol's error object: kind, stage, a message for a person, the end of the traceback."""
    kind = error_kind(error)
    if isinstance(error, errors.FleetuneError):
        message = str(error)
    elif kind == "out_of_memory":
        message = f"An allocation failed for lack of memory ({error})." if str(error) else "An allocation failed for lack of memory."
    elif isinstance(error, ModuleNotFoundError):
        message = f"The package {error.name!r} is not installed here. Install the training extra: pip install 'fleetune[train]'."
    elif kind == "disk_full":
        message = f"No space is left for {getattr(error, 'filename', None) or 'a file'}. Free some space there."
    else:
        message = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"kind": kind, "stage": stage, "message": message, "traceback": trace[-TRACEBACK_CHARS_KEPT:]}


def error_kind(error: BaseException) -> str:
    """One of data, model, out_of_memory, not_finite, disk_full, unsupported, transfer, internal."""
    for error_class, kind in _KINDS:
        if isinstance(error, error_class):
            return kind
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    return "internal"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: MemoryError, torch's OutOfMemoryError, or the RuntimeErrors of its CPU and MPS allocators.

    By class name and text, because this module must not import torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS)


def _take_pipes() -> tuple[int, int]:
    """Moves the protocol away from descriptors 0 and 1, so that neither prints nor grandchildren can touch it."""
    reading_fd = os.dup(0)
    writing_fd = os.dup(1)
    null_fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return reading_fd, writing_fd


def _read_lines(fd: int, lines: queue.SimpleQueue[bytes | None], busy: threading.Event) -> None:
    parent = os.getppid()
    with os.fdopen(fd, "rb") as stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
    # Requests may have ended because the parent died; a training nobody waits for must not go on. (Linux ends the child
    # by the death signal; this is for the other systems, and for a parent that died before that was set.)
    while busy.is_set():
        if os.getppid() != parent:
            os._exit(0)
        time.sleep(ORPHAN_CHECK_S)


def _die_with_parent() -> None:
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _finite(message: Mapping[str, object]) -> dict[str, object]:
    """JSON has no NaN: a figure that is not finite is sent as null."""
    return dict(_finite_items(message))


def _finite_items(message: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in message.items():
        if isinstance(value, Mapping):
            yield key, _finite(cast("Mapping[str, object]", value))
        else:
            yield key, None if isinstance(value, float) and not math.isfinite(value) else value
