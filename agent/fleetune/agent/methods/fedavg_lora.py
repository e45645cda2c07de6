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
| r_i, s_i | `rank`, `scale`: this device's own, of the state's first directions |

With `personal` (FedSA-LoRA) B and the head are this device's own: `personal.py` keeps them, A alone is sent.

Siblings: proto/fleetune/methods/v1/fedavg_lora.proto, coordinator/fleetune/coordinator/methods/fedavg_lora.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from fleetune.agent.methods import evaluating, inputs, personal, plans, updates
from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer import data, loop
from fleetune.child.entry import Emit
from fleetune.errors import UnsupportedError
from fleetune.methods.v1 import fedavg_lora_pb2
from fleetune.model import adapter, ranks
from fleetune.model.lora import AdaptedModel
from fleetune.v1 import messages_pb2

SCALE_KEY = "fleetune.lora_scale"
"""In the update's metadata: what the product of the pairs was multiplied by. The coordinator infers it from nothing else."""


BESIDE_REST = "beside-rest"
"""Of `trains`: what lies past `rank` is a part of the frozen weights."""


def train(work: Work, emit: Emit) -> Trained:
    """Local training from the global state; writes the delta to `work.out_path`."""
    task = _payload(work)
    started = time.monotonic()
    session, examples, out_path = inputs.loaded(work, emit)
    if task.personal:
        personal.recall(_keep_folder(work), work.task.job_id, session.adapted, int(work.task.round), emit)
    with ranks.narrowed(session.adapted, int(task.rank), task.scale, _side(task), keeps_rest=task.trains == BESIDE_REST) as adapted:
        anchors = [parameter.detach().clone() for parameter in adapted.parameters]
        loaded = time.monotonic()
        plan = plans.plan(task, work, len(examples), steps=int(task.steps), epochs=task.epochs, proximal_mu=task.proximal_mu)
        outcome = loop.train(adapted, examples.items, plan, emit, anchors if task.proximal_mu > 0 else None, session.row_costs())
        trained = time.monotonic()
        metadata = {SCALE_KEY: repr(task.scale)} if task.scale else None
        written, norm = write_delta(out_path, adapted, anchors, task.update_dtype, metadata, only_shared=task.personal)
    if task.personal:
        # Before the update can be sent: what is counted was kept.
        personal.keep(_keep_folder(work), work.task.job_id, session.adapted, int(work.task.round))
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
    """The state's metrics on the device's own validation rows; with what of the model is its own, in jobs in which some of it is."""
    if not (work.task.HasField("payload") and _payload(work).personal):
        return evaluating.evaluate(work, emit)

    def loaded(work: Work, emit: Emit) -> data.Session:
        session = evaluating.whole(work, emit)
        personal.recall(_keep_folder(work), work.task.job_id, session.adapted, int(work.task.round) + 1, emit)
        return session

    return evaluating.evaluate(work, emit, loaded)


def _keep_folder(work: Work) -> Path:
    if work.keep_folder is None:
        raise UnsupportedError("The task keeps a part of the model on the device, and no folder is given for it.", "Update the agent.")
    return work.keep_folder


def _payload(work: Work) -> fedavg_lora_pb2.FedavgLoraTask:
    task = fedavg_lora_pb2.FedavgLoraTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The task holds {work.task.payload.type_url!r}, FedavgLoraTask is expected.", "Use the same version of Fleetune on both sides."
        )
    updates.check_dtype(task.update_dtype)
    return task


def _side(task: fedavg_lora_pb2.FedavgLoraTask) -> ranks.Side:
    match task.trains:
        case "" | "both" | "beside-rest":
            return "both"
        case "left" | "right":
            return task.trains
        case _:
            raise UnsupportedError(
                f"The task asks to train {task.trains!r} of each LoRA pair; left, right, both and {BESIDE_REST} are known here.",
                "Update Fleetune on this machine.",
            )


def write_delta(
    path: Path,
    adapted: AdaptedModel,
    anchors: list[torch.Tensor],
    update_dtype: str,
    metadata: Mapping[str, str] | None = None,
    *,
    only_shared: bool = False,
) -> tuple[adapter.WrittenFile, float]:
    """The update file of how the model, or only A of its pairs, has moved from `anchors`, and the Euclidean norm of that before it is
    narrowed."""
    both = zip(adapted.trainables, anchors, strict=True)
    pairs = ((trainable, anchor) for trainable, anchor in both if not only_shared or personal.is_shared(trainable.name))
    deltas = ((trainable.name, trainable.parameter.detach() - anchor) for trainable, anchor in pairs)
    return updates.write(path, deltas, "delta", update_dtype, metadata)
