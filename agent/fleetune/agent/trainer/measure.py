"""How fast this machine trains a job's model down to each depth, and in how much memory: request `measure` of the training child."""

from __future__ import annotations

import base64
import math
import random
import statistics
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fleetune.agent.probe import curve
from fleetune.agent.trainer import data
from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.errors import ModelError
from fleetune.model import accelerator as accelerators
from fleetune.model import depths, flops, lora, peaks, recipe
from fleetune.model.accelerator import Accelerator
from fleetune.model.batches import Batch, Example, collate
from fleetune.model.depths import DepthBlock
from fleetune.model.lora import AdaptedModel
from fleetune.model.recipe import CAUSAL_LM, CLASSIFICATION
from fleetune.v1 import messages_pb2

WARMUP_STEPS = 3
REWARM_STEPS = 1
"""Of every depth after the first: the model is hot by then, and only the heap begins anew."""

TIMED_STEPS = 5
TIMED_STEPS_MIN = 2
STEADY = 0.05
"""No more steps are timed once the slowest is within this part of the fastest: another would tell nothing new."""

DEPTH_BUDGET_S = 60.0
"""A slow board takes fewer steps per depth than it should rather than half an hour; at least one warm-up and two timed ones."""

PEAK_MARGIN = 1.2
"""Memory that a planner reckons with, over the measured peak: rows of other lengths cut the heap into other pieces."""

HEAP_FACTOR = 2.0
"""Resident over accounted bytes where the peak cannot be measured: glibc's heap was seen to take 1.6 to 2.0 times what is alive."""

_MUCH = 1 << 62

MATMUL_SIZES = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096, 8192), "mps": (512, 1024, 2048)}
MATMUL_S = 0.3
"""Seconds spent on each size."""


@dataclass(frozen=True)
class Point:
    """One measured depth. `cpu_s` is all threads' time of a step; `accounted_bytes` is what must be alive.

    `run_rows` is fewer than the batch's where all of it would not fit: times are then scaled up, and no peak is known. `peak_bytes` is
    above the loaded model, and None where nothing tells.
    """

    depth: int
    run_rows: int
    step_s: float
    spread_s: float
    cpu_s: float
    timed_steps: int
    saved_bytes: int
    accounted_bytes: int
    peak_bytes: int | None
    flops: int


def measure(fields: Mapping[str, object], emit: Emit) -> dict[str, object]:
    """Answers with figures of the machine and, where `base_folder` and `recipe` are given, of that model on it.

    Fields: base_folder, recipe (base64 of fleetune.v1.Recipe), batch_rows, depths (list, None: a few), points (how many those are),
    warmup_steps (of the first depth), timed_steps (at most), only (train nothing but the block at the depth), without_moments
    (gradients are sent, so no optimiser lives here), room_bytes (what this process may take; no step is tried that would take more),
    limits as for `train`. With task (base64 of fleetune.v1.Task) in
    place of recipe the model is the one that the job's training keeps warm.
    """
    limits = cast("Mapping[str, object]", fields.get("limits") or {})
    accelerator = accelerators.pick(str(limits.get("accelerator") or "auto"))
    threads = accelerators.set_threads(int(str(limits.get("threads") or 0)))
    folder = fields.get("base_folder")
    task = messages_pb2.Task.FromString(base64.b64decode(str(fields["task"]))) if fields.get("task") else None
    asked = task.recipe if task is not None else messages_pb2.Recipe.FromString(base64.b64decode(str(fields.get("recipe") or "")))
    known = recipe.from_proto(asked) if folder else None
    dtype = (accelerators.base_dtype(known.dtype if known else "auto", accelerator)) or torch.float32
    machine = _machine(accelerator, threads, dtype, emit)
    answer: dict[str, object] = {"machine": machine}
    if known is None or not folder:
        return answer
    if task is not None:
        session = data.session(task, Path(str(folder)), str(limits.get("accelerator") or "auto"), threads, emit)
        adapted, loaded_bytes = session.adapted, session.loaded_bytes
    else:
        emit("progress", stage="loading", done=0, total=1)
        adapted = lora.load(Path(str(folder)), known, accelerator, seed=1)
        # Before any step: what a step leaves on the heap would count twice.
        loaded_bytes = peaks.present_bytes(accelerator)
        emit("progress", stage="loading", done=1, total=1)
    wanted = cast("Sequence[int] | None", fields.get("depths"))
    wishes = _Wishes(
        rows=int(str(fields.get("batch_rows") or 16)),
        warmup=int(str(fields.get("warmup_steps") or WARMUP_STEPS)),
        timed=int(str(fields.get("timed_steps") or TIMED_STEPS)),
        only=bool(fields.get("only")),
        moments=not fields.get("without_moments"),
        room_bytes=int(str(fields.get("room_bytes") or 0)),
    )
    model = _Bench(adapted, loaded_bytes, wishes, emit).run(wanted, int(str(fields.get("points") or curve.POINTS)))
    answer["model"] = model
    # Of the peak that this device reaches itself, not of a data sheet's.
    answer["mfu"] = float(str(model["flops_per_s"])) / float(str(machine["peak_flops_per_s"]))
    return answer


@dataclass(frozen=True)
class _Wishes:
    """How to measure. `room_bytes` 0 is no bound."""

    rows: int
    warmup: int
    timed: int
    only: bool
    moments: bool
    room_bytes: int


@dataclass(frozen=True)
class _Timed:
    """Several runs of the same: the middle one's seconds, the spread between their quartiles, and the mean of all threads' seconds."""

    median_s: float
    spread_s: float
    cpu_s: float
    steps: int


class _Bench:
    """One model and one batch of full length, whose tokens are made up: time and memory do not depend on what they say."""

    def __init__(self, adapted: AdaptedModel, loaded_bytes: int, wishes: _Wishes, emit: Emit) -> None:
        self._adapted = adapted
        self._accelerator = adapted.accelerator
        self._wishes = wishes
        self._emit = emit
        self._rows = wishes.rows
        self._blocks = depths.depth_blocks(adapted)
        self._examples = _examples(adapted, wishes.rows)
        self._row_bytes = 0
        self._loaded_bytes = loaded_bytes
        self._room_bytes = min(wishes.room_bytes or _MUCH, _gpu_room_bytes(adapted.accelerator) or _MUCH)
        # Weights are mapped from their file: on a CPU they become resident in the first pass, after the model counts as loaded.
        weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in adapted.model.parameters())
        self._mapped_bytes = weights_bytes if adapted.accelerator.kind == "cpu" else 0
        # Of the depths so far, resident over accounted bytes.
        self._factor = HEAP_FACTOR if adapted.accelerator.kind == "cpu" else PEAK_MARGIN
        adapted.model.train()

    def run(self, wanted: Sequence[int] | None, points_wanted: int) -> dict[str, object]:
        count = len(self._blocks)
        chosen = sorted(set(wanted)) if wanted else curve.chosen_depths(count, points_wanted)
        if chosen[0] < 1 or chosen[-1] > count:
            raise ModelError(f"Depths {chosen} are asked for; this model has depths 1 to {count}.", "Name depths that it has.")
        progress = Pace(self._emit, "measuring")
        total = len(chosen) + 1
        points: list[Point] = []
        for number, depth in enumerate(chosen):
            progress.at(number, total)
            points.append(self._point(depth, REWARM_STEPS if points else self._wishes.warmup))
        progress.at(len(chosen), total)
        forward = self._forward(points[0].run_rows)
        progress.at(total, total)
        return self._answer(forward, points)

    def _batch_of(self, rows: int) -> Batch:
        return collate(self._examples[:rows], _pad_id(self._adapted), self._accelerator.device)

    def _point(self, depth: int, warmup: int) -> Point:
        trained = self._blocks[depth - 1 : depth] if self._wishes.only else self._blocks[:depth]
        parameters = [parameter for block in trained for parameter in block.parameters]
        # Gradients, and beside them the two moments of AdamW.
        trained_bytes = (3 if self._wishes.moments else 1) * sum(block.size_bytes for block in trained)
        with depths.training_only(self._adapted, trained):
            optimiser = torch.optim.AdamW(parameters, lr=1e-6) if self._wishes.moments else None
            saved, step_flops = self._counted(trained)
            run_rows = self._fitting_rows(trained_bytes)
            batch = self._batch_of(run_rows)
            scale = self._rows / run_rows

            def step() -> None:
                self._adapted.model(**batch).loss.backward()
                if optimiser is not None:
                    optimiser.step()
                self._adapted.model.zero_grad(set_to_none=True)

            # The steps that are timed show the memory as well: nothing is run for the one alone.
            accelerators.release_memory(self._accelerator)
            told = peaks.forget(self._accelerator)
            timed = self._timings(step, warmup)
            highest = peaks.highest_bytes(self._accelerator) if told else None
        self._emit("log", text=f"depth {depth} of {len(self._blocks)}: {1e3 * timed.median_s * scale:.1f} ms for {self._rows} rows")
        accounted = saved + trained_bytes + self._workspace_bytes()
        # Above the model as it was loaded: what the first passes leave behind, plans and buffers of the kernels, stays for good.
        peak = max(0, highest - self._loaded_bytes) if highest is not None and run_rows == self._rows else None
        if peak is not None:
            self._factor = max(1.0, peak / accounted) * PEAK_MARGIN
        return Point(
            depth,
            run_rows,
            timed.median_s * scale,
            timed.spread_s * scale,
            timed.cpu_s * scale,
            timed.steps,
            saved,
            accounted,
            peak,
            step_flops,
        )

    def _counted(self, trained: Sequence[DepthBlock]) -> tuple[int, int]:
        """Bytes that a step over all rows keeps for its backward pass, and its operations: each row adds as much as the second does."""
        one = self._batch_of(1)
        with flops.counting(self._adapted.model) as counted:
            self._row_bytes = first = depths.saved_bytes(self._adapted, one)
        if self._rows > 1:
            self._row_bytes = depths.saved_bytes(self._adapted, self._batch_of(2)) - first
        return first + (self._rows - 1) * self._row_bytes, counted.step * self._rows + self._attention(trained).step

    def _fitting_rows(self, trained_bytes: int) -> int:
        """Rows of which a step is sure to stay within the room, by what one of them keeps: a process that takes more may be killed."""
        if self._room_bytes >= _MUCH:
            return self._rows
        row_bytes = self._row_bytes + self._workspace_bytes() / self._rows
        rows = self._rows
        held = self._loaded_bytes + self._mapped_bytes
        while rows > 1 and held + self._factor * (rows * row_bytes + trained_bytes) > self._room_bytes:
            rows = (rows + 1) // 2
        return rows

    def _timings(self, step: Callable[[], None], warmup: int) -> _Timed:
        """Of some runs, within the budget; fewer where they agree."""
        began = time.monotonic()
        for number in range(warmup):
            step()
            if number and time.monotonic() - began > DEPTH_BUDGET_S / 3:
                break
        self._wait()
        seconds: list[float] = []
        cpu_began = time.process_time()
        most = max(self._wishes.timed, 1)
        while len(seconds) < most:
            if len(seconds) >= min(most, TIMED_STEPS_MIN) and (
                max(seconds) <= (1 + STEADY) * min(seconds) or time.monotonic() - began > DEPTH_BUDGET_S
            ):
                break
            started = time.perf_counter()
            step()
            self._wait()
            seconds.append(time.perf_counter() - started)
        cpu_s = (time.process_time() - cpu_began) / len(seconds)
        ordered = sorted(seconds)
        spread = ordered[(3 * (len(ordered) - 1)) // 4] - ordered[(len(ordered) - 1) // 4]
        return _Timed(statistics.median(ordered), spread, cpu_s, len(ordered))

    def _forward(self, rows: int) -> _Timed:
        """Of a pass over all rows that keeps nothing, measured on so many of them."""
        batch = self._batch_of(rows)

        def run() -> None:
            with torch.no_grad():
                self._adapted.model(**batch)

        timed = self._timings(run, 0)  # it has just run as a part of every step
        scale = self._rows / rows
        return _Timed(timed.median_s * scale, timed.spread_s * scale, timed.cpu_s * scale, timed.steps)

    def _wait(self) -> None:
        if self._accelerator.kind == "cuda":
            torch.cuda.synchronize()
        elif self._accelerator.kind == "mps":
            torch.mps.synchronize()

    def _tokens(self) -> int:
        return len(self._examples[0].ids)

    def _widths(self) -> tuple[int, int]:
        """(hidden size, widest layer inside) in values per token."""
        config = self._adapted.model.config
        hidden = next((int(value) for name in ("hidden_size", "d_model", "n_embd") if (value := getattr(config, name, None))), 0)
        inner = next(
            (int(value) for name in ("intermediate_size", "d_ff", "n_inner") if (value := getattr(config, name, None))), 4 * hidden
        )
        return hidden, inner

    def _attention(self, trained: Sequence[DepthBlock]) -> flops.Count:
        hidden, _ = self._widths()
        layers = [block for block in self._blocks if "layer." in block.name]
        deepest = trained[-1]
        crossed = len([block for block in layers if self._blocks.index(block) <= self._blocks.index(deepest)])
        return flops.attention(self._rows, self._tokens(), hidden, len(layers), crossed)

    def _workspace_bytes(self) -> int:
        """What one layer has alive for a moment and keeps no further: four of its widest activations, and the logits twice."""
        hidden, inner = self._widths()
        config = self._adapted.model.config
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        tokens = self._rows * self._tokens()
        scores = self._rows * heads * self._tokens() ** 2
        outputs = self._rows * len(self._adapted.recipe.labels)
        if self._adapted.recipe.model_task != CLASSIFICATION:
            outputs = tokens * int(getattr(config, "vocab_size", 0) or 0)
        return 4 * (4 * tokens * max(hidden, inner) + 2 * outputs + (scores if hidden and heads else 0))

    def _reckoned_bytes(self, point: Point) -> int:
        """What a planner reckons with at a depth: the measured peak with a margin, never less than what must be alive."""
        if point.peak_bytes is None:
            return math.ceil(point.accounted_bytes * self._factor) + self._mapped_bytes
        return math.ceil(point.peak_bytes * PEAK_MARGIN)

    def _answer(self, forward: _Timed, points: Sequence[Point]) -> dict[str, object]:
        count = len(self._blocks)
        steps_s = {point.depth: point.step_s for point in points}
        intercept, slope, explained = curve.affine(steps_s)
        deepest = points[-1]
        reckoned = {point.depth: float(self._reckoned_bytes(point)) for point in points}
        tokens = self._rows * self._tokens()
        return {
            "blocks": [
                {
                    "name": block.name,
                    "tensors": list(block.tensor_names),
                    "parameters": block.parameter_count,
                    "size_bytes": block.size_bytes,
                }
                for block in self._blocks
            ],
            "batch_rows": self._rows,
            "tokens_per_row": self._tokens(),
            "forward_s": forward.median_s,
            "forward_spread_s": forward.spread_s,
            "points": [dict(vars(point)) for point in points],
            "step_s": curve.filled(steps_s, count),
            "line": {"intercept_s": intercept, "slope_s": slope, "explained": explained},
            "saved_bytes": [round(value) for value in curve.filled({point.depth: float(point.saved_bytes) for point in points}, count)],
            "step_bytes": [math.ceil(value) for value in curve.filled(reckoned, count)],
            "step_bytes_source": "measured" if all(point.peak_bytes is not None for point in points) else "accounted",
            "loaded_bytes": self._loaded_bytes,
            "mapped_bytes": self._mapped_bytes,
            "gpu_room_bytes": _gpu_room_bytes(self._accelerator),
            "only_deepest": self._wishes.only,
            "tokens_per_s": tokens / deepest.step_s,
            "step_flops": [round(value) for value in curve.filled({point.depth: float(point.flops) for point in points}, count)],
            "flops_per_s": deepest.flops / deepest.step_s,
        }


def _gpu_room_bytes(accelerator: Accelerator) -> int:
    """What a GPU has free and what of it this process holds already; 0 without one."""
    if accelerator.kind != "cuda":
        return 0
    return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())


def _machine(accelerator: Accelerator, threads: int, dtype: torch.dtype, emit: Emit) -> dict[str, object]:
    """What the accelerator is and the best rate at which it multiplies matrices."""
    sizes = MATMUL_SIZES[accelerator.kind]
    progress = Pace(emit, "matmul")
    rates: dict[str, float] = {}
    for number, size in enumerate(sizes):
        progress.at(number, len(sizes))
        rates[str(size)] = _matmul_rate(size, accelerator, dtype)
    progress.at(len(sizes), len(sizes))
    answer: dict[str, object] = {
        "accelerator": accelerator.kind,
        "accelerator_name": torch.cuda.get_device_name() if accelerator.kind == "cuda" else "",
        "torch_version": str(torch.__version__),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_s": rates,
        "peak_flops_per_s": max(rates.values()),
    }
    if accelerator.kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        answer |= {"gpu_memory_free_bytes": free, "gpu_memory_total_bytes": total}
    return answer


def _matmul_rate(size: int, accelerator: Accelerator, dtype: torch.dtype) -> float:
    """Operations per second of the fastest square product of this size."""
    left = torch.randn(size, size, device=accelerator.device).to(dtype)
    right = torch.randn(size, size, device=accelerator.device).to(dtype)
    best = math.inf
    began = time.monotonic()
    runs = 0
    while runs < 3 or time.monotonic() - began < MATMUL_S:
        started = time.perf_counter()
        product = left @ right
        if accelerator.kind == "cuda":
            torch.cuda.synchronize()
        elif accelerator.kind == "mps":
            torch.mps.synchronize()
        best = min(best, time.perf_counter() - started)
        runs += 1
        del product
    return 2.0 * size**3 / best


def _examples(adapted: AdaptedModel, rows: int) -> list[Example]:
    known = adapted.recipe
    source = random.Random(1)
    vocabulary = int(adapted.model.get_input_embeddings().num_embeddings)
    length = known.data.max_length_tokens
    config = adapted.model.config
    longest = _setting(config, "max_position_embeddings", "n_positions") or length
    # RoBERTa's positions begin after its padding token.
    length = max(1, min(length, longest - (_pad_id(adapted) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)))

    def tokens(count: int) -> array[int]:
        pad = _pad_id(adapted)
        return array("i", (token if token != pad else (token + 1) % vocabulary for token in source.choices(range(vocabulary), k=count)))

    examples: list[Example] = []
    for number in range(rows):
        ids = tokens(length)
        if known.model_task == CLASSIFICATION:
            examples.append(Example(ids, None, None, number % len(known.labels), 1))
        else:
            labels = ids if known.model_task == CAUSAL_LM else tokens(known.data.max_target_length_tokens)
            examples.append(Example(ids, None, labels, -1, len(labels)))
    return examples


def _setting(config: object, *names: str) -> int | None:
    """The first of a configuration's settings that is there: families of models name the same thing differently."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), None)


def _pad_id(adapted: AdaptedModel) -> int:
    return int(adapted.tokenizer.pad_token_id or 0)
