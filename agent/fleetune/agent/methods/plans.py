"""A round's steps from what a task says of them: the same for every method whose devices take steps along their own rows."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from fleetune import schedule
from fleetune.agent.methods.work import Work
from fleetune.agent.trainer import loop

DEFAULT_BATCH_ROWS = 16


class Training(Protocol):
    """The fields that the methods' task messages have in common."""

    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule_offset(self) -> int: ...
    @property
    def schedule_total(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


def batch_rows(task: Training) -> int:
    """Rows of one forward pass, where they fit."""
    return int(task.batch_size) or DEFAULT_BATCH_ROWS


def plan(
    task: Training, work: Work, rows: int, *, steps: int, epochs: float = 0.0, extra_steps: int = 0, proximal_mu: float = 0.0
) -> loop.Plan:
    """`steps` steps, or `epochs` times all rows where that is 0 (once where both are).

    `extra_steps` come on top, at the rate of the round's first: all devices leave the round at the same place of the schedule.
    """
    # A step never sees a row twice, so a device with few rows takes smaller steps.
    step_rows = min(batch_rows(task) * max(int(task.gradient_accumulation), 1), rows)
    total_rows = step_rows * (steps + extra_steps) if steps else max(1, round((epochs or 1.0) * rows))
    due = -(-total_rows // step_rows)
    offset = int(task.schedule_offset)
    rate = partial(
        schedule.learning_rate,
        peak=task.learning_rate,
        name=task.schedule or "constant",
        warmup_steps=int(task.warmup_steps),
        # A coordinator that counts in epochs cannot know each device's steps; the schedule then ends with this round.
        total_steps=int(task.schedule_total) or offset + due,
        offset=offset,
    )
    return loop.Plan(
        total_rows=total_rows,
        step_rows=step_rows,
        micro_rows=min(batch_rows(task), step_rows),
        rate=(lambda step: rate(max(0, step - extra_steps))) if extra_steps else rate,
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_grad_norm,
        proximal_mu=proximal_mu,
        seed=f"{work.task.seed}/{work.task.round}",
        memory_bytes=work.limits.memory_bytes,
    )
