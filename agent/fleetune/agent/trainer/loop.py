"""The optimiser steps of one round: batches that fit, accumulation, the proximal pull, and what is told on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import psutil
import torch

from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit, is_out_of_memory
from fleetune.errors import NotFiniteError
from fleetune.model import accelerator as accelerators
from fleetune.model.batches import Batch, Example, collate, endless_order
from fleetune.model.lora import AdaptedModel

LOGGED_STEPS = 5
"""A round leaves about this many lines in the device's log."""

ACTIVATION_SLACK = 1.6
"""Peak over saved activations: the temporaries of the forward pass and the gradients of the backward pass come on top."""

SKIPPED_STEPS_MAX = 20
"""Steps in a row whose float16 gradients overflow at ever smaller scales before the round is given up."""


@dataclass(frozen=True)
class Plan:
    """One round's steps. `total_rows` rows in steps of `step_rows` (the last may be smaller), `micro_rows` of them in one forward pass."""

    total_rows: int
    step_rows: int
    micro_rows: int
    rate: Callable[[int], float]
    weight_decay: float
    max_grad_norm: float
    proximal_mu: float
    seed: str
    memory_bytes: int | None
    # Of the order in which rows are gone through; empty: `seed`. With `first_row` a round goes on where the one before it ended.
    order_seed: str = ""
    first_row: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.total_rows / self.step_rows)


@dataclass(frozen=True)
class Outcome:
    """What a round of steps was: `micro_rows` is the forward batch that fitted, `step_s` the median seconds of a step."""

    steps: int
    samples: int
    mean_loss: float
    last_loss: float
    micro_rows: int
    step_s: float


Word = Literal["go", "changed", "stop"]


class Watcher(Protocol):
    """What a method does between the steps of a round."""

    def before(self, step: int, optimiser: torch.optim.Optimizer) -> Word:
        """Before step `step` (from 0): "changed" where the model is another one now, whose steps are timed anew; "stop" ends the round.

        The first step is always taken. No graph of an earlier pass is alive, no gradient is there.
        """
        ...

    def observe(self) -> None:
        """A step's gradients are there, as they are without a scale and before they are clipped."""
        ...


MicroStep = Callable[[AdaptedModel, Batch, float, "torch.amp.GradScaler"], torch.Tensor]
"""Forward and backward of one micro batch that is `share` of its step; returns its share of the step's loss."""


def train(
    adapted: AdaptedModel,
    items: Sequence[Example],
    plan: Plan,
    emit: Emit,
    anchors: Sequence[torch.Tensor] | None = None,
    row_costs: dict[int, int] | None = None,
    micro_step: MicroStep | None = None,
    parameters: Sequence[torch.nn.Parameter] | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Runs the plan's steps on the model, in place; with `parameters`, on these of its trainables alone; `watcher` looks on.

    A step's gradient is that of the mean loss over its rows (or target tokens) however many micro batches it takes; where memory
    is short the micro batch is halved and the step done again with the same rows. `anchors`, in the order of the trainables, are
    the global state that FedProx pulls to. Raises NotFiniteError when the loss becomes NaN or Inf.
    """
    torch.manual_seed(_seed(plan.seed))
    micro_rows = fitting_rows(adapted, items, plan, {} if row_costs is None else row_costs, emit)
    gradients = Gradients(adapted, micro_rows, emit, micro_step or backward)
    run = _Run(gradients, adapted.parameters if parameters is None else parameters, plan, emit, anchors, watcher)
    adapted.model.train()
    order = _order(len(items), plan)
    left = plan.total_rows
    for step in range(plan.steps):
        if not run.goes_on(step):
            break
        chosen = [items[index] for index in islice(order, min(plan.step_rows, left))]
        left -= len(chosen)
        run.step(step, chosen)
    adapted.model.zero_grad(set_to_none=True)
    return run.outcome()


def gradient(
    adapted: AdaptedModel,
    items: Sequence[Example],
    plan: Plan,
    emit: Emit,
    row_costs: dict[int, int] | None = None,
    micro_step: MicroStep | None = None,
) -> Outcome:
    """Leaves the gradient of the mean loss over the plan's rows in whatever requires one: no step, no clipping.

    However many micro batches it takes, it is the gradient of one batch of all rows. Raises NotFiniteError when the loss is NaN or
    Inf, or float16 overflows at every scale.
    """
    torch.manual_seed(_seed(plan.seed))
    micro_rows = fitting_rows(adapted, items, plan, {} if row_costs is None else row_costs, emit)
    pace = Pace(emit, "training")
    gradients = Gradients(adapted, micro_rows, emit, micro_step or backward, pace.at)
    adapted.model.train()
    adapted.model.zero_grad(set_to_none=True)
    chosen = [items[index] for index in islice(_order(len(items), plan), plan.total_rows)]
    started = time.monotonic()
    loss = gradients.unscaled(chosen)
    seconds = time.monotonic() - started
    emit("log", text=f"gradient of {len(chosen)} rows loss={loss:.4f} rows={gradients.micro_rows} seconds={seconds:.3g}")
    return Outcome(1, len(chosen), loss, loss, gradients.micro_rows, seconds)


def _order(count: int, plan: Plan) -> Iterator[int]:
    return endless_order(count, plan.order_seed or plan.seed, plan.first_row)


def backward(adapted: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """The plain micro step."""
    loss: torch.Tensor = adapted.model(**batch).loss
    if share != 1.0:
        loss = loss * share
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves this one unannotated
    return loss.detach().float()


class Gradients:
    """Gradients of the mean loss over a step's rows, in micro batches that fit: where memory is short they are halved for good."""

    def __init__(
        self,
        adapted: AdaptedModel,
        micro_rows: int,
        emit: Emit,
        micro_step: MicroStep,
        on_rows: Callable[[int, int], None] | None = None,
    ) -> None:
        self.adapted = adapted
        self.micro_rows = micro_rows
        half = any(parameter.dtype == torch.float16 for parameter in adapted.model.parameters())
        # Gradients that pass through float16 layers underflow unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(adapted.accelerator.kind, enabled=half)
        self._emit = emit
        self._micro_step = micro_step
        self._on_rows = on_rows

    def of(self, chosen: Sequence[Example]) -> torch.Tensor:
        """Adds the gradients to those that are there, scaled by the scaler; returns the mean loss, not yet read from the accelerator."""
        while True:
            try:
                return self._accumulate(chosen)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_rows == 1:
                    longest = max(len(item.ids) for item in chosen)
                    raise MemoryError(
                        f"One row of {longest} tokens does not fit into memory. "
                        "Lower `max_length`, set gradient_checkpointing, or use a smaller base."
                    ) from error
            # Outside of the handler: the error's traceback holds the tensors of the failed pass.
            self.adapted.model.zero_grad(set_to_none=True)
            accelerators.release_memory(self.adapted.accelerator)
            self.micro_rows = (self.micro_rows + 1) // 2
            self._emit("log", text=f"memory is short: {self.micro_rows} rows at once from here on, the same rows a step")

    def unscaled(self, chosen: Sequence[Example]) -> float:
        """Sets the gradients as they are without a scale, and returns the mean loss. Begins with none there."""
        for _ in range(SKIPPED_STEPS_MAX):
            loss = float(self.of(chosen))
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"The loss became {loss}.", "Lower the learning rate, bound max_grad_norm, or use dtype float32 or bfloat16."
                )
            if not self.scaler.is_enabled():
                return loss
            scale = self.scaler.get_scale()
            found = [parameter.grad for parameter in self.adapted.parameters if parameter.grad is not None]
            if all(bool(torch.isfinite(grad).all()) for grad in found):
                for grad in found:
                    grad.div_(scale)
                return loss
            self.scaler.update(scale / 2)
            self.adapted.model.zero_grad(set_to_none=True)
        raise _overflowing(SKIPPED_STEPS_MAX)

    def _accumulate(self, chosen: Sequence[Example]) -> torch.Tensor:
        terms = sum(item.loss_terms for item in chosen)
        total: torch.Tensor | None = None
        for begin in range(0, len(chosen), self.micro_rows):
            some = chosen[begin : begin + self.micro_rows]
            share = sum(item.loss_terms for item in some) / terms
            batch = collate(some, self.adapted.tokenizer.pad_token_id, self.adapted.accelerator.device)
            loss = self._micro_step(self.adapted, batch, share, self.scaler)
            total = loss if total is None else total + loss
            if self._on_rows is not None:
                self._on_rows(min(begin + len(some), len(chosen)), len(chosen))
        assert total is not None
        return total


def _overflowing(times: int) -> NotFiniteError:
    return NotFiniteError(
        f"The gradients overflow float16 in {times} steps in a row.", "Use dtype bfloat16 or float32, or lower the learning rate."
    )


class _Run:
    """The state of one call of `train`: optimiser, counters, losses not yet read from the accelerator."""

    def __init__(
        self,
        gradients: Gradients,
        parameters: Sequence[torch.nn.Parameter],
        plan: Plan,
        emit: Emit,
        anchors: Sequence[torch.Tensor] | None,
        watcher: Watcher | None = None,
    ) -> None:
        self._watcher = watcher
        self._gradients = gradients
        self._adapted = gradients.adapted
        self._plan = plan
        self._emit = emit
        self._anchors = anchors if plan.proximal_mu > 0 else None
        self._parameters = list(parameters)
        self._optimiser = torch.optim.AdamW(self._parameters, lr=plan.rate(0), weight_decay=plan.weight_decay)
        self._scaler = gradients.scaler
        self._skipped = 0
        self._pace = Pace(emit, "training")
        self._log_every = max(1, plan.steps // LOGGED_STEPS)
        self._unread: list[torch.Tensor] = []
        self._read_at = time.monotonic()
        self._step_seconds: list[float] = []
        self._loss_sum = 0.0
        self._last_loss = 0.0
        self._steps = 0
        self._samples = 0

    def goes_on(self, step: int) -> bool:
        """Asks the watcher, before a step."""
        if self._watcher is None:
            return True
        word = self._watcher.before(step, self._optimiser)
        if word != "go":
            self._read()
        if word == "changed":
            self._step_seconds.clear()
            self._read_at = time.monotonic()
        return word != "stop" or self._steps == 0

    def step(self, step: int, chosen: Sequence[Example]) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._plan.rate(step)
        self._unread.append(self._gradients.of(chosen))
        self._scaler.unscale_(self._optimiser)
        if self._watcher is not None:
            self._watcher.observe()
        if self._anchors is not None:
            _pull(self._parameters, self._anchors, self._plan.proximal_mu)
        if self._plan.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._plan.max_grad_norm)
        self._scaler.step(self._optimiser)
        self._watch_scale()
        self._optimiser.zero_grad(set_to_none=True)
        self._steps += 1
        self._samples += len(chosen)
        self._tell()

    def _watch_scale(self) -> None:
        if not self._scaler.is_enabled():
            return
        before = self._scaler.get_scale()
        self._scaler.update()
        self._skipped = self._skipped + 1 if self._scaler.get_scale() < before else 0
        if self._skipped >= SKIPPED_STEPS_MAX:
            raise _overflowing(self._skipped)

    def _tell(self) -> None:
        """Reads the losses and tells of them. On a GPU reading waits for the device, so it is done only when something is due."""
        due = self._pace.due(self._steps, self._plan.steps)
        if not due and self._adapted.accelerator.kind != "cpu":
            return
        self._read()
        if due:
            self._pace.at(self._steps, self._plan.steps, self._last_loss)
        if self._steps % self._log_every == 0 or self._steps == self._plan.steps:
            rate = self._plan.rate(self._steps - 1)
            self._emit(
                "log",
                text=f"step {self._steps}/{self._plan.steps} loss={self._last_loss:.4f} rate={rate:.3g} rows={self._gradients.micro_rows}",
            )

    def _read(self) -> None:
        if not self._unread:
            return
        losses = [float(loss) for loss in (self._unread[0].reshape(1) if len(self._unread) == 1 else torch.stack(self._unread)).tolist()]
        now = time.monotonic()
        self._step_seconds.append((now - self._read_at) / len(losses))
        self._read_at = now
        self._unread.clear()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"The loss became {loss} in step {self._steps - len(losses) + offset + 1} of {self._plan.steps}.",
                    "Lower the learning rate, bound max_grad_norm, or use dtype float32 or bfloat16.",
                )
        self._loss_sum += math.fsum(losses)
        self._last_loss = losses[-1]

    def outcome(self) -> Outcome:
        return Outcome(
            self._steps,
            self._samples,
            self._loss_sum / self._steps,
            self._last_loss,
            self._gradients.micro_rows,
            statistics.median(self._step_seconds),
        )


@torch.no_grad()
def _pull(parameters: Sequence[torch.nn.Parameter], anchors: Sequence[torch.Tensor], mu: float) -> None:
    """Adds the gradient of mu/2 ||w - w_t||^2."""
    for parameter, anchor in zip(parameters, anchors, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - anchor, alpha=mu)


def fitting_rows(adapted: AdaptedModel, items: Sequence[Example], plan: Plan, row_costs: dict[int, int], emit: Emit) -> int:
    """Rows of one forward pass that stay within the plan's memory, halving from its wish; at least 1.

    Only for the CPU, where too much memory ends in a kill by the system instead of an error that could be caught. `row_costs` maps
    a length in tokens to the bytes that one such row keeps for its backward pass; it is measured once and kept by the caller.
    """
    wished = plan.micro_rows
    if plan.memory_bytes is None or adapted.accelerator.kind != "cpu":
        return wished
    longest = max(items, key=lambda item: len(item.ids))
    tokens = len(longest.ids)
    if tokens not in row_costs:
        row_costs[tokens] = saved_bytes(adapted, longest)
    room = plan.memory_bytes - psutil.Process().memory_info().rss
    rows = wished
    while rows > 1 and rows * row_costs[tokens] * ACTIVATION_SLACK > room:
        rows = (rows + 1) // 2
    if rows < wished:
        cost = row_costs[tokens]
        emit(
            "log",
            text=f"{rows} rows at once instead of {wished}: a row of {tokens} tokens keeps {cost} bytes, {max(room, 0)} are free",
        )
    return rows


def saved_bytes(adapted: AdaptedModel, item: Example) -> int:
    """Bytes that a forward pass over one row keeps for the backward pass, counted where autograd stores them."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output that is kept as it is would hold the graph that holds it: a circle that nothing collects.
        return tensor.detach()

    adapted.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = adapted.model(**collate([item], adapted.tokenizer.pad_token_id, adapted.accelerator.device))
    logits = output.logits
    return sum(kept.values()) + int(logits.numel() * logits.element_size())


def _seed(text: str) -> int:
    """Torch takes a number; the text's characters make one that is the same everywhere."""
    value = 0
    for byte in text.encode():
        value = (value * 257 + byte + 1) % (1 << 63)
    return value
