"""One task from its inputs to its result: fetch base and state, let the child compute, tell how far it is."""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fleetune.agent.cache import Cache
from fleetune.agent.config import AgentConfig, DataPlace
from fleetune.agent.domain import Base, Blob, Evaluated, Failed, FailureKind, Measured, Result, Task, TaskKind, Update
from fleetune.agent.measuring import Measures
from fleetune.agent.probe.memory import resident_bytes
from fleetune.agent.trainer.process import Trainer
from fleetune.child.process import ChildDied, ChildError
from fleetune.errors import DataError, DiskFullError, FleetuneError, ModelError, UnreachableError, UnsupportedError, WireError

LOG = logging.getLogger(__name__)

PROGRESS_S = 0.25
"""Between two progress messages of one task and stage."""

PLANNED_METHODS = frozenset({"deft"})
"""Whose results tell what they have shown of the device."""

LOG_MESSAGE_BYTES = 16 * 1024
LOG_TASK_BYTES = 256 * 1024

OnProgress = Callable[[str, int, int, "float | None"], None]
"""Hears stage, done, total, loss."""


class Throttle:
    """Sends the latest progress of one task every PROGRESS_S: a task that is over sooner says nothing on the way, only how it ended."""

    def __init__(self, send: OnProgress) -> None:
        self._send = send
        self._latest: tuple[str, int, int, float | None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        self._latest = (stage, done, total, loss)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PROGRESS_S, self._tell)

    def close(self) -> None:
        """Say nothing more; the task has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        self._timer = None
        if self._latest is not None:
            self._send(*self._latest)


class LogRelay:
    """A child's lines on their way to the coordinator: gathered for PROGRESS_S, at most LOG_TASK_BYTES in a task."""

    def __init__(self, send: Callable[[list[str]], None]) -> None:
        self._send = send
        self._lines: list[str] = []
        self._rest = ""
        self._gathered_bytes = 0
        self._left_bytes = LOG_TASK_BYTES
        self._timer: asyncio.TimerHandle | None = None

    def add(self, text: str) -> None:
        """Text as it came; whole lines are sent, the last half waits for its end."""
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > LOG_MESSAGE_BYTES:
            lines, self._rest = [*lines, self._rest], ""
        for line in lines:
            self._add_line(line)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            self._send(self._lines)
            self._lines, self._gathered_bytes = [], 0

    def close(self) -> None:
        """Send what is there; the task has ended."""
        if self._rest:
            self._add_line(self._rest)
            self._rest = ""
        self.flush()

    def _add_line(self, line: str) -> None:
        # A progress bar rewrites its line with carriage returns; the last state of it is what matters.
        line = line.rstrip("\r").rpartition("\r")[2][: LOG_MESSAGE_BYTES // 4]
        if self._left_bytes <= 0 or not line.strip():
            return
        size_bytes = len(line.encode("utf-8", "replace")) + 8
        self._left_bytes -= size_bytes
        if self._left_bytes <= 0:
            line = "(further lines of this task are not sent)"
        if self._gathered_bytes + size_bytes > LOG_MESSAGE_BYTES:
            self.flush()
        self._lines.append(line)
        self._gathered_bytes += size_bytes
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PROGRESS_S, self.flush)


@dataclass(frozen=True)
class Execution:
    """What it takes to do a task on this device. `threads` is for the child's arithmetic."""

    config: AgentConfig
    threads: int
    cache: Cache
    trainer: Trainer
    measures: Measures
    out_path: Callable[[str, int, int], Path]

    async def run(self, task: Task, on_progress: OnProgress, on_lines: Callable[[list[str]], None]) -> Result:
        """The task's result; a Failed says what went wrong. Raises only CancelledError, and then nothing of the task goes on."""
        relay, progress = LogRelay(on_lines), Throttle(on_progress)
        stage = "fetch"
        out_path = self.out_path(task.task_id, task.lease, task.epoch) if task.kind is TaskKind.TRAIN else None
        done = False
        try:
            if task.kind is TaskKind.MEASURE:
                stage = "measure"
                return await self._measure(task, progress, relay)
            data = self._data(task)
            self.trainer.prepare(with_torch=task.base is not None)
            with self.cache.holding(_digests(task)):
                started_s = time.monotonic()
                base_folder, state_path = await self._inputs(task, progress)
                fetched_s = time.monotonic()
                LOG.debug("inputs ready task=%s seconds=%.3f", task.task_id, fetched_s - started_s)
                stage = "evaluate" if task.kind is TaskKind.EVALUATE else "train"
                fields = self._fields(task, base_folder, state_path, out_path, data)
                answer = await self.trainer.request(
                    "evaluate" if task.kind is TaskKind.EVALUATE else "train", fields, _events(progress, relay), relay.add
                )
                LOG.debug("computed task=%s seconds=%.3f", task.task_id, time.monotonic() - fetched_s)
            result = _result(task, answer, out_path)
            if isinstance(result, Update) and task.method in PLANNED_METHODS:
                result = replace(result, report=await self.measures.observed(task, result.report, resident_bytes(self.trainer.pid)))
            done = True
            return result
        except Exception as error:  # noqa: BLE001  # the one place where a task's errors end: each becomes a result that people see
            failed = failure(task, stage, error)
            LOG.error("task failed task=%s kind=%s stage=%s message=%r", task.task_id, failed.kind.value, failed.stage, failed.message)
            return failed
        finally:
            progress.close()
            relay.close()
            if out_path is not None and not done:
                # Half an update, under its own name or the one that the child wrote it aside with.
                for path in out_path.parent.glob(f"*{out_path.name}*"):
                    path.unlink(missing_ok=True)

    async def _measure(self, task: Task, progress: Throttle, relay: LogRelay) -> Measured:
        wish = self.measures.wish(task)
        held = await self.measures.fresh(wish)
        if held is None:
            assert task.base is not None, "a wish is of a model"
            self.trainer.prepare(with_torch=True)
            with self.cache.holding(_digests(task)):
                base_folder = await self._base(task.base, progress)
                fields = self.measures.fields(task, wish, str(base_folder), resident_bytes(self.trainer.pid))
                answer = await self.trainer.request("measure", fields, _events(progress, relay), relay.add)
            held = await self.measures.keep(wish, answer)
        else:
            relay.add(f"figures of {held.age_s() / 3600:.1f} hours ago still hold\n")
        figures = self.measures.message(held, resident_bytes(self.trainer.pid))
        return Measured(task.task_id, task.lease, task.epoch, figures.SerializeToString())

    def _data(self, task: Task) -> DataPlace | None:
        if not task.data_name:
            return None
        place = self.config.data.get(task.data_name)
        if place is None:
            known = ", ".join(sorted(self.config.data)) or "none"
            raise DataError(
                f"This device has no data named {task.data_name!r}; it has: {known}.",
                f"Add a table [data.{task.data_name}] to its agent.toml, or give --data {task.data_name}=FILE.",
            )
        return place

    async def _inputs(self, task: Task, on_progress: OnProgress) -> tuple[Path | None, Path]:
        if task.state is None:
            raise WireError(f"Task {task.task_id} came without a state to start from.")
        base_folder: Path | None = None
        if task.base is not None:
            base_folder = await self._base(task.base, on_progress)
        on_progress("fetching_state", 0, task.state.size_bytes, None)
        state_path = await self.cache.state(task.state, lambda done, total: on_progress("fetching_state", done, total, None))
        return base_folder, state_path

    async def _base(self, base: Base, on_progress: OnProgress) -> Path:
        on_progress("fetching_base", 0, sum(file.size_bytes for file in base.files), None)
        return await self.cache.base(base, lambda done, total: on_progress("fetching_base", done, total, None))

    def _fields(
        self, task: Task, base_folder: Path | None, state_path: Path, out_path: Path | None, data: DataPlace | None
    ) -> dict[str, object]:
        training = self.config.training
        fields: dict[str, object] = {
            "task": base64.b64encode(task.encoded).decode("ascii"),
            "base_folder": str(base_folder) if base_folder is not None else None,
            "state_path": str(state_path),
            "keep_folder": str(self.config.state_dir / "personal"),
            "data": _data_fields(data) if data is not None else None,
            "limits": {
                "threads": self.threads,
                "accelerator": training.accelerator,
                "memory_bytes": training.memory_mib * 1024**2 or None,
            },
        }
        if out_path is not None:
            fields["out_path"] = str(out_path)
        return fields


def failure(task: Task, stage: str, error: Exception) -> Failed:
    """What an error of a task tells the coordinator."""
    kind, message, trace = FailureKind.INTERNAL, str(error), ""
    if isinstance(error, ChildError):
        kind = FailureKind(error.kind) if error.kind in {known.value for known in FailureKind} else FailureKind.INTERNAL
        stage, trace = error.stage or stage, error.traceback
    elif isinstance(error, ChildDied):
        kind = FailureKind.OUT_OF_MEMORY if error.death.out_of_memory else FailureKind.CRASH
        message, trace = error.death.sentence(), error.death.stderr_tail
        message = f"{message[:1].upper()}{message[1:]} during this task."
        if kind is FailureKind.OUT_OF_MEMORY:
            message += " Lower the batch size or the maximum length, or turn on gradient checkpointing."
    elif isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        kind = FailureKind.DISK_FULL
    elif isinstance(error, DataError):
        kind, stage = FailureKind.DATA, "load"
    elif isinstance(error, ModelError):
        kind = FailureKind.MODEL
    elif isinstance(error, UnsupportedError):
        kind = FailureKind.UNSUPPORTED
    elif isinstance(error, (WireError, UnreachableError)):
        kind = FailureKind.TRANSFER
    elif not isinstance(error, FleetuneError):
        message = f"The agent met an unexpected error: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failed(task.task_id, task.lease, task.epoch, kind, stage, message, trace)


def _digests(task: Task) -> list[str]:
    held = [task.state.digest] if task.state is not None else []
    if task.base is not None:
        held += [task.base.digest, *(file.digest for file in task.base.files)]
    return held


def _data_fields(place: DataPlace) -> dict[str, object]:
    def file(path: Path | None) -> dict[str, object] | None:
        return None if path is None else {"path": str(path), "format": place.format or None}

    return {"train": file(place.train), "validation": file(place.validation)}


def _events(on_progress: OnProgress, relay: LogRelay) -> Callable[[Mapping[str, object]], None]:
    def hear(event: Mapping[str, object]) -> None:
        if event.get("event") == "progress":
            loss = event.get("loss")
            on_progress(str(event.get("stage", "")), _whole(event.get("done")), _whole(event.get("total")), _number(loss))
        elif event.get("event") == "log":
            relay.add(f"{event.get('text', '')}\n")

    return hear


def _whole(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) else 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _result(task: Task, answer: Mapping[str, object], out_path: Path | None) -> Update | Evaluated:
    if out_path is None:
        return Evaluated(task.task_id, task.lease, task.epoch, base64.b64decode(str(answer["evaluation"])))
    blob = Blob(str(answer["digest"]), int(cast("int", answer["size_bytes"])))
    report = base64.b64decode(str(answer["report"]))
    return Update(task.task_id, task.lease, task.epoch, blob, out_path.name, report, task.uplink_bits_per_s)
