"""Tasks that ask what training costs here: figures of the disk where they hold, else of the training child; corrected by every round."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from google.protobuf.message import DecodeError

from fleetune.agent.config import AgentConfig
from fleetune.agent.domain import Task
from fleetune.agent.probe import curve, figures, freshness, keys
from fleetune.agent.probe.figures import Figures, Key
from fleetune.agent.probe.memory import training_room
from fleetune.errors import UnsupportedError
from fleetune.methods.v1 import deft_pb2
from fleetune.v1 import messages_pb2

LOG = logging.getLogger(__name__)

WARMUP_STEPS = 3
TIMED_STEPS = 3
POINTS = 3
"""Fewer steps and depths than `fleetune-agent probe` takes, since a round waits for them; rounds correct what they tell."""

ROOM_SHARE = 0.9
"""Of the memory that is free: what else runs here may want some more."""

DEFAULT_BATCH_ROWS = 16


@dataclass(frozen=True)
class Wish:
    """What a task asks to measure. Without depths each block is trained alone, else everything from the loss down to a depth."""

    key: Key
    only: bool
    moments: bool


class Measures:
    """Figures of tasks. Owner of the files in the folder of figures while the agent runs."""

    def __init__(self, config: AgentConfig, threads: int) -> None:
        self._config = config
        self._threads = threads
        self._device = ""

    def wish(self, task: Task) -> Wish:
        """What `task` is about, measured or trained. UnsupportedError where it is of a method that does not plan."""
        message = messages_pb2.Task.FromString(task.encoded)
        payload = deft_pb2.DeftTask()
        if task.base is None or not message.payload.Unpack(payload):
            raise UnsupportedError(
                f"Method {task.method!r} asks what training costs, which this agent knows to measure for deft alone.", "Update the agent."
            )
        # A task of training names the depths of its part; what it corrects are the figures that the plan was made with.
        return self._wish(task, message, payload, only=not payload.depths)

    def _wish(self, task: Task, message: messages_pb2.Task, payload: deft_pb2.DeftTask, *, only: bool) -> Wish:
        self._device = self._device or keys.device(self._config.training.accelerator)
        moments = payload.payload == deft_pb2.DEFT_PAYLOAD_DELTA
        key = Key(
            base_digest=task.base.digest if task.base is not None else "",
            recipe_digest=keys.recipe_digest(message.recipe, only=only, moments=moments),
            batch_rows=int(payload.batch_size) or DEFAULT_BATCH_ROWS,
            torch_version=keys.torch_version(),
            device=self._device,
            dtype=message.recipe.dtype or "auto",
            threads=self._threads,
        )
        return Wish(key, only, moments)

    async def fresh(self, wish: Wish) -> Figures | None:
        """The stored figures while they hold."""
        held = await asyncio.to_thread(figures.load, self._config.state_dir, wish.key)
        if held is None:
            return None
        stale = freshness.stale(held.measured_unix_s, time.time(), freshness.settled(held.rounds))
        if stale:
            LOG.info("figures are measured again cause=%r", stale)
        return None if stale else held

    def fields(self, task: Task, wish: Wish, base_folder: str, held_bytes: int) -> dict[str, object]:
        """Of the request to the child."""
        return {
            "task": base64.b64encode(task.encoded).decode("ascii"),
            "base_folder": base_folder,
            "batch_rows": wish.key.batch_rows,
            "warmup_steps": WARMUP_STEPS,
            "timed_steps": TIMED_STEPS,
            "points": POINTS,
            "only": wish.only,
            "without_moments": not wish.moments,
            "room_bytes": self._room_bytes(held_bytes),
            "limits": {"threads": self._threads, "accelerator": self._config.training.accelerator},
        }

    async def keep(self, wish: Wish, answer: Mapping[str, object]) -> Figures:
        """The child's answer as figures, on disk from now on."""
        measured = Figures(wish.key, "measured", time.time(), dict(answer))
        await self._save(measured, durable=True)
        return measured

    async def observed(self, task: Task, report: bytes, held_bytes: int) -> bytes:
        """The report of a train task with the figures that it has corrected; as it was where there are none.

        `held_bytes` is what the training process has now.
        """
        told = messages_pb2.UpdateReport.FromString(report)
        done, asked = deft_pb2.DeftReport(), deft_pb2.DeftTask()
        message = messages_pb2.Task.FromString(task.encoded)
        try:
            if not (told.payload.Unpack(done) and message.payload.Unpack(asked)) or not (asked.depths and done.steps):
                return report
        except DecodeError:
            return report
        held = await self._used(task, message, asked)
        if held is None:
            return report
        corrected = corrected_by(held, max(asked.depths), done, int(told.samples))
        await self._save(corrected, durable=False)
        told.figures.CopyFrom(self.message(corrected, held_bytes))
        return told.SerializeToString()

    async def _used(self, task: Task, message: messages_pb2.Task, asked: deft_pb2.DeftTask) -> Figures | None:
        """The figures that such a task was planned with: everything down to a depth, or each block alone."""
        for only in (False, True):
            wish = self._wish(task, message, asked, only=only)
            held = await asyncio.to_thread(figures.load, self._config.state_dir, wish.key)
            if held is not None:
                return held
        return None

    def message(self, held: Figures, held_bytes: int) -> messages_pb2.Figures:
        """Figures as the coordinator gets them. `held_bytes` is what the training process has now, and could give to training."""
        answer = held.answer
        model, machine = _table(answer.get("model")), _table(answer.get("machine"))
        gpu_bytes = int(_number(model.get("gpu_room_bytes")))
        return messages_pb2.Figures(
            batch_rows=int(_number(model.get("batch_rows"))),
            step_s=curve.isotonic([held.rounds.corrected_s(seconds) for seconds in _numbers(model.get("step_s"))]),
            step_bytes=[math.ceil(value) for value in _numbers(model.get("step_bytes"))],
            loaded_bytes=int(_number(model.get("loaded_bytes"))),
            room_bytes=int(ROOM_SHARE * gpu_bytes) if gpu_bytes else self._room_bytes(held_bytes),
            forward_s=held.rounds.corrected_s(_number(model.get("forward_s"))),
            only_deepest=bool(model.get("only_deepest")),
            source=held.source,
            age_s=max(0.0, held.age_s()),
            ratio=held.rounds.average,
            margin=held.rounds.margin,
            flops_per_s=_number(model.get("flops_per_s")),
            peak_flops_per_s=_number(machine.get("peak_flops_per_s")),
            tokens_per_s=_number(model.get("tokens_per_s")),
        )

    def _room_bytes(self, held_bytes: int) -> int:
        """What the training process may take: a part of what is free and what it has, and no more than its owner allows."""
        configured = self._config.training.memory_mib * 1024**2
        free = int(ROOM_SHARE * (training_room().free_bytes + held_bytes))
        return min(free, configured) if configured else free

    async def _save(self, held: Figures, *, durable: bool) -> None:
        try:
            await asyncio.to_thread(figures.save, self._config.state_dir, held, durable=durable)
        except OSError as error:
            # A full disk must not keep a result from being sent; the figures would only be measured again after a restart.
            LOG.error("figures cannot be written cause=%r", str(error))


def corrected_by(held: Figures, deepest: int, done: deft_pb2.DeftReport, samples: int) -> Figures:
    """The figures after one more task: its real time against the predicted one, and its peak where that was above the reckoned one."""
    model = dict(_table(held.answer.get("model")))
    steps_s, sizes = _numbers(model.get("step_s")), _numbers(model.get("step_bytes"))
    rows = _number(model.get("batch_rows"))
    if not (0 < deepest <= len(steps_s) == len(sizes)) or rows <= 0:
        return held
    predicted_s = steps_s[deepest - 1] * samples / done.steps / rows
    rounds = held.rounds.observed(predicted_s, done.step_s)
    if done.step_peak_bytes <= sizes[deepest - 1] or done.batch_size > rows:
        return replace(held, rounds=rounds)
    raised = sizes[: deepest - 1] + [max(size, float(done.step_peak_bytes)) for size in sizes[deepest - 1 :]]
    model["step_bytes"] = [math.ceil(value) for value in raised]
    return replace(held, rounds=rounds, answer={**held.answer, "model": model})


def _table(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _numbers(value: object) -> list[float]:
    return [_number(one) for one in cast("list[object]", value)] if isinstance(value, list) else []
