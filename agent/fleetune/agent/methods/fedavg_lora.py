"""Method `fedavg_lora`: some optimiser steps on the device's own rows; what comes back is how the adapter moved.

FedAvg (McMahan et al. 2017) of LoRA pairs and head; with FedProx (Li et al. 2020) the local objective is
F_k(w) + mu/2 ||w - w_t||^2, whose second term pulls towards the global state. AdamW starts anew each round: moments of
another state's gradients would be wrong and would have to travel.

| symbol | name |
| --- | --- |
| w_t | the state that was loaded, `anchors` |
| w_k | the model's trainables after the steps |
| Delta_k = w_k - w_t | the update, in `update_dtype` |
| n_k | `samples`: rows seen, once per pass |
| eta | `learning_rate`, times the schedule |
| E | `epochs`, or `steps` |
| mu | `proximal_mu` |

Siblings: proto/fleetune/methods/v1/fedavg_lora.proto, coordinator/fleetune/coordinator/methods/fedavg_lora.py.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch

from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer import data, loop, schedule
from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.errors import DataError, NotFiniteError, UnsupportedError
from fleetune.methods.v1 import fedavg_lora_pb2
from fleetune.model import adapter, evaluation
from fleetune.model.lora import AdaptedModel
from fleetune.v1 import messages_pb2

UPDATE_DTYPES = {"": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_BATCH_ROWS = 16


def train(work: Work, emit: Emit) -> Trained:
    """Local training from the global state; writes the delta to `work.out_path`."""
    name = work.task.recipe.data.name
    if work.out_path is None or work.data is None:
        raise DataError(f"This device has no rows for the data {name!r}.", "Name the file of this data in the device's configuration.")
    if work.data.train is None:
        raise DataError(
            f"This device has only validation rows of {name!r}, none to train on.",
            f"Set data.{name}.train in its configuration, or let it measure only: a coordinator of its version asks it for nothing else.",
        )
    task = _payload(work)
    started = time.monotonic()
    session = data.session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
    examples = session.examples(work.data.train.path, work.data.train.file_format, emit)
    adapted = session.adapted
    adapter.load_state(adapted, work.state_path, work.task.trainables_digest)
    anchors = [parameter.detach().clone() for parameter in adapted.parameters]
    loaded = time.monotonic()
    plan = _plan(task, work, len(examples))
    outcome = loop.train(adapted, examples.items, plan, emit, anchors if task.proximal_mu > 0 else None, session.row_costs)
    trained = time.monotonic()
    written, norm = write_delta(work.out_path, adapted, anchors, task.update_dtype)
    report = messages_pb2.UpdateReport(samples=outcome.samples, peak_rss_bytes=peak_rss_bytes())
    report.metrics.add(name="loss", value=outcome.mean_loss)
    for name, seconds in (("load", loaded - started), ("train", trained - loaded), ("write", time.monotonic() - trained)):
        report.seconds.add(name=name, value=seconds)
    report.payload.Pack(
        fedavg_lora_pb2.FedavgLoraReport(
            steps=outcome.steps,
            mean_loss=outcome.mean_loss,
            last_loss=outcome.last_loss,
            batch_size=outcome.micro_rows,
            step_s=outcome.step_s,
            update_norm=norm,
        )
    )
    return Trained(report, written.digest, written.size_bytes)


def evaluate(work: Work, emit: Emit) -> messages_pb2.Evaluation:
    """The state's metrics on the device's own validation rows; 0 rows, which weigh nothing, where it has none."""
    result = messages_pb2.Evaluation()
    if work.data is None or work.data.validation is None:
        emit("log", text="no validation rows on this device")
        return result
    session = data.session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
    examples = session.examples(work.data.validation.path, work.data.validation.file_format, emit, session.adapted.recipe.evaluation_rows)
    adapter.load_state(session.adapted, work.state_path, work.task.trainables_digest)
    progress = Pace(emit, "evaluating")
    measured = evaluation.evaluate(session.adapted, examples.items, on_progress=progress.at)
    for name, value in measured.metrics.items():
        result.metrics.add(name=name, value=value)
    result.rows = measured.rows
    return result


def _payload(work: Work) -> fedavg_lora_pb2.FedavgLoraTask:
    task = fedavg_lora_pb2.FedavgLoraTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The task holds {work.task.payload.type_url!r}, FedavgLoraTask is expected.", "Use the same version of Fleetune on both sides."
        )
    if task.update_dtype not in UPDATE_DTYPES:
        raise UnsupportedError(
            f"update_dtype {task.update_dtype!r} is not known; allowed: float32, bfloat16, float16.", "Correct `update_dtype` in the job."
        )
    return task


def _plan(task: fedavg_lora_pb2.FedavgLoraTask, work: Work, rows: int) -> loop.Plan:
    batch_rows = int(task.batch_size) or DEFAULT_BATCH_ROWS
    # A step never sees a row twice, so a device with few rows takes smaller steps.
    step_rows = min(batch_rows * max(int(task.gradient_accumulation), 1), rows)
    total_rows = step_rows * int(task.steps) if task.steps else max(1, round((task.epochs or 1.0) * rows))
    steps = math.ceil(total_rows / step_rows)
    offset = int(task.schedule_offset)
    return loop.Plan(
        total_rows=total_rows,
        step_rows=step_rows,
        micro_rows=min(batch_rows, step_rows),
        rate=partial(
            schedule.learning_rate,
            peak=task.learning_rate,
            name=task.schedule or "constant",
            warmup_steps=int(task.warmup_steps),
            # A coordinator that counts in epochs cannot know each device's steps; the schedule then ends with this round.
            total_steps=int(task.schedule_total) or offset + steps,
            offset=offset,
        ),
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_grad_norm,
        proximal_mu=task.proximal_mu,
        seed=f"{work.task.seed}/{work.task.round}",
        memory_bytes=work.limits.memory_bytes,
    )


def write_delta(path: Path, adapted: AdaptedModel, anchors: list[torch.Tensor], update_dtype: str) -> tuple[adapter.WrittenFile, float]:
    """The update file (metadata fleetune.update=delta) and the Euclidean norm of the delta before it is narrowed.

    Raises NotFiniteError when a value is NaN or Inf, also when only the narrow type cannot hold it.
    """
    dtype = UPDATE_DTYPES[update_dtype]
    deltas: dict[str, torch.Tensor] = {}
    squares = 0.0
    for trainable, anchor in zip(adapted.trainables, anchors, strict=True):
        delta = trainable.parameter.detach() - anchor
        narrowed = delta.to(dtype)
        if not bool(torch.isfinite(narrowed).all()):
            largest = float(delta.abs().max())
            raise NotFiniteError(
                f"The update of {trainable.name} is not finite in {update_dtype or 'float32'} (largest value {largest:g}).",
                "Lower the learning rate, bound max_grad_norm, or use a wider update_dtype.",
            )
        squares += float(delta.double().square().sum()) if delta.device.type != "mps" else float(delta.square().sum())
        deltas[trainable.name] = narrowed
    # No sync: until the coordinator's receipt the task can be done again.
    return adapter.write_tensors(path, deltas, {"fleetune.update": "delta"}, durable=False), math.sqrt(squares)
