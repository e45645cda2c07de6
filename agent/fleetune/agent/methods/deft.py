"""Method `deft`: the device trains the blocks that the round's plan gave it, and autograd stops at the deepest of them.

After LoLa-DEFT (Wu, Chen, Huang 2024), reconstructed from its abstract. What goes up is by default the mean gradient over this round's
rows: the coordinator holds parameters and AdamW's moments, puts the blocks of all devices together, clips and steps, so a round over
one shared batch is one centralised step. Deltas are for several local steps; the other blocks then stay as they were.

Below the deepest block autograd keeps and computes nothing, which is what makes memory grow with depth. Whatever makes the model's
inputs require gradients (`enable_input_require_grads`) would undo it and has no place on this path.

| symbol | name |
| --- | --- |
| l | depth: 1 is next to the loss, `depth_count` next to the embeddings |
| B_k (the device's blocks) | `depths` |
| w_t | the state that was loaded |
| n_k | `samples`: rows seen, once per pass |
| g_k = grad of the mean loss over n_k rows, in B_k | the update of kind gradient, not clipped |
| Delta_k = w_k - w_t, in B_k | the update of kind delta |
| eta, E | `learning_rate`, `steps` of the local AdamW (deltas only) |

Siblings: proto/fleetune/methods/v1/deft.proto, coordinator/fleetune/coordinator/methods/deft.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fleetune.agent.methods import evaluating, inputs, updates
from fleetune.agent.methods.plans import DEFAULT_BATCH_ROWS
from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer import loop
from fleetune.child.entry import Emit
from fleetune.errors import ModelError, UnsupportedError
from fleetune.methods.v1 import deft_pb2
from fleetune.model import depths, peaks
from fleetune.model.batches import Example
from fleetune.model.depths import DepthBlock
from fleetune.model.lora import AdaptedModel
from fleetune.v1 import messages_pb2


def train(work: Work, emit: Emit) -> Trained:
    """Gradient or delta of the task's blocks; writes it to `work.out_path`, with those blocks' tensors and no others."""
    task = _payload(work)
    started = time.monotonic()
    session, examples, out_path = inputs.loaded(work, emit)
    adapted = session.adapted
    trained = _blocks(adapted, task)
    told = peaks.forget(adapted.accelerator)
    loaded = time.monotonic()
    plan = _plan(task, work, len(examples))
    costs = session.row_costs(tuple(task.depths))
    with depths.training_only(adapted, trained):
        if task.payload == deft_pb2.DEFT_PAYLOAD_DELTA:
            kind, (outcome, changes) = "delta", _moved(adapted, trained, examples.items, plan, emit, costs)
        else:
            kind, (outcome, changes) = "gradient", _gradient(adapted, trained, examples.items, plan, emit, costs)
    peak_bytes = max(0, peaks.highest_bytes(adapted.accelerator) - session.loaded_bytes) if told else 0
    done = time.monotonic()
    written, norm = updates.write(out_path, changes, kind, task.update_dtype)
    report = messages_pb2.UpdateReport(samples=outcome.samples, peak_rss_bytes=peak_rss_bytes())
    report.metrics.add(name="loss", value=outcome.mean_loss)
    for name, seconds in (("load", loaded - started), ("train", done - loaded), ("write", time.monotonic() - done)):
        report.seconds.add(name=name, value=seconds)
    report.payload.Pack(
        deft_pb2.DeftReport(
            steps=outcome.steps,
            mean_loss=outcome.mean_loss,
            batch_size=outcome.micro_rows,
            step_s=outcome.step_s,
            update_norm=norm,
            step_peak_bytes=peak_bytes,
        )
    )
    return Trained(report, written.digest, written.size_bytes)


def evaluate(work: Work, emit: Emit) -> messages_pb2.Evaluation:
    """The state's metrics on the device's own validation rows."""
    return evaluating.evaluate(work, emit)


Changes = list[tuple[str, torch.Tensor]]


def _gradient(
    adapted: AdaptedModel,
    trained: Sequence[DepthBlock],
    items: Sequence[Example],
    plan: loop.Plan,
    emit: Emit,
    costs: dict[int, int],
) -> tuple[loop.Outcome, Changes]:
    """The mean gradient over the plan's rows. A tensor that the loss does not depend on has the gradient 0."""
    outcome = loop.gradient(adapted, items, plan, emit, costs)
    changes = [(name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad) for name, parameter in _tensors(trained)]
    adapted.model.zero_grad(set_to_none=True)
    return outcome, changes


def _moved(
    adapted: AdaptedModel,
    trained: Sequence[DepthBlock],
    items: Sequence[Example],
    plan: loop.Plan,
    emit: Emit,
    costs: dict[int, int],
) -> tuple[loop.Outcome, Changes]:
    """How the blocks moved in the plan's steps of AdamW, which begins anew each round."""
    own = _tensors(trained)
    anchors = [parameter.detach().clone() for _, parameter in own]
    outcome = loop.train(adapted, items, plan, emit, row_costs=costs, parameters=[parameter for _, parameter in own])
    return outcome, [(name, parameter.detach() - anchor) for (name, parameter), anchor in zip(own, anchors, strict=True)]


def _tensors(trained: Sequence[DepthBlock]) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for block in trained for pair in zip(block.tensor_names, block.parameters, strict=True)]


def _payload(work: Work) -> deft_pb2.DeftTask:
    task = deft_pb2.DeftTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The task holds {work.task.payload.type_url!r}, DeftTask is expected.", "Use the same version of Fleetune on both sides."
        )
    updates.check_dtype(task.update_dtype)
    return task


def _blocks(adapted: AdaptedModel, task: deft_pb2.DeftTask) -> list[DepthBlock]:
    """The blocks of the task's depths, from the loss on."""
    blocks = depths.depth_blocks(adapted)
    if task.depth_count != len(blocks):
        raise ModelError(
            f"The task counts {task.depth_count} depths, the model has {len(blocks)} here: {', '.join(block.name for block in blocks)}.",
            "Use the same version of Fleetune on both sides.",
        )
    wanted = list(task.depths)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 1 or wanted[-1] > len(blocks):
        raise ModelError(
            f"The task's depths {wanted} cannot be trained; allowed: different ones from 1 to {len(blocks)}, ascending.",
            "This is a bug of the coordinator; report it.",
        )
    return [blocks[depth - 1] for depth in wanted]


def _plan(task: deft_pb2.DeftTask, work: Work, rows: int) -> loop.Plan:
    batch_rows = int(task.batch_size) or DEFAULT_BATCH_ROWS
    # A step never sees a row twice, so a device with few rows takes smaller steps.
    step_rows = min(batch_rows * max(int(task.gradient_accumulation), 1), rows)
    steps = max(int(task.steps), 1) if task.payload == deft_pb2.DEFT_PAYLOAD_DELTA else 1
    return loop.Plan(
        total_rows=step_rows * steps,
        step_rows=step_rows,
        micro_rows=min(batch_rows, step_rows),
        rate=lambda _: task.learning_rate,
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_grad_norm,
        proximal_mu=0.0,
        seed=f"{work.task.seed}/{work.task.round}",
        memory_bytes=work.limits.memory_bytes,
        order_seed=f"deft/{task.order_seed}",
        first_row=int(task.first_step) * step_rows,
    )
